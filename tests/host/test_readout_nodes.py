"""Consistency, Compare and the plot of a run: the figures by their definitions, the words by what they must not hide."""

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor


@pytest.fixture(scope="module")
def nodes(pack: ModuleType) -> ModuleType:
    import comfyui_posterior.nodes  # noqa: F401

    return pack.nodes


def noise_like(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def picture(*size: int, seed: int = 0, batch: int = 1) -> Tensor:
    """Smooth waves, IMAGE (batch, h, w, 3) in [0.2, 0.8]."""
    coarse = noise_like(batch, 3, 4, 4, seed=seed).float() * 0.6 + 0.2
    fine = torch.nn.functional.interpolate(coarse, size or (48, 64), mode="bilinear", align_corners=True)
    return fine.movedim(1, -1)


Bind = Callable[[tuple[int, int, int]], Any]


def measure(nodes: ModuleType, image: Tensor, bind: Bind, sigma: float = 0.0) -> Any:
    recipe = nodes.types.OperatorRecipe("test", bind)
    with torch.inference_mode():
        return nodes.measurement.MeasureSimulate.execute(image, recipe, {"noise": "Gaussian", "sigma": sigma}, 0).args[0]


def consistency(nodes: ModuleType, image: Tensor, measurement: Any, gain: float = 10.0) -> tuple[Any, ...]:
    """picture, relative, sigmas, agrees, text."""
    with torch.inference_mode():
        out = nodes.readouts.Consistency.execute(image, measurement, gain)
    return *out.args, out.ui["text"][0]


def test_figures_are_those_of_what_was_measured(nodes: ModuleType, pack: ModuleType) -> None:
    """Half of the values are lost; what the result has there does not count."""
    truth = picture()
    keep = pack.operators.box_mask((3, 48, 64), (24, 64), (0, 0))
    measurement = measure(nodes, truth, lambda _: pack.operators.Mask(keep), 0.05)
    result = truth.clone()
    result[:, :24] = 0.9
    result[:, 24:] += 0.02
    photo, again = (measurement.y[:, :, 24:] + 1) / 2, result[:, 24:].movedim(-1, 1).double()
    _, relative, sigmas, agrees, text = consistency(nodes, result, measurement)
    rms = float((again - photo).square().mean().sqrt())
    assert relative == pytest.approx(float((again - photo).norm() / photo.norm()), rel=1e-9)
    assert sigmas == pytest.approx(rms / 0.05, rel=1e-9)
    assert agrees
    said = re.fullmatch(r"\|A x - y\| (\S+), (\S+)% of \|y\|, (\S+) times the noise: agrees within the noise", text)
    assert float(said[1]) == pytest.approx(rms, rel=0.05)
    assert float(said[2]) == pytest.approx(100 * relative, abs=0.01)
    assert float(said[3]) == pytest.approx(sigmas, abs=0.01)
    # Nor does what a file of another program may have there.
    y = measurement.y.clone()
    y[:, :, :24] = 0.7
    scribbled = pack.operators.Measurement(y, measurement.operator, measurement.sigma)
    assert consistency(nodes, result, scribbled)[1:] == (relative, sigmas, agrees, text)


def test_picture_is_photo_result_and_difference(nodes: ModuleType, pack: ModuleType) -> None:
    truth = picture(128, 160)
    measurement = measure(nodes, truth, pack.operators.Identity)
    shown = consistency(nodes, truth + 0.01, measurement, gain=20.0)[0]
    gap = 4
    assert shown.shape == (1, 128, 3 * 160 + 2 * gap, 3)
    photo, result, difference = (shown[:, :, i * (160 + gap) :][:, :, :160] for i in range(3))
    assert torch.allclose(photo, truth, atol=1e-6)
    assert torch.allclose(result, truth + 0.01, atol=1e-6)
    assert torch.allclose(difference, torch.full_like(truth, 0.5 + 20 * 0.01), atol=1e-4)


def test_small_photos_are_shown_enlarged(nodes: ModuleType, pack: ModuleType) -> None:
    measurement = measure(nodes, picture(40, 80), lambda shape: pack.operators.AreaDownscale(shape, 8))
    shown = consistency(nodes, picture(40, 80), measurement)[0]
    assert shown.shape[1] == 125  # 5 rows, 25 times
    assert torch.equal(shown[:, ::25, :250:25], nodes.types.to_image(measurement.y))


@pytest.mark.parametrize(
    ("change", "sigma", "words", "agrees"),
    [
        (lambda x: x, 0.0, "agrees exactly", True),
        (lambda x: (x * 255).round() / 255, 0.0, "agrees to the rounding of 8 bits", True),
        (lambda x: x + 0.01, 0.0, "does not agree. It can be met: the Finish node or more steps bring it closer", False),
        (lambda x: x, 0.05, "agrees within the noise", True),
        (lambda x: x + 0.2, 0.05, "does not agree. It can be met: the Finish node or more steps bring it closer", False),
    ],
)
def test_verdict(
    nodes: ModuleType, pack: ModuleType, change: Callable[[Tensor], Tensor], sigma: float, words: str, agrees: bool
) -> None:
    truth = picture()
    measurement = measure(nodes, truth, lambda shape: pack.operators.Grayscale(shape, "709"), sigma)
    _, _, sigmas, said, text = consistency(nodes, change(truth), measurement)
    assert text.endswith(f": {words}")
    assert said is agrees
    assert math.isinf(sigmas) == (sigma == 0 and words != "agrees exactly")


def test_a_result_that_follows_the_noise_is_told(nodes: ModuleType, pack: ModuleType) -> None:
    measurement = measure(nodes, picture(), pack.operators.Identity, 0.05)
    _, _, sigmas, agrees, text = consistency(nodes, nodes.types.to_image(measurement.y), measurement)
    assert sigmas < 0.01
    assert agrees
    assert text.endswith("agrees, nearer than the noise, as Finish brings it")


def blur(pack: ModuleType, sigma: float, boundary: str = "reflect") -> Bind:
    return lambda shape: pack.operators.Blur(pack.operators.gaussian_kernel(sigma), shape, boundary)


def detailed(*size: int) -> Tensor:
    """A picture with hard edges, which a blurred photo cannot have."""
    image = picture(*size)
    image[:, 10:30:4, 8:-8] = 0.9
    image[:, 12:30:4, 8:-8] = 0.1
    return image


def test_an_operator_that_did_not_make_the_photo_is_told(nodes: ModuleType, pack: ModuleType) -> None:
    """A sharp photo that is said to be blurred: neither a sample nor the Finish node can agree with it."""
    sharp = measure(nodes, detailed(), pack.operators.Identity, 0.01)
    recipe = nodes.types.OperatorRecipe("blur", blur(pack, 3.0))
    wrong = nodes.measurement.MeasurementFromPhoto.execute(
        nodes.types.to_image(sharp.y), recipe, {"noise": "entered", "sigma": 0.01}
    ).args[0]
    finished = nodes.finish.Finish.execute(detailed(), wrong, 0.05).args[0]
    for result in (detailed(), finished):
        _, _, sigmas, agrees, text = consistency(nodes, result, wrong)
        assert not agrees
        floor = float(re.search(r"No likely picture brings it below (\S+): this operator did not make this photo", text)[1])
        assert 0.01 * 1.25 < floor <= 1.01 * sigmas * 0.01


def test_a_bad_result_for_the_right_operator_is_not_blamed_on_the_operator(nodes: ModuleType, pack: ModuleType) -> None:
    right = measure(nodes, detailed(), blur(pack, 3.0), 0.01)
    _, _, _, agrees, text = consistency(nodes, picture(seed=1), right)
    assert not agrees
    assert "It can be met" in text
    finished = nodes.finish.Finish.execute(picture(seed=1), right, 0.05).args[0]
    assert consistency(nodes, finished, right)[3]


KINDS: dict[str, Callable[[ModuleType], Bind]] = {
    "identity": lambda pack: pack.operators.Identity,
    "area": lambda pack: lambda shape: pack.operators.AreaDownscale(shape, 4),
    "bicubic": lambda pack: lambda shape: pack.operators.BicubicDownscale(shape, 2.5),
    "grey": lambda pack: lambda shape: pack.operators.Grayscale(shape, "709"),
    "mask": lambda pack: lambda shape: pack.operators.Mask(pack.operators.random_mask(shape, 0.7, seed=0)),
    "reflect": lambda pack: blur(pack, 2.0),
    "circular": lambda pack: blur(pack, 4.0, "circular"),
    "shaken": lambda pack: lambda shape: pack.operators.Blur(pack.operators.motion_kernel(9.0, 30.0), shape, "replicate"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sigma", [0.01, 0.1])
def test_the_true_operator_is_never_blamed(nodes: ModuleType, pack: ModuleType, kind: str, sigma: float) -> None:
    measurement = measure(nodes, detailed(), KINDS[kind](pack), sigma)
    with torch.inference_mode():
        (floor,) = nodes.readouts.residual_floors(measurement)
    assert floor <= 1.1 * sigma


def test_floor_without_noise_is_the_part_of_the_photo_outside_the_range(nodes: ModuleType, pack: ModuleType) -> None:
    """A blur of two equal taps loses the highest frequency; dense linear algebra says what a photo has of it."""
    operator = pack.operators.Blur(torch.tensor([[0.5, 0.5]]), (3, 6, 8), "circular")
    y = 2 * noise_like(1, 3, 6, 8) - 1
    columns = operator.A(torch.eye(144, dtype=torch.float64).unflatten(1, (3, 6, 8))).flatten(1).T
    left, values, _ = torch.linalg.svd(columns)
    inside = left[:, : int((values > 1e-9).sum())]
    outside = y.flatten() - inside @ (inside.T @ y.flatten())
    assert inside.shape[1] < 144
    (floor,) = nodes.readouts.residual_floors(pack.operators.Measurement(y, operator))
    assert floor == pytest.approx(float(outside.square().mean().sqrt()) / 2, rel=1e-9)


def test_iterations_that_do_not_end_are_admitted(nodes: ModuleType, pack: ModuleType) -> None:
    measurement = measure(nodes, detailed(32, 32), KINDS["shaken"](pack))
    text = consistency(nodes, picture(32, 32, seed=1), measurement)[4]
    assert re.search(r"does not agree\. Whether any picture could is not known \(A_dagger: relative residual", text)


@pytest.mark.parametrize("node", ["Consistency", "Finish"])
def test_cancelling_ends_the_iterations(
    nodes: ModuleType, pack: ModuleType, comfy: ModuleType, node: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as mm

    looked: list[int] = []

    def cancelled() -> None:
        looked.append(1)
        if len(looked) == 50:
            raise mm.InterruptProcessingException

    monkeypatch.setattr(nodes.host.faults, "throw_if_interrupted", cancelled)
    measurement = measure(nodes, detailed(32, 32), KINDS["shaken"](pack))
    run = nodes.readouts.Consistency.execute if node == "Consistency" else nodes.finish.Finish.execute
    with torch.inference_mode(), pytest.raises(mm.InterruptProcessingException):
        run(picture(32, 32, seed=1), measurement, 1.0)
    assert len(looked) == 50


def test_combined_measurements_are_read_photo_by_photo(nodes: ModuleType, pack: ModuleType) -> None:
    truth = picture(batch=2)
    parts = [measure(nodes, truth, KINDS[kind](pack), sigma) for kind, sigma in (("area", 0.02), ("grey", 0.1))]
    both = nodes.measurement.CombineMeasurements.execute(*parts).args[0]
    tinted = truth.clone()
    tinted[1, ..., 1] += 0.08  # within the noise of the grey photo, not of the small one
    shown, relative, sigmas, agrees, text = consistency(nodes, tinted, both)
    lines = text.split("\n")
    assert [line[: line.index("|")] for line in lines] == [
        f"picture {i}: photo {k}: " for i, k in ((1, 1), (1, 2), (2, 1), (2, 2))
    ]
    assert [" agrees within the noise" in line for line in lines] == [True, True, False, True]
    assert not agrees
    x = nodes.types.to_signal("image", tinted)
    errors = [(part.operator.A(x) - part.y)[1] / 2 for part in parts]
    sizes = [(part.y[1] + 1) / 2 for part in parts]
    expected = math.hypot(*(float(e.norm()) for e in errors)) / math.hypot(*(float(s.norm()) for s in sizes))
    assert relative == pytest.approx(expected, rel=1e-9)
    weighed = sum(float((e / s).square().sum()) for e, s in zip(errors, (0.02, 0.1), strict=True))
    assert sigmas == pytest.approx((weighed / sum(e.numel() for e in errors)) ** 0.5, rel=1e-9)
    assert shown.shape[:2] == (2, 2 * 2 * 48 + 4)  # two rows of 48 pixels, each pixel twice


def test_black_photo_has_no_relative_error(nodes: ModuleType, pack: ModuleType) -> None:
    black = torch.zeros(1, 32, 32, 3)
    measurement = measure(nodes, black, pack.operators.Identity)
    assert consistency(nodes, black, measurement)[1:4] == (0.0, 0.0, True)
    assert math.isinf(consistency(nodes, black + 0.1, measurement)[1])


def test_pictures_that_do_not_fit_are_refused(nodes: ModuleType, pack: ModuleType) -> None:
    measurement = measure(nodes, picture(batch=2), pack.operators.Identity)
    with pytest.raises(ValueError, match=r"^image: is 32 x 32 but the measurement's picture is 64 x 48; connect"):
        consistency(nodes, picture(32, 32), measurement)
    with pytest.raises(ValueError, match=r"^image: got a batch of 3 for a measurement of 2"):
        consistency(nodes, picture(batch=3), measurement)


# Compare --------------------------------------------------------------------------------------------------------------


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


# The plot of a run ----------------------------------------------------------------------------------------------------


def line(plot: Tensor) -> dict[int, float]:
    """Where the curve is, as column -> mean row."""
    pixels = (plot[0] * 255).round().numpy()
    rows, columns = np.nonzero((pixels == (31, 119, 180)).all(-1))
    return {int(c): float(rows[columns == c].mean()) for c in np.unique(columns)}


def test_plot_is_the_logarithm_of_the_residual(nodes: ModuleType) -> None:
    """A residual that falls tenfold with every step is a straight line over the whole frame."""
    plot = nodes.plot.residual_plot([[1.0, 0.1, 0.01, 0.001]], 0.0)
    assert plot.shape == (1, 270, 480, 3)
    curve = line(plot)
    left, right = min(curve), max(curve)
    slope = (curve[right - 4] - curve[left + 4]) / (right - left - 8)
    assert slope > 0.3
    for column, row in curve.items():
        if left + 4 <= column <= right - 4:
            assert abs(row - curve[left + 4] - slope * (column - left - 4)) < 3


def test_plot_has_the_noise_every_run_and_a_residual_of_nought(nodes: ModuleType) -> None:
    falling, flat = [0.5, 0.1, 0.0], [0.3, 0.3, 0.3]
    one, two = (nodes.plot.residual_plot(curves, 0.02) for curves in ([falling], [falling, flat]))
    assert not torch.equal(one, two)
    red = ((one[0] * 255).round() == torch.tensor([214.0, 39.0, 40.0])).all(-1)
    assert int(red.any(1).sum()) > 0
    assert int(red.sum(1).max()) > 150  # the broken line
    none = nodes.plot.residual_plot([falling], 0.0)
    assert not bool(((none[0] * 255).round() == torch.tensor([214.0, 39.0, 40.0])).all(-1).any())
    assert nodes.plot.residual_plot([[]], 0.02) is None
    assert nodes.plot.residual_plot([[0.1]], 0.0) is not None
