"""What was measured, and making a picture agree with it."""

import pytest
import torch

from operators import AreaDownscale, Blur, Dense, Identity, Mask, Measurement, Scale, Stack, gaussian_kernel
from samplers import enforce_consistency, expected_error, feather_holes, measured


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def photo(size: int) -> torch.Tensor:
    """A smooth picture with edges, in [-1, 1]."""
    v = torch.linspace(-3, 3, size, dtype=torch.float64)
    return (0.7 * torch.sin(v[:, None] * v) + 0.2 * (v[:, None] > v).double())[None, None].expand(1, 3, -1, -1).contiguous()


@pytest.mark.parametrize("width", [1.5, 3.0])
def test_rounding_is_not_amplified_by_a_blur(width: float) -> None:
    """A real photo has 8 bits. Finish refuses to be exact, and with a sigma does no harm."""
    truth = photo(64)
    operator = Blur(gaussian_kernel(width), (3, 64, 64), "reflect")
    y = ((operator.A(truth) + 1) / 2 * 255).round() / 255 * 2 - 1
    guess = truth + 0.05 * uniform(1, 3, 64, 64)
    with pytest.raises(ValueError, match=r"measurement: .*amplifies rounding.*sigma above 0"):
        enforce_consistency(guess, Measurement(y, operator), error=0.1)
    out = enforce_consistency(guess, Measurement(y, operator, sigma=0.004), error=0.1)
    assert float((out - truth).square().mean()) < float((guess - truth).square().mean())


def test_unrounded_blur_is_met_exactly() -> None:
    truth = photo(64)
    operator = Blur(gaussian_kernel(1.5), (3, 64, 64), "reflect")
    guess = truth + 0.05 * uniform(1, 3, 64, 64)
    out = enforce_consistency(guess, Measurement(operator.A(truth), operator), error=0.1)
    torch.testing.assert_close(operator.A(out), operator.A(truth), rtol=0, atol=1e-6)


def test_noise_free_is_exact_and_nearest() -> None:
    for operator in (AreaDownscale((3, 9, 7), 4), Mask(uniform(1, 1, 9, 7) < 0)):
        x, y = 0.3 * uniform(1, 3, 9, 7, seed=1), operator.A(0.3 * uniform(1, 3, 9, 7, seed=2))
        out = enforce_consistency(x, Measurement(y, operator), error=0.1)
        torch.testing.assert_close(operator.A(out), y, rtol=0, atol=1e-12)
        # Nearest: the change is orthogonal to everything A does not see.
        change = out - x
        torch.testing.assert_close(operator.project(change), change, rtol=0, atol=1e-12)


def test_kept_float32_pixels_come_back_bit_exact() -> None:
    photo = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3)) * 0.3  # small values are the hard ones
    keep = uniform(1, 1, 64, 64) < 0.2
    operator = Mask(keep)
    y = operator.A(photo.double() * 2 - 1)
    out = enforce_consistency(uniform(1, 3, 64, 64, seed=2), Measurement(y, operator), error=0.1)
    assert torch.equal(((out + 1) / 2).float()[keep.expand_as(out)], photo[keep.expand_as(out)])


def test_range_is_kept_where_it_can_be() -> None:
    """Blocks near white: the plain projection overshoots 1 by far, alternating projections hardly."""
    operator = AreaDownscale((1, 16, 16), 4)
    truth = uniform(1, 1, 16, 16).abs().clamp(max=0.99)
    x, y = uniform(1, 1, 16, 16, seed=4), operator.A(truth)
    plain = x + operator.A_dagger(y - operator.A(x))
    out = enforce_consistency(x, Measurement(y, operator), error=0.1)
    torch.testing.assert_close(operator.A(out), y, rtol=0, atol=1e-12)
    assert float(plain.abs().max()) > 1.3
    assert float(out.abs().max()) < 1.01


def test_noisy_is_the_posterior_mean() -> None:
    x, y = uniform(1, 3, 4, 4), uniform(1, 3, 4, 4, seed=1)
    out = enforce_consistency(x, Measurement(y, Identity((3, 4, 4)), sigma=0.2), error=0.1)
    torch.testing.assert_close(out, (x / 0.1**2 + y / 0.2**2) / (1 / 0.1**2 + 1 / 0.2**2))


@pytest.mark.parametrize("task", ["identity", "masks", "area"])
def test_the_error_is_read_from_the_residual(task: str) -> None:
    """Of pictures that are off by white errors of one to three times what the photo's noise is in them, each by another."""
    shape = (3, 64, 64)
    operator = {
        "identity": Identity(shape),
        "masks": Mask((torch.rand(3, 1, 64, 64, generator=torch.Generator().manual_seed(5)) < 0.4).double()),
        "area": AreaDownscale(shape, 4),
    }[task]
    g = torch.Generator().manual_seed(0)
    truth, sigma = uniform(3, *shape), 0.02
    y = operator.A(truth)
    y = y + sigma * measured(operator, y) * torch.randn(y.shape, generator=g, dtype=torch.float64)
    gain = 4 if task == "area" else 1  # a block's mean has a fourth of the errors of its 4 x 4 pixels
    errors = gain * sigma * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    x = truth + errors[:, None, None, None] * torch.randn(truth.shape, generator=g, dtype=torch.float64)
    measurement = Measurement(y, operator, sigma)
    found = expected_error(x, measurement)
    torch.testing.assert_close(found, errors, rtol=0.12, atol=0)
    out = enforce_consistency(x, measurement)
    for i in range(3):
        one = enforce_consistency(x[i : i + 1], measurement.select(i), min(float(found[i]), 0.1))
        torch.testing.assert_close(out[i : i + 1], one, rtol=0, atol=1e-12)
    assert bool(((out - truth).square().mean((1, 2, 3)) < (x - truth).square().mean((1, 2, 3))).all())
    assert torch.equal(enforce_consistency(truth, Measurement(y, operator, 2 * sigma)), truth)  # within the noise


@pytest.mark.parametrize(("width", "offset"), [(5.0, 0.1), (3.0, 0.05), (3.0, 0.02)])
def test_errors_that_a_blur_lets_through_do_not_count_as_white_ones(width: float, offset: float) -> None:
    """A picture that is too dark throughout: as white noise behind a blur that would be ten times as much, and undo the blur."""
    shape = (3, 64, 64)
    operator = Blur(gaussian_kernel(width, 31), shape, "circular")
    truth = operator.A(uniform(1, *shape))  # smooth, as pictures are
    y = operator.A(truth)
    y = y + 0.004 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    measurement = Measurement(y, operator, 0.004)
    assert float(expected_error(truth - offset, measurement)) > 2 * offset
    out = enforce_consistency(truth - offset, measurement)
    assert float((out - truth).square().mean().sqrt()) < 0.012
    assert float(measurement.residual_norm(out)) <= 1.05 * 0.004 * y.numel() ** 0.5


def test_more_than_was_read_where_that_does_not_suffice() -> None:
    """What is missing lies where the operator shows little of it: what is read from the mean over all directions is too little."""
    operator = Dense(torch.diag(torch.tensor([1.0] * 40 + [0.1] * 8, dtype=torch.float64)), (3, 4, 4), (3, 4, 4))
    truth, g = uniform(1, 3, 4, 4), torch.Generator().manual_seed(0)
    miss = torch.zeros(48, dtype=torch.float64)
    miss[40:] = 0.3
    y = operator.A(truth) + 0.01 * torch.randn(1, 3, 4, 4, generator=g, dtype=torch.float64)
    measurement, goal = Measurement(y, operator, 0.01), 0.01 * 48**0.5
    x = truth - miss.reshape(1, 3, 4, 4)
    read = float(expected_error(x, measurement))
    assert float(measurement.residual_norm(enforce_consistency(x, measurement, read))) > goal
    out = enforce_consistency(x, measurement)
    assert float(measurement.residual_norm(out)) <= goal or torch.equal(out, enforce_consistency(x, measurement, 0.1))
    assert float(measurement.residual_norm(out)) < float(measurement.residual_norm(enforce_consistency(x, measurement, read)))


def burst(size: int, sigma: float) -> tuple[torch.Tensor, list[Measurement], Measurement]:
    """A picture, two noisy photos of it, and both as one measurement."""
    truth, operator = photo(size), Identity((3, size, size))
    g = torch.Generator().manual_seed(0)
    parts = [
        Measurement(truth + sigma * torch.randn(truth.shape, generator=g, dtype=torch.float64), operator, sigma)
        for _ in range(2)
    ]
    stack = Stack([part.operator for part in parts])
    return truth, parts, Measurement(stack.join([part.y for part in parts]), stack, sigma)


def test_the_grain_of_several_photos_stays_out() -> None:
    truth, parts, both = burst(64, 0.2)
    out = enforce_consistency(truth, both, photos=parts)
    assert float((out - truth).square().mean().sqrt()) < 0.02
    assert float((enforce_consistency(truth, both, 0.1) - truth).square().mean().sqrt()) > 0.04  # what it is told to do


def test_each_of_several_photos_has_to_agree() -> None:
    """Off in the right half, which one photo shows: over both photos that is hardly more than their noise."""
    truth, sigma, g = photo(64), 0.05, torch.Generator().manual_seed(0)
    left = torch.zeros(1, 1, 64, 64, dtype=torch.float64)
    left[..., :48] = 1
    parts = []
    for keep in (left, 1 - left):
        operator = Mask(keep)
        noise = sigma * keep * torch.randn(truth.shape, generator=g, dtype=torch.float64)
        parts.append(Measurement(operator.A(truth) + noise, operator, sigma))
    stack = Stack([part.operator for part in parts])
    both = Measurement(stack.join([part.y for part in parts]), stack, sigma)
    x = torch.cat([truth, truth + 0.03 * (1 - left)])

    def times(image: torch.Tensor, part: Measurement) -> torch.Tensor:
        return part.residual_norm(image) / sigma / measured(part.operator, part.y).sum().sqrt()

    assert float(times(x, parts[1])[1]) > 1.1
    out = enforce_consistency(x, both, photos=parts)
    assert bool((torch.stack([times(out, part) for part in parts]) <= 1).all())
    torch.testing.assert_close(enforce_consistency(x[1:], both, photos=parts), out[1:], rtol=0, atol=0)
    # By the two together it is as near as it should be.
    assert float(times(enforce_consistency(x[1:], both), parts[1])) > 1


# Feathering ---------------------------------------------------------------------------------------------------------------


def test_feather_fades_the_change_into_the_hole_and_keeps_kept_pixels() -> None:
    """A picture that is 0.2 too dark beside the photo: the step at the hole's edge goes, the middle of the hole stays."""
    keep = torch.ones(1, 1, 40, 40, dtype=torch.float64)
    keep[..., 8:32, 8:32] = 0
    truth = torch.rand(2, 3, 40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = truth - 0.2
    agreed = torch.where(keep > 0, truth, x)
    out = feather_holes(x, agreed, keep, 2.0)
    assert torch.equal(out * keep, agreed * keep)
    torch.testing.assert_close(out[..., 20, 20], x[..., 20, 20], rtol=0, atol=1e-3)
    step = (out - truth)[..., 20, 8:32]  # 0 would be seamless, -0.2 is the hard edge
    assert float(step[..., 0].abs().max()) < 0.05
    assert bool((step[..., :12].diff(dim=-1) <= 1e-9).all())  # fades evenly


def test_feather_changes_nothing_where_nothing_was_corrected() -> None:
    keep = (torch.rand(1, 1, 20, 20, generator=torch.Generator().manual_seed(1)) < 0.5).double()
    x = torch.rand(1, 3, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(feather_holes(x, x, keep, 3.0), x)


def test_several_pictures_of_one_photo_each_agree() -> None:
    operator = AreaDownscale((3, 12, 8), 4)
    truth = torch.rand(1, 3, 12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5
    x = torch.rand(3, 3, 12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 0.5
    for sigma in (0.0, 0.1):
        together = enforce_consistency(x, Measurement(operator.A(truth), operator, sigma), 0.1)
        for i in range(3):
            one = enforce_consistency(x[i : i + 1], Measurement(operator.A(truth), operator, sigma), 0.1)
            torch.testing.assert_close(together[i : i + 1], one, rtol=0, atol=1e-12)


# What is measured -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_measured_are_the_rows_that_are_not_zero(precision: torch.dtype) -> None:
    keep = uniform(2, 1, 7, 5) < 0
    y = torch.zeros(2, 3, 7, 5, dtype=precision)
    assert torch.equal(measured(Mask(keep), y), keep.expand_as(y).to(precision))
    # Two rows that sum to zero, and one that is zero.
    matrix = torch.tensor([[1.0, -1, 0, 0], [0, 0, 0, 0], [0.5, 0, -1, 0.5]], dtype=torch.float64)
    found = measured(Dense(matrix, (1, 2, 2), (1, 1, 3)), torch.zeros(1, 1, 1, 3, dtype=precision))
    assert found.flatten().tolist() == [1, 0, 1]


def test_measured_counts_what_a_noisy_photo_of_several_adds() -> None:
    """Scaled to the noise of the better photo the other one's rows are small, but not zero; an FFT's rounding is."""
    mask = Mask(uniform(1, 1, 32, 32) < 0.5)
    blurred = mask @ Blur(gaussian_kernel(1.0), (3, 32, 32), "circular")
    stack = Stack([Identity((3, 32, 32)), Scale((3, 32, 32), 1e-3) @ blurred])
    y = torch.zeros(1, *stack.out_shape)
    assert int(measured(stack, y).sum()) == 3 * 32 * 32 + 3 * int(mask.keep.sum())
