"""Consistency: its figures by their definitions, its verdict by what it must not hide."""

import math
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from support.pictures import noise_like, picture
from support.tiny_checkpoints import conditioning
from torch import Tensor

DOES_NOT_YET = (
    "does not agree. It can be met: more steps bring it closer, and so does the Finish node, which Restore includes. If they do not, "
    "check the operator: a blur that is too wide can be met, too, by a picture that looks wrong; Estimate Blur reads it from the photo"
)
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
        (lambda x: x + 0.01, 0.0, DOES_NOT_YET, False),
        (lambda x: x, 0.05, "agrees within the noise", True),
        (lambda x: x + 0.2, 0.05, DOES_NOT_YET, False),
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
    assert math.isinf(sigmas) == (sigma == 0 and not agrees)


def test_a_result_that_follows_the_noise_is_told(nodes: ModuleType, pack: ModuleType) -> None:
    measurement = measure(nodes, picture(), pack.operators.Identity, 0.05)
    _, _, sigmas, agrees, text = consistency(nodes, nodes.types.to_image(measurement.y), measurement)
    assert sigmas < 0.01
    assert agrees
    assert text.endswith("agrees, nearer than the noise: some of the photo's noise is in it, as after Finish")


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
        floor = float(
            re.search(
                r"No likely picture brings it below (\S+)\. If the photo was a JPEG, .* Else this operator did not make it",
                text,
            )[1]
        )
        assert 0.01 * 1.25 < floor <= 1.01 * sigmas * 0.01


@pytest.mark.parametrize("width", [1.0, 3.0])
def test_a_wrong_blur_can_be_met_too(nodes: ModuleType, pack: ModuleType, width: float) -> None:
    """A photo of blur 2, said to be 1 or 3: agreement does not prove the operator."""
    made = pack.operators.Blur(pack.operators.gaussian_kernel(2.0), (3, 48, 64), "reflect").A(
        nodes.types.to_signal("image", picture())
    )
    rounded = (nodes.types.to_image(made) * 255).round() / 255
    recipe = nodes.types.OperatorRecipe("blur", blur(pack, width))
    wrong = nodes.measurement.MeasurementFromPhoto.execute(rounded, recipe, {"noise": "entered", "sigma": 0.01}).args[0]
    finished = nodes.finish.Finish.execute(picture(), wrong, 0.05).args[0]
    assert consistency(nodes, finished, wrong)[3]


def test_no_sigma_below_the_rounding_of_8_bits_is_proposed(nodes: ModuleType, pack: ModuleType) -> None:
    """A photo of 8 bits, blurred as is said, with less noise than its rounding."""
    kernel = pack.operators.gaussian_kernel(2.0)
    made = pack.operators.Blur(kernel, (3, 40, 40), "reflect").A(nodes.types.to_signal("image", picture(40, 40)))
    rounded = (nodes.types.to_image(made) * 255).round() / 255
    recipe = nodes.types.OperatorRecipe("blur", blur(pack, 2.0))
    given = {"noise": "entered", "sigma": 0.0}
    exact = nodes.measurement.MeasurementFromPhoto.execute(rounded, recipe, given).args[0]
    measurement = pack.operators.Measurement(exact.y, exact.operator, 2 * 5e-4)  # as a file of another program may have it
    *_, agrees, text = consistency(nodes, picture(40, 40), measurement)
    assert not agrees
    assert re.search(r"No likely picture brings it below 0\.00[01]\d*\. .* set sigma to 0\.002\. Else", text), text


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
        (floor,) = nodes.readouts.best_residuals(measurement)
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
    (floor,) = nodes.readouts.best_residuals(pack.operators.Measurement(y, operator))
    assert floor == pytest.approx(float(outside.square().mean().sqrt()) / 2, rel=1e-9)


def test_iterations_that_do_not_end_are_admitted(nodes: ModuleType, pack: ModuleType) -> None:
    measurement = measure(nodes, detailed(32, 32), KINDS["shaken"](pack))
    text = consistency(nodes, picture(32, 32, seed=1), measurement)[4]
    assert re.search(r"does not agree\. Whether any picture could is not known \(A_dagger: relative residual", text)


SOLVES: dict[str, Callable[[ModuleType, Any, Any], Any]] = {
    "Consistency": lambda nodes, h, m: nodes.readouts.Consistency.execute(picture(64, 64, seed=1), m, 1.0),
    "Finish": lambda nodes, h, m: nodes.finish.Finish.execute(picture(64, 64, seed=1), m, 1.0),
    "PSLD Sampler": lambda nodes, h, m: nodes.samplers.SamplerPSLD.execute(
        m, {"rule": "paper", "omega": 1.0, "gamma": 0.1, "eta": 0.0, "glue": "pinv"}, vae=h.vae
    ),
    "Start Latent": lambda nodes, h, m: nodes.samplers.StartLatent.execute(m, h.vae, "measurement"),
    "Restore": lambda nodes, h, m: nodes.restore.Restore.execute(
        h.model, h.vae, conditioning("sd15", 1), m, "C-PiGDM", "fast", 0, 1.0
    ),
}


@pytest.mark.parametrize("node", SOLVES)
def test_cancelling_ends_the_iterations(
    nodes: ModuleType, pack: ModuleType, hosts: Callable, node: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as mm

    looked: list[int] = []

    def cancelled() -> None:
        looked.append(1)
        if len(looked) == 50:
            raise mm.InterruptProcessingException

    monkeypatch.setattr(nodes.host.faults, "throw_if_interrupted", cancelled)
    measurement = measure(nodes, detailed(64, 64), KINDS["shaken"](pack))
    with torch.inference_mode(), pytest.raises(mm.InterruptProcessingException):
        SOLVES[node](nodes, hosts("sd15"), measurement)
    assert len(looked) == 50


def test_restore_can_be_cancelled_before_its_first_step(
    nodes: ModuleType, pack: ModuleType, hosts: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it fills the picture that is widened to what the VAE makes, after it has looked whether the photo can be met."""
    import comfy.model_management as mm

    met: list[str] = []

    def cancelled() -> None:
        if met:
            raise mm.InterruptProcessingException

    monkeypatch.setattr(nodes.host.faults, "throw_if_interrupted", cancelled)
    monkeypatch.setattr(nodes.restore, "finish", lambda *_: met.append("yes"))
    monkeypatch.setattr(nodes.host, "sigmas_of", lambda *_: pytest.fail("went on"))
    measurement = measure(nodes, detailed(44, 44), lambda shape: pack.operators.AreaDownscale(shape, 4))
    h = hosts("sd15")
    with torch.inference_mode(), pytest.raises(mm.InterruptProcessingException):
        nodes.restore.Restore.execute(h.model, h.vae, conditioning("sd15", 1), measurement, "C-PiGDM", "fast", 0, 1.0)
    assert met == ["yes"]


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


@pytest.mark.parametrize("combined", [False, True])
def test_several_results_of_each_photo(nodes: ModuleType, pack: ModuleType, combined: bool) -> None:
    """As Restore gives them: those of the first photo, then those of the next, each with its own mask."""
    ops, truth = pack.operators, picture(batch=2)
    keep = (torch.rand(2, 1, 48, 64, generator=torch.Generator().manual_seed(0)) < 0.5).double()
    measurement = measure(nodes, truth, lambda _: ops.Mask(keep), 0.02)
    if combined:
        second = measure(nodes, truth, lambda shape: ops.AreaDownscale(shape, 4), 0.02)
        with torch.inference_mode():
            measurement = nodes.measurement.CombineMeasurements.execute(measurement, second).args[0]
    results = (truth.repeat_interleave(3, 0) + 0.1 * noise_like(6, 48, 64, 3)).float()
    shown, relative, sigmas, agrees, text = consistency(nodes, results, measurement)
    alone = [consistency(nodes, results[i : i + 1], measurement.select(i // 3)) for i in range(6)]
    assert torch.equal(shown, torch.cat([one[0] for one in alone]))
    assert (relative, sigmas) == tuple(max(one[k] for one in alone) for k in (1, 2))
    assert not agrees
    lines = [f"picture {i // 3 + 1}: sample {i % 3 + 1}: {line}" for i, one in enumerate(alone) for line in one[4].split("\n")]
    assert text == "\n".join(lines)
    # Finish would make a result agree with whatever photo it takes for its own.
    with pytest.raises(ValueError, match=r"^image: got a batch of 6 for a measurement of 2; they must be equal"):
        nodes.finish.Finish.execute(results, measurement, 0.0)
