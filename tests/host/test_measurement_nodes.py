"""What the measurement nodes hand on: noise of either kind, its estimate, and combined photos."""

import re
from types import ModuleType
from typing import Any

import pytest
import torch
from support.damaged_files import bounded_memory
from support.measured import combine, gaussian, recipe, simulate, textured, three
from torch import Tensor

PEAK = 40.0


def poisson(peak: float = PEAK) -> dict[str, Any]:
    return {"noise": "Poisson", "peak": peak}


def from_photo(nodes: ModuleType, photo: Tensor, bind: Any, **noise: Any) -> Any:
    given = noise or {"noise": "estimated"}
    with torch.inference_mode():
        return nodes.measurement.MeasurementFromPhoto.execute(photo, recipe(nodes, bind), given)


def test_poisson_noise_counts_photons(nodes: ModuleType, pack: ModuleType) -> None:
    """Whole counts, whose mean and variance are both the expected count, at every brightness."""
    levels = torch.tensor([0.1, 0.4, 0.9])
    image = levels.repeat_interleave(60)[None, :, None, None].expand(1, 180, 240, 3)
    measurement = simulate(nodes, image, pack.operators.Identity, poisson()).args[0]
    counts = (measurement.y + 1) / 2 * PEAK
    assert float((counts - counts.round()).abs().max()) < 1e-9
    for level, rows in zip(levels.tolist(), counts.split(60, 2), strict=True):
        n = rows.numel()
        assert abs(float(rows.mean()) - level * PEAK) < 4 * (level * PEAK / n) ** 0.5
        assert abs(float(rows.var()) / (level * PEAK) - 1) < 4 * (2 / n) ** 0.5 + 0.02


def test_poisson_sigma_makes_the_expected_residual_exact(nodes: ModuleType, pack: ModuleType) -> None:
    """sigma^2 is the mean variance, so that ||A x - y||^2 is N sigma^2 on average: for masks and black and white, too."""
    image = textured(96)
    for bind, values in (
        (pack.operators.Identity, image),
        (lambda shape: pack.operators.Grayscale(shape, "equal"), image.mean(-1)),
    ):
        measurement = simulate(nodes, image, bind, poisson()).args[0]
        expected = float((values.double().mean() / PEAK).sqrt())
        assert measurement.sigma / 2 == pytest.approx(expected, rel=1e-6)
        x = nodes.types.to_signal("image", image)
        found = float(measurement.residual_norm(x)) / 2 / measurement.y.numel() ** 0.5
        assert found == pytest.approx(expected, rel=5 / measurement.y.numel() ** 0.5)


def test_poisson_noise_leaves_lost_pixels_alone(nodes: ModuleType, pack: ModuleType) -> None:
    """They count neither photons nor in the sigma, bright as they may be."""
    image = torch.full((1, 32, 32, 3), 0.2)
    image[:, :16] = 1.0
    keep = pack.operators.box_mask((3, 32, 32), (16, 32), (0, 0))
    out = simulate(nodes, image, lambda _: pack.operators.Mask(keep), poisson())
    assert bool((out.args[0].y[:, :, :16] == 0).all())
    assert out.args[0].sigma / 2 == pytest.approx((0.2 / PEAK) ** 0.5, rel=1e-6)
    assert re.fullmatch(
        r"simulated, noise 0\.0707, root mean square; sqrt\(v / 40\) for a value v\n50\.0% of the picture lost",
        out.ui["text"][0],
    )


@pytest.mark.parametrize("noise", [gaussian(0.1), poisson()])
def test_a_batch_is_noised_as_single_pictures_are(nodes: ModuleType, pack: ModuleType, noise: dict[str, Any]) -> None:
    image = torch.cat([textured(32, seed) for seed in range(3)])
    batch = simulate(nodes, image, pack.operators.Identity, noise, seed=7).args[0].y
    for i in range(3):
        single = simulate(nodes, image[i : i + 1], pack.operators.Identity, noise, seed=7 + i).args[0].y
        assert torch.equal(batch[i : i + 1], single)


@pytest.mark.parametrize("sigma", [0.01, 0.05, 0.1])
def test_noise_is_estimated_and_said(nodes: ModuleType, pack: ModuleType, sigma: float) -> None:
    photo = simulate(nodes, textured(160), pack.operators.Identity, gaussian(sigma)).args[1]
    out = from_photo(nodes, photo, pack.operators.Identity)
    found = out.args[0].sigma / 2
    value, low, high = map(float, re.fullmatch(r"noise (\S+) \((\S+) to (\S+)\), estimated", out.ui["text"][0]).groups())
    assert found == pytest.approx(sigma, rel=0.15)
    assert value == pytest.approx(found, abs=1e-4)
    assert low <= sigma <= high


def test_the_noise_of_a_black_and_white_photo_is_estimated(nodes: ModuleType, pack: ModuleType) -> None:
    bind = lambda shape: pack.operators.Grayscale(shape, "709")  # noqa: E731
    photo = simulate(nodes, textured(160), bind, gaussian(0.04)).args[1]
    assert from_photo(nodes, photo, bind).args[0].sigma / 2 == pytest.approx(0.04, rel=0.15)


def test_no_noise_is_estimated_as_none(nodes: ModuleType, pack: ModuleType) -> None:
    """The flattest parts of a drawn picture have what rounding leaves, 1e-17, which is no sigma to divide by."""
    photo = torch.rand((1, 128, 128, 3), generator=torch.Generator().manual_seed(0))
    photo[:, :, :48] = torch.linspace(0.2, 0.8, 48)[:, None]
    out = from_photo(nodes, photo, pack.operators.Identity)
    assert out.args[0].sigma == 0
    assert "noise 0 (below" in out.ui["text"][0]


@pytest.mark.parametrize("blurred", [False, True])
def test_the_noise_behind_a_blur_is_not_estimated_below_the_rounding_of_8_bits(
    nodes: ModuleType, pack: ModuleType, blurred: bool
) -> None:
    """Alone, and with black and white after it; without a blur, and in a picture that nobody rounded, it is as read."""
    kernel = pack.operators.gaussian_kernel(2.0)
    blur = lambda shape: pack.operators.Blur(kernel, shape, "reflect")  # noqa: E731
    grey = lambda shape: pack.operators.Grayscale(shape, "709") @ blur(shape)  # noqa: E731
    photo = (simulate(nodes, textured(160), blur, gaussian(0.0)).args[1] * 255).round() / 255
    monochrome = (photo.mean(-1, keepdim=True).expand_as(photo) * 255).round() / 255
    for bind, given in ((blur, photo), (grey, monochrome)):
        out = from_photo(nodes, given, bind if blurred else pack.operators.Identity)
        sigma, text = out.args[0].sigma / 2, out.ui["text"][0]
        assert (sigma == 0.002) == ("0.002 is taken, for the rounding of 8 bits behind a blur" in text) == blurred
        assert blurred or sigma < 0.002
    grain = 1e-3 * torch.rand(photo.shape, generator=torch.Generator().manual_seed(0))
    assert "is taken" not in from_photo(nodes, photo + grain, blur).ui["text"][0]


@pytest.mark.parametrize("inverted", [False, True])
def test_how_much_is_lost_is_said(nodes: ModuleType, pack: ModuleType, inverted: bool) -> None:
    hole = lambda shape: pack.operators.Mask(pack.operators.box_mask(shape, (16, 40), invert=inverted))  # noqa: E731
    text = from_photo(nodes, textured(80), hole, noise="entered", sigma=0.0).ui["text"][0]
    hint = "; if a mask marks the pixels to keep, invert it"
    assert text == "noise 0\n" + (f"90.0% of the picture lost{hint}" if inverted else "10.0% of the picture lost")
    # In a batch the other way round in one picture only.
    keep = torch.cat([pack.operators.box_mask((3, 80, 80), (16, 40), invert=other) for other in (inverted, not inverted)])
    text = from_photo(nodes, textured(80).repeat(2, 1, 1, 1), lambda _: pack.operators.Mask(keep), noise="entered", sigma=0.0)
    said = ["10.0% of the picture lost", f"90.0% of the picture lost{hint}"]
    expected = [f"picture {i + 1}: {line}" for i, line in enumerate(said[::-1] if inverted else said)]
    assert text.ui["text"][0].split("\n") == ["noise 0", *expected]
    # Or one whose mask marks nothing.
    keep = torch.cat([pack.operators.box_mask((3, 80, 80), (16, 40)), torch.ones(1, 1, 80, 80)])
    text = from_photo(nodes, textured(80).repeat(2, 1, 1, 1), lambda _: pack.operators.Mask(keep), noise="entered", sigma=0.0)
    assert text.ui["text"][0].split("\n") == [
        "noise 0",
        "picture 1: 10.0% of the picture lost",
        "picture 2: nothing of the picture lost",
    ]


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.0, "mask: marks no pixel. Paint"), (127 / 255, "largest value, 0.498, is below the threshold, 0.5; lower")],
)
def test_a_mask_below_its_threshold_is_not_called_empty(nodes: ModuleType, value: float, said: str) -> None:
    mask = torch.full((1, 8, 8), value)
    given = {"pattern": "mask", "mask": mask, "threshold": 0.5}
    with pytest.raises(ValueError, match=re.escape(said)):
        nodes.operators.missing.MissingPixels.execute(given)


def test_a_photo_that_only_a_wild_picture_would_meet_is_refused(nodes: ModuleType, pack: ModuleType) -> None:
    photo = torch.rand((1, 64, 64, 3), generator=torch.Generator().manual_seed(0))
    bind = lambda shape: pack.operators.Blur(pack.operators.gaussian_kernel(3.0), shape, "circular")  # noqa: E731
    measurement = from_photo(nodes, photo, bind, noise="entered", sigma=1e-5).args[0]
    with pytest.raises(ValueError, match=r"^measurement: .*values of up to .*larger sigma"):
        nodes.finish.finish(nodes.types.to_signal("photo", photo), measurement)


def test_a_photo_brighter_than_white_is_finished(nodes: ModuleType, pack: ModuleType) -> None:
    photo = torch.rand((1, 16, 16, 3), generator=torch.Generator().manual_seed(0))
    photo[0, 3, 4] = 39.0
    for sigma in (0.0, 0.01):
        measurement = from_photo(nodes, photo, pack.operators.Identity, noise="entered", sigma=sigma).args[0]
        finished, _, _ = nodes.finish.finish(nodes.types.to_signal("photo", photo), measurement)
        assert torch.allclose(finished, photo, atol=1e-5)


def test_an_estimate_that_cannot_be_had_is_refused(nodes: ModuleType, pack: ModuleType) -> None:
    photo = simulate(nodes, textured(160), pack.operators.Identity, gaussian(0.05)).args[1]
    with pytest.raises(ValueError, match=r"photo: .*exactly constant.*set noise to entered and give sigma"):
        from_photo(nodes, torch.full((1, 96, 96, 3), 0.5), pack.operators.Identity)
    lost = lambda shape: pack.operators.Mask(pack.operators.random_mask(shape, 0.2, seed=0))  # noqa: E731
    with pytest.raises(ValueError, match=r"noise: cannot be estimated, lost pixels are in 100% of the photo's blocks"):
        from_photo(nodes, photo, lost)
    other = simulate(nodes, textured(160), pack.operators.Identity, gaussian(0.15)).args[1]
    with pytest.raises(ValueError, match=r"photo: the photos of the batch differ in noise \(0\.0\d+ to 0\.1\d+\)"):
        from_photo(nodes, torch.cat([photo, other]), pack.operators.Identity)
    grain = torch.rand((1, 3, 80, 80), generator=torch.Generator().manual_seed(0))
    coloured = torch.nn.functional.interpolate(grain, scale_factor=2, mode="bilinear") * 0.6 + 0.2
    with pytest.raises(ValueError, match=r"photo: its noise is between \S+ and \S+ and cannot be told from its texture"):
        from_photo(nodes, coloured.movedim(1, -1), pack.operators.Identity)


def test_a_small_hole_does_not_hinder_the_estimate(nodes: ModuleType, pack: ModuleType) -> None:
    hole = lambda shape: pack.operators.Mask(pack.operators.box_mask(shape, (40, 40), (60, 60)))  # noqa: E731
    photo = simulate(nodes, textured(160), hole, gaussian(0.05)).args[1]
    assert from_photo(nodes, photo, hole).args[0].sigma / 2 == pytest.approx(0.05, rel=0.15)


def test_what_was_painted_over_is_not_taken_for_a_photo_without_noise(nodes: ModuleType, pack: ModuleType) -> None:
    """A quarter is a smooth gradient now, and marked as lost."""
    photo = simulate(nodes, textured(160), pack.operators.Identity, gaussian(0.05)).args[1].clone()
    photo[:, :80, :80] = torch.linspace(0.3, 0.6, 80)[:, None, None]
    hole = lambda shape: pack.operators.Mask(pack.operators.box_mask(shape, (80, 80), (0, 0)))  # noqa: E731
    assert from_photo(nodes, photo, hole).args[0].sigma / 2 == pytest.approx(0.05, rel=0.15)
    assert from_photo(nodes, photo, pack.operators.Identity).args[0].sigma / 2 < 0.01  # unmarked it fools the estimate


def test_simulated_noise_is_not_what_a_sampler_with_the_same_seed_starts_from(nodes: ModuleType, pack: ModuleType) -> None:
    """The start would know the noise in y."""
    import comfy.sample

    image = torch.full((2, 32, 32, 3), 0.5)
    for seed in (0, 7):
        noise = simulate(nodes, image, pack.operators.Identity, gaussian(0.1), seed).args[0].y / 0.2
        with torch.inference_mode():
            starts = [comfy.sample.prepare_noise(torch.zeros(1, 3, 32, 32), seed + i) for i in (0, 1)]
        for one in noise.float():
            for start in starts:
                assert abs(float((one * start[0]).mean())) < 4 / one.numel() ** 0.5


def test_masks_for_another_number_of_pictures_are_refused(nodes: ModuleType, pack: ModuleType) -> None:
    three_masks = lambda shape: pack.operators.Mask((torch.arange(3 * 1024).reshape(3, 1, 32, 32) % 5 > 0).double())  # noqa: E731
    photo = torch.full((2, 32, 32, 3), 0.5)
    with pytest.raises(ValueError, match="operator: has masks for 3 pictures, but photo is a batch of 2; give one mask"):
        from_photo(nodes, photo, three_masks, noise="entered", sigma=0.0)
    with pytest.raises(ValueError, match="operator: has masks for 3 pictures, but image is a batch of 1; give one mask"):
        simulate(nodes, photo[:1], three_masks, gaussian(0.0))


@pytest.mark.parametrize(("channels", "alpha"), [(1, 1.0), (3, 1.0), (4, 1.0), (4, 0.99)])
def test_a_picture_of_the_blur_may_be_grey_but_not_transparent(nodes: ModuleType, channels: int, alpha: float) -> None:
    point = torch.zeros(1, 9, 9, channels)
    point[:, 4, 4] = 1.0
    if channels == 4:
        point[..., 3] = 1.0
        point[0, 0, 0, 3] = alpha
    if alpha < 1:
        with pytest.raises(ValueError, match="image: is transparent in places"):
            nodes.operators.blur.BlurOperator.execute({"kernel": "image", "image": point}, "reflect")
    else:
        recipe = nodes.operators.blur.BlurOperator.execute({"kernel": "image", "image": point}, "reflect").args[0]
        x = torch.rand(1, 3, 16, 16, dtype=torch.float64)
        torch.testing.assert_close(recipe.on((3, 16, 16), "").A(x), x)


@pytest.mark.parametrize("order", [(0, 1), (2, 0), (0, 1, 2), (2, 2, 1, 0)])
def test_combined_measurements_come_apart_again(nodes: ModuleType, pack: ModuleType, order: tuple[int, ...]) -> None:
    image = torch.cat([textured(32, seed) for seed in range(2)])
    parts = [three(nodes, pack, image)[i] for i in order]
    found = nodes.measurement.single(combine(nodes, *parts))
    assert len(found) == len(parts)
    x = nodes.types.to_signal("image", image)
    for got, part in zip(found, parts, strict=True):
        assert torch.allclose(got.y, part.y, rtol=0, atol=1e-14)
        assert torch.allclose(got.operator.A(x), part.operator.A(x), rtol=0, atol=1e-14)
        assert got.sigma == pytest.approx(part.sigma, rel=1e-14)


@pytest.mark.parametrize("sigma", [0.0, 0.0005, 0.001])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("operator", ["Blur", "Mask"])
def test_a_little_noise_but_less_than_8_bits_round_away_is_refused_behind_a_blur(
    nodes: ModuleType, pack: ModuleType, sigma: float, bits: int, operator: str
) -> None:
    ops = pack.operators
    bind = {
        "Blur": lambda shape: ops.BicubicDownscale(shape, 2) @ ops.Blur(ops.gaussian_kernel(2.0), shape, "reflect"),
        "Mask": lambda shape: ops.Mask(ops.box_mask(shape, (4, 4), (2, 2))),
    }[operator]
    levels = 2**bits - 1
    photo = (textured(32) * levels).round() / levels
    taken = nodes.types.OperatorRecipe("test", bind, lambda shape: (3, 64, 64) if operator == "Blur" else shape)
    given = {"noise": "entered", "sigma": sigma}
    with torch.inference_mode():
        if operator == "Blur" and bits == 8 and 0 < sigma < 0.001:  # 0 is for Finish and Restore to judge
            with pytest.raises(ValueError, match=r"^sigma: got 0.0005, less than .* 8 bits round away.*Set 0.002 or more"):
                nodes.measurement.MeasurementFromPhoto.execute(photo, taken, given)
        else:
            out = nodes.measurement.MeasurementFromPhoto.execute(photo, taken, given)
            assert out.args[0].sigma == 2 * sigma


def test_finish_reads_combined_photos_each_in_its_own_units(nodes: ModuleType, pack: ModuleType) -> None:
    image = textured(32)
    parts = three(nodes, pack, image)[:2]
    with torch.inference_mode():
        finished, residual, text = nodes.finish.finish(nodes.types.to_signal("image", image), combine(nodes, *parts))
    x = [nodes.types.to_signal("image", v) for v in (image, finished)]
    rms = [[float((part.operator.A(v) - part.y).square().mean().sqrt()) / 2 for v in x] for part in parts]
    noise = (0.02, 0.05)
    expected = [f"photo {k + 1}: |A x - y| {rms[k][0]:.1e} -> {rms[k][1]:.1e} (noise {noise[k]:.3g})" for k in (0, 1)]
    assert text.split("\n") == expected
    assert residual == pytest.approx(max(after for _, after in rms), rel=1e-9)


@pytest.mark.parametrize("sigma", [0.0, 0.01])
def test_photos_of_two_pictures_cannot_both_be_met(nodes: ModuleType, pack: ModuleType, sigma: float) -> None:
    """Each alone can be; a small photo of the same picture, but with the light turned up, contradicts the large one."""
    image, brighter = textured(32), (textured(32) + 0.1).clamp(0, 1)
    small = simulate(nodes, brighter, lambda shape: pack.operators.AreaDownscale(shape, 4), gaussian(sigma)).args[0]
    whole = simulate(nodes, image, pack.operators.Identity, gaussian(sigma)).args[0]
    with torch.inference_mode():
        consistency = nodes.readouts.Consistency.execute
        alone, both = consistency(image, small, 10.0), consistency(image, combine(nodes, whole, small), 10.0)
    assert "It can be met" in alone.ui["text"][0]
    first, second = both.ui["text"][0].split("\n")
    assert "photo 1" in first
    assert "agrees" in first
    assert "The best compromise between the photos leaves" in second
    assert not both.args[3]


@pytest.mark.parametrize(
    ("side", "method"), [(512, {"method": "area", "factor": 64}), (1024, {"method": "bicubic", "factor": 16.0})]
)
def test_a_factor_too_large_for_the_photo_is_refused(nodes: ModuleType, side: int, method: dict[str, Any]) -> None:
    operator = nodes.operators.downscale.Downscale.execute(method).args[0]
    full = side * int(method["factor"])
    message = f"^operator: asks for a full picture of {full} x {full}, expected .*; lower the factor .*{side} x {side}"
    with bounded_memory(), torch.inference_mode(), pytest.raises(ValueError, match=message):
        nodes.measurement.MeasurementFromPhoto.execute(
            torch.zeros(1, side, side, 3), operator, {"noise": "entered", "sigma": 0.0}
        )


def test_a_picture_too_long_for_any_operator_is_refused(nodes: ModuleType, pack: ModuleType) -> None:
    with bounded_memory(), pytest.raises(ValueError, match=r"^operator: asks for .* 100000 x 1, .*; use a smaller image"):
        simulate(nodes, torch.zeros(1, 1, 100_000, 3), lambda shape: pack.operators.BicubicDownscale(shape, 1.0), gaussian(0.0))


@pytest.mark.parametrize(("radius", "vague"), [(44, True), (2000, False)])
def test_an_edge_that_says_little_of_the_blur_is_said(nodes: ModuleType, radius: float, vague: bool) -> None:
    """That of a small disk is no straight one: between 1.07 and 3.92 pixels, for 2."""
    t = torch.arange(40, dtype=torch.float64) - 19.5
    outside = torch.hypot(t + radius, t[:, None]) - radius
    edge = 0.5 + 0.25 * torch.special.erf(outside / (2 * 2**0.5))
    with torch.inference_mode():
        out = nodes.calibration.EstimateBlur.execute(edge[None, ..., None].expand(-1, -1, -1, 3).float(), "edge")
    assert out.args[1] == pytest.approx(2, rel=0.3)
    assert ("this edge says little" in out.ui["text"][0]) == vague
