"""Restore and Uncertainty, in the real ComfyUI with the demo prior."""

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


class Demo:
    """The demo prior as a user's graph has it, and what the measurement nodes make of its pictures."""

    def __init__(self, pack: ModuleType) -> None:
        self.pack, self.nodes = pack, pack.nodes
        self.model, clip, self.vae = self.nodes.demo.LoadDemoPrior.execute().args
        self.prompt = clip.encode_from_tokens_scheduled(clip.tokenize("a portrait"))

    def pictures(self, count: int) -> Tensor:
        return self.nodes.demo.DemoPictures.execute(0, count).args[0]

    def measure(self, image: Tensor, bind: Any, sigma: float = 0.0) -> Any:
        recipe = self.nodes.types.OperatorRecipe("test", bind)
        return self.nodes.measurement.MeasureSimulate.execute(image, recipe, {"noise": "Gaussian", "sigma": sigma}, 0).args[0]

    def restore(self, measurement: Any, method: str = "C-PiGDM", seed: int = 0, **options: Any) -> tuple[Tensor, float]:
        given = {"quality": "fast", "cfg": 1.0, **options}
        return self.nodes.restore.Restore.execute(
            self.model, self.vae, self.prompt, measurement, method, seed=seed, **given
        ).args


@pytest.fixture(scope="module")
def demo(pack: ModuleType) -> Demo:
    import comfyui_posterior.nodes  # noqa: F401

    with torch.inference_mode():
        return Demo(pack)


def psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * (a.clamp(0, 1) - b).square().mean().log10())


@pytest.mark.parametrize("method", ["C-PiGDM", "PSLD"])
@torch.inference_mode()
def test_a_picture_of_any_size_comes_back_in_its_size_and_agrees(demo: Demo, method: str) -> None:
    truth = demo.pictures(4)[:, :116, 4:116]  # 116 x 112: not a multiple of 8, and blocks of 8 at the lower edge are partial
    bind = lambda shape: demo.pack.operators.AreaDownscale(shape, 8)  # noqa: E731
    measurement = demo.measure(truth, bind)
    image, residual = demo.restore(measurement, method)
    assert image.shape == truth.shape
    assert residual < 1e-6
    blocks = measurement.operator.A_adjoint(measurement.y) * 64  # each block at its mean, whole blocks only
    plain = ((blocks + 1) / 2).movedim(1, -1).float()[:, :112]
    gains = [
        psnr(image[i : i + 1, :112], truth[i : i + 1, :112]) - psnr(plain[i : i + 1], truth[i : i + 1, :112]) for i in range(4)
    ]
    assert sum(gains) / 4 > 1.3  # measured: 1.7 and 2.4


@torch.inference_mode()
def test_kept_pixels_are_bit_exact_and_samples_differ_in_the_hole_only(demo: Demo) -> None:
    truth = demo.pictures(2)
    keep = demo.pack.operators.box_mask((3, 128, 128), (48, 56), (40, 36))
    measurement = demo.measure(truth, lambda shape: demo.pack.operators.Mask(keep))
    image, residual = demo.restore(measurement, samples=2)
    assert image.shape == (4, 128, 128, 3)  # photo 1 twice, photo 2 twice
    assert residual == 0
    kept = keep[0, 0] > 0
    for i in range(4):
        assert torch.equal(image[i][kept], truth[i // 2][kept])
    mean, heat, deviation = demo.nodes.restore.Uncertainty.execute(image, 2).args
    assert mean.shape == heat.shape == truth.shape
    assert float(deviation[:, kept].max()) == 0
    assert float(deviation[:, ~kept].mean()) > 0.01


@pytest.mark.parametrize(
    ("method", "samples", "settings"), [("C-PiGDM", 1, (None, None)), ("C-PiGDM", 2, (0.5, 2.0)), ("PSLD", 2, (None, None))]
)
@torch.inference_mode()
def test_several_samples_are_drawn_with_the_spread_of_the_posterior(
    demo: Demo, method: str, samples: int, settings: tuple[float | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    solve, options = demo.nodes.restore.SOLVERS[method]
    seen = []

    def noted(*given: Any, **named: Any) -> Tensor:
        seen.append((named.get("eta"), named.get("spread")))
        return solve(*given, **named)

    monkeypatch.setitem(demo.nodes.restore.SOLVERS, method, (noted, options))
    monkeypatch.setitem(demo.nodes.restore.CALLS[method], "fast", 2)
    demo.restore(
        demo.measure(demo.pictures(1), lambda shape: demo.pack.operators.AreaDownscale(shape, 8)), method, samples=samples
    )
    assert seen == [settings] * samples


@torch.inference_mode()
def test_each_photo_starts_from_the_level_that_its_own_hole_needs(demo: Demo, start_levels: list[float | None]) -> None:
    """Several samples of it start from the model's highest level, and so does a scheduler of ComfyUI's."""
    keep = torch.ones(2, 1, 128, 128)
    keep[0, :, 40:48, 40:48] = 0
    keep[1, :, 16:112, 16:112] = 0
    measurement = demo.measure(demo.pictures(2), lambda shape: demo.pack.operators.Mask(keep.expand(-1, 3, -1, -1)), 0.02)
    demo.restore(measurement)
    assert start_levels == pytest.approx([1.2, 4.8])
    start_levels.clear()
    one = measurement.select(0)
    demo.restore(one, samples=2)
    demo.restore(one, scheduler="normal")
    assert start_levels == [None] * 2


@torch.inference_mode()
def test_a_photo_is_restored_alike_in_any_batch_and_again_with_its_seed(demo: Demo) -> None:
    truth = demo.pictures(2)
    bind = lambda shape: demo.pack.operators.AreaDownscale(shape, 8)  # noqa: E731
    both, _ = demo.restore(demo.measure(truth, bind), seed=7)
    second, _ = demo.restore(demo.measure(truth[1:], bind), seed=8)
    assert torch.equal(both[1:], second)
    again, _ = demo.restore(demo.measure(truth[1:], bind), seed=8)
    assert torch.equal(again, second)


@torch.inference_mode()
def test_what_cannot_be_met_is_said_before_the_sampling(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("sampled")

    monkeypatch.setattr(demo.nodes.restore.host, "sample_latents", never)
    kernel = demo.pack.operators.gaussian_kernel(3.0)
    measurement = demo.measure(demo.pictures(1), lambda shape: demo.pack.operators.Blur(kernel, shape, "reflect"))
    rounded = type(measurement)((measurement.y * 127.5).round() / 127.5, measurement.operator)
    with pytest.raises(ValueError, match=r"measurement: .*sigma above 0"):
        demo.restore(rounded)
    with pytest.raises(ValueError, match="negative: not connected, but cfg is 3"):
        demo.restore(measurement, cfg=3.0)


@torch.inference_mode()
def test_nan_is_laid_to_the_prompt_or_the_vae_that_has_it(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    measurement = demo.measure(demo.pictures(1), lambda shape: demo.pack.operators.AreaDownscale(shape, 8))
    (text, extra), nan = demo.prompt[0], float("nan")
    run = demo.nodes.restore.Restore.execute
    with pytest.raises(ValueError, match=r"^positive: has NaN values; the node that encoded the prompt"):
        run(demo.model, demo.vae, [[text * nan, extra]], measurement, "C-PiGDM", "fast", 0, 1.0)
    decode = demo.vae.decode
    monkeypatch.setattr(demo.vae, "decode", lambda latent: decode(latent) * nan)
    with pytest.raises(ValueError, match=r"^vae: the picture it decodes has NaN or infinite values; .*--fp32-vae"):
        demo.restore(measurement)


@pytest.mark.parametrize("method", ["C-PiGDM", "PSLD"])
@torch.inference_mode()
def test_a_picture_without_any_detail(demo: Demo, method: str) -> None:
    photo = torch.full((1, 32, 32, 3), 0.5)
    image, residual = demo.restore(demo.measure(photo, lambda shape: demo.pack.operators.AreaDownscale(shape, 8)), method)
    assert image.isfinite().all()
    assert residual < 1e-6


@torch.inference_mode()
def test_a_photo_without_a_fault_comes_back_and_restore_says_why(demo: Demo) -> None:
    photo = demo.pictures(1)
    measurements = [demo.measure(photo, demo.pack.operators.Identity, sigma) for sigma in (0.0, 0.1)]
    run = demo.nodes.restore.Restore.execute
    outs = [run(demo.model, demo.vae, demo.prompt, m, "C-PiGDM", "fast", 0, 1.0) for m in measurements]
    assert torch.equal(outs[0].args[0], photo)
    assert ["nothing to restore" in out.ui["text"][0] for out in outs] == [True, False]


@torch.inference_mode()
def test_a_wrong_operator_is_said(demo: Demo) -> None:
    """Wide blocks to the eye, single pixels to the operator: no sample of portraits agrees with them as pixels."""
    ops = demo.pack.operators
    right = demo.measure(demo.pictures(1), lambda shape: ops.Blur(ops.gaussian_kernel(1.5), shape, "reflect"), 0.005)
    wrong = replace(right, operator=ops.Blur(ops.gaussian_kernel(6.0), right.operator.in_shape, "reflect"))
    run = demo.nodes.restore.Restore.execute
    outs = [run(demo.model, demo.vae, demo.prompt, m, "C-PiGDM", "fast", 0, 1.0) for m in (right, wrong)]
    assert ["does not agree with the photo" in out.ui["text"][0] for out in outs] == [False, True]


def test_uncertainty_is_the_standard_deviation_and_counts_its_samples(demo: Demo) -> None:
    samples = 0.5 + 0.05 * torch.randn(200, 6, 5, 3, generator=torch.Generator().manual_seed(0))
    run = demo.nodes.restore.Uncertainty.execute
    out = run(samples, 0, 0.2)
    mean, heat, deviation = out.args
    assert out.ui["text"] == ("1 photo, 200 samples of each",)
    assert run(samples, 50).ui["text"] == ("4 photos, 50 samples of each",)
    torch.testing.assert_close(mean[0], samples.mean(0))
    assert abs(float(deviation.mean()) - 0.25) < 0.01  # 0.05 of 0.2
    assert heat.shape == (1, 6, 5, 3)
    with pytest.raises(ValueError, match="samples: got one for each photo, but a map needs at least 2"):
        run(samples[:1])
    with pytest.raises(ValueError, match="samples: got 200 pictures, expected a multiple of per_photo, 3"):
        run(samples, 3)
