"""Compare: PSNR and SSIM beside scikit-image's, the map of errors, and LPIPS where there is one."""

import math
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from support.pictures import noise_like, picture
from torch import Tensor


def compare(nodes: ModuleType, image: Tensor, truth: Tensor, brightest: float = 0.2) -> tuple[Any, ...]:
    """picture, psnr, ssim, text."""
    with torch.inference_mode():
        out = nodes.readouts.Compare.execute(image, truth, brightest)
    return *out.args, out.ui["text"][0]


@pytest.mark.parametrize("size", [(11, 11), (12, 17), (48, 64)])
@pytest.mark.parametrize("spread", [0.02, 0.3])
def test_psnr_and_ssim_are_scikit_images(nodes: ModuleType, size: tuple[int, int], spread: float) -> None:
    """structural_similarity with the settings that its documentation gives for Wang et al. (2004)."""
    truth = picture(*size)
    image = (truth + spread * (noise_like(1, *size, 3).float() - 0.5)).clamp(0, 1)
    a, b = (v[0].double().numpy() for v in (image, truth))
    standard = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    _, psnr, ssim, text = compare(nodes, image, truth)
    assert psnr == pytest.approx(peak_signal_noise_ratio(b, a, data_range=1.0), abs=1e-6)
    assert ssim == pytest.approx(structural_similarity(a, b, channel_axis=-1, **standard), abs=1e-6)
    assert text == f"PSNR {psnr:.2f} dB, SSIM {ssim:.4f}"


def test_identical_pictures(nodes: ModuleType) -> None:
    shown, psnr, ssim, _ = compare(nodes, picture(), picture())
    assert math.isinf(psnr)
    assert ssim == 1
    assert float(shown[:, :, -64:].max()) == 0


def test_what_is_beyond_black_and_white_is_not_seen(nodes: ModuleType) -> None:
    truth = torch.ones(1, 32, 32, 3)
    assert math.isinf(compare(nodes, truth + 0.3, truth)[1])


def test_each_picture_of_a_batch_and_their_mean(nodes: ModuleType) -> None:
    truth = picture()
    image = torch.cat([truth + 0.1, truth + 0.01])
    _, psnr, _, text = compare(nodes, image, truth)
    assert re.findall(r"picture (\d): PSNR (\S+) dB", text) == [("1", "20.00"), ("2", "40.00")]
    assert psnr == pytest.approx(30, abs=1e-3)


def test_error_map(nodes: ModuleType) -> None:
    """Black where there is none, white from `brightest` on, between them the same order."""
    truth = picture(128, 128)
    image = truth.clone()
    image[:, 40:60] += 0.1
    image[:, 60:80] += 0.2
    shown = compare(nodes, image, truth, brightest=0.15)[0]
    error = shown[0, :, -128:]
    assert torch.allclose(shown[0, :, 132:260], truth[0], atol=1e-6)
    assert float(error[:40].max()) == 0
    assert torch.equal(error[60:80], torch.ones(20, 128, 3))
    assert torch.allclose(error[40:60], torch.tensor([1.0, 1.0, 0.0]).expand(20, 128, 3), atol=1e-3)


@pytest.mark.parametrize(
    ("image", "truth", "message"),
    [
        ((48, 64), (64, 48), r"^image: is 64 x 48, but truth is 48 x 64"),
        ((10, 64), (10, 64), r"^image: is 64 x 10; SSIM looks at windows of 11 x 11"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    nodes: ModuleType, image: tuple[int, int], truth: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compare(nodes, picture(*image), picture(*truth))


def test_batches_that_do_not_fit_are_refused(nodes: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"^image: got a batch of 3 for 2 pictures at truth"):
        compare(nodes, picture(batch=3), picture(batch=2))


LPIPS = """
import torch


class LPIPS(torch.nn.Module):
    def __init__(self, net, verbose):
        super().__init__()
        assert net == "alex"

    def forward(self, a, b):
        assert a.min() < 0 and a.dtype == torch.float32  # from -1 to 1
        return (a - b).abs().mean((1, 2, 3), keepdim=True)
"""


def test_lpips_needs_package_and_weights(nodes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that stands in for lpips, as it is called; nothing is loaded while the network's weights are missing."""
    hub = tmp_path / "hub"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    truth = picture()
    assert "LPIPS" not in compare(nodes, truth + 0.1, truth)[3]
    (tmp_path / "lpips").mkdir()
    (tmp_path / "lpips" / "__init__.py").write_text(LPIPS)
    monkeypatch.syspath_prepend(tmp_path)
    assert "LPIPS" not in compare(nodes, truth + 0.1, truth)[3]
    assert "lpips" not in sys.modules
    (hub / "checkpoints").mkdir(parents=True)
    (hub / "checkpoints" / "alexnet-owt-7be5be79.pth").touch()
    try:
        assert compare(nodes, truth + 0.1, truth)[3].endswith("LPIPS 0.2000")
    finally:
        sys.modules.pop("lpips", None)


def test_lpips_asks_for_the_file_that_torchvision_would_load(nodes: ModuleType) -> None:
    from torchvision.models import AlexNet_Weights

    assert AlexNet_Weights.IMAGENET1K_V1.url.endswith(f"/{nodes.readouts.LPIPS_TRUNK}")
