"""What a run starts from: the filled photo, and the noise level that its largest hole, found by counting too, asks for."""

import pytest
import torch
from torch import Tensor

from operators import (
    AreaDownscale,
    BicubicDownscale,
    Blur,
    Grayscale,
    Identity,
    LinearOperator,
    Mask,
    Measurement,
    Scale,
    Stack,
    box_mask,
    gaussian_kernel,
    motion_kernel,
    random_mask,
    stripe_mask,
)
from samplers import fill_unseen, largest_hole, start_level

SHAPE = (3, 40, 56)


def blank(operator: LinearOperator, batch: int = 1) -> Measurement:
    return Measurement(torch.zeros(batch, *operator.out_shape, dtype=torch.float64), operator, 0.1)


def counted(keep: Tensor) -> int:
    """The same, window by window. keep: (B, 1, H, W)"""
    sides = range(1, min(keep.shape[2:]) + 1)
    lost = [
        s for s in sides if any(bool((window == 0).all()) for window in keep.unfold(2, s, 1).unfold(3, s, 1).reshape(-1, s * s))
    ]
    return max(lost, default=0)


@pytest.mark.parametrize("share", [0.1, 0.6, 0.9, 0.99])
def test_the_largest_window_without_a_kept_pixel(share: float) -> None:
    keep = (torch.rand(2, 1, *SHAPE[1:], generator=torch.Generator().manual_seed(3)) > share).double()
    assert largest_hole(blank(Mask(keep.expand(-1, 3, -1, -1)), 2)) == counted(keep) > 0


@pytest.mark.parametrize(
    ("operator", "side"),
    [
        (Identity(SHAPE), 0),
        (AreaDownscale(SHAPE, 8), 0),
        (BicubicDownscale((3, 40, 64), 8), 0),
        (Blur(gaussian_kernel(3.0), SHAPE, "reflect"), 0),
        (Grayscale(SHAPE), 0),
        (Mask(box_mask(SHAPE, (17, 20), (0, 30))), 17),
        (Mask(stripe_mask(SHAPE, 10, 4)), 4),
        # Lost pixels of the small photo are holes of factor times their size; those of a sharp one a blur reads around.
        (Mask(box_mask((3, 10, 14), (3, 4), (2, 2))) @ AreaDownscale(SHAPE, 4), 12),
        (Blur(gaussian_kernel(1.0), SHAPE, "reflect") @ Mask(box_mask(SHAPE, (9, 9), (8, 8))), 9),
    ],
    ids=str,
)
def test_the_largest_hole_of_an_operator(operator: LinearOperator, side: int) -> None:
    assert largest_hole(blank(operator)) == side


def test_a_pixel_with_one_colour_left_is_no_hole() -> None:
    keep = torch.ones(1, *SHAPE)
    keep[:, 1:, 4:20, 4:20] = 0
    assert largest_hole(blank(Mask(keep))) == 0
    keep[:, :, 4:9, 4:9] = 0
    assert largest_hole(blank(Mask(keep))) == 5


@pytest.mark.parametrize("factor", [8, 16, 32])
def test_what_another_photo_shows_is_no_hole(factor: int) -> None:
    """A block mean's weights are small beside a kept pixel's."""
    shape = (3, 64, 64)
    both = Stack([Mask(box_mask(shape, (40, 40), (8, 8))), AreaDownscale(shape, factor)])
    assert largest_hole(blank(both)) == 0


def test_the_level_is_in_proportion_to_the_hole() -> None:
    """And never below that of a photo without holes."""
    photo = start_level(blank(Identity((3, 128, 128))), 8)
    levels = {side: start_level(blank(Mask(box_mask((3, 128, 128), (side, side), (8, 8)))), 8) for side in (8, 24, 96)}
    assert levels == pytest.approx({8: photo, 24: photo, 96: 4 * photo})
    on_pixels = blank(Mask(box_mask((3, 32, 32), (12, 12), (8, 8))))
    assert start_level(on_pixels, 1) == pytest.approx(4 * photo)


# The filled photo -----------------------------------------------------------------------------------------------------------


def photo(h: int, w: int) -> Tensor:
    """(1, 3, h, w), a smooth picture with an edge, in [-1, 1]."""
    row, column = torch.linspace(-2, 2, h, dtype=torch.float64)[:, None], torch.linspace(-2, 2, w, dtype=torch.float64)
    bands = [0.6 * torch.sin(row * column + phase) + 0.3 * (column > row).double() for phase in (0.0, 0.5, 1.0)]
    return torch.stack(bands)[None]


def observed(operator: LinearOperator, x: Tensor, sigma: float) -> Measurement:
    """A lost pixel stays 0."""
    noise = torch.randn(len(x), *operator.in_shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    lone = torch.randn(len(x), *operator.out_shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return Measurement(operator.A(x) + sigma * (operator.A(noise) if isinstance(operator, Mask) else lone), operator, sigma)


def even(measurement: Measurement) -> Tensor:
    """The picture nearest to an even one that agrees, which a fill without a notion of pictures gives."""
    operator, y, sigma = measurement.operator, measurement.y, max(measurement.sigma, 0.002)
    total, weight = (operator.A_adjoint(v).sum((2, 3), keepdim=True) for v in (y, operator.A(torch.ones_like(photo(64, 48)))))
    mean = total / torch.where(weight == 0, 1, weight)
    return operator.prox_l2(mean.expand(1, *operator.in_shape).contiguous(), y, 1 / sigma**2)


WIDE = (3, 64, 48)


@pytest.mark.parametrize("sigma", [0.01, 0.1])
@pytest.mark.parametrize(
    ("operator", "share"),
    [
        (Mask(box_mask(WIDE, (20, 24))), 0.7),
        (Mask(random_mask(WIDE, 0.8)), 0.5),
        (Mask(random_mask(WIDE, 0.8, per_channel=True)), 0.5),
        (Mask(stripe_mask(WIDE, 12, 5)), 0.5),
        (Grayscale(WIDE) @ Mask(random_mask(WIDE, 0.8)), 0.9),
        (AreaDownscale(WIDE, 8), 1.0),
        (BicubicDownscale(WIDE, 4), 0.9),
        (Mask(random_mask((3, 16, 12), 0.5)) @ BicubicDownscale(WIDE, 4), 0.9),
        (Mask(random_mask(WIDE, 0.8)) @ Blur(gaussian_kernel(2.0), WIDE, "reflect"), 0.9),
        (Stack([Mask(box_mask(WIDE, (40, 40), (2, 2))), AreaDownscale(WIDE, 8)]), 1.0),
        (Blur(motion_kernel(9.0, 30.0), WIDE, "circular"), 0.9),
        (Identity(WIDE), 1.0),
    ],
    ids=str,
)
def test_the_filled_photo_is_nearer_to_the_truth_than_an_even_fill(
    operator: LinearOperator, share: float, sigma: float
) -> None:
    truth = photo(64, 48)
    measurement = observed(operator, truth, sigma)
    error, simple = (float((fill(measurement) - truth).square().mean().sqrt()) for fill in (fill_unseen, even))
    assert error < share * simple + 1e-3


@pytest.mark.parametrize("shape", [(3, 33, 17), (3, 8, 1), (3, 1, 1), (3, 2, 64)], ids=str)
def test_the_filled_photo_agrees_with_the_measurement_at_any_size(shape: tuple[int, int, int]) -> None:
    keep = torch.rand(2, 1, *shape[1:], generator=torch.Generator().manual_seed(1)) < 0.6
    keep[..., 0, 0] = True
    y = Mask(keep).A(torch.rand(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    filled = fill_unseen(Measurement(y, Mask(keep)))
    wide = keep.expand_as(y)
    torch.testing.assert_close(filled[wide], y[wide], rtol=0, atol=1e-5)  # up to the rounding of 8 bits, squared
    assert float(filled.abs().max()) <= 1 + 1e-5
    for i in range(2):
        alone = fill_unseen(Measurement(y[i : i + 1], Mask(keep[i : i + 1])))
        torch.testing.assert_close(filled[i : i + 1], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sigma", [0.0, 0.01])
def test_the_filled_photo_in_other_precisions(dtype: torch.dtype, sigma: float) -> None:
    """1 / sigma^2 of an 8-bit photo is beyond float16."""
    measurement = observed(Mask(random_mask(WIDE, 0.5)), photo(64, 48), sigma)
    filled = fill_unseen(Measurement(measurement.y.to(dtype), measurement.operator, sigma))
    assert filled.dtype == dtype
    torch.testing.assert_close(filled.double(), fill_unseen(measurement), rtol=0, atol=0.02)


@pytest.mark.parametrize("sigma", [0.1, 0.4])
def test_two_pixels_in_closed_form(sigma: float) -> None:
    """1 x 2 pixels, one lost: the pair's mean is what the other one says, and the lost one that mean."""
    mask = Mask(torch.tensor([[[[1.0, 0.0]]]]))
    filled = fill_unseen(
        Measurement(torch.tensor([0.6, 0.0], dtype=torch.float64).expand(1, 3, 1, 2).contiguous(), mask, sigma)
    )
    torch.testing.assert_close(filled, torch.full((1, 3, 1, 2), 0.6, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sigma", [0.1, 0.4])
def test_two_noisy_pixels_in_closed_form(sigma: float) -> None:
    """Either keeps the share d^2 / (d^2 + sigma^2) of how far it is from their mean; then the photo counts again, against .3."""
    y = torch.tensor([0.6, -0.2], dtype=torch.float64).reshape(1, 1, 1, 2).expand(1, 3, 1, 2).contiguous()
    share, again = 0.1**2 / (0.1**2 + sigma**2), 0.3**2 / (0.3**2 + sigma**2)
    smooth = 0.2 + share * (y - 0.2)
    torch.testing.assert_close(
        fill_unseen(Measurement(y, Identity((3, 1, 2)), sigma)), smooth + again * (y - smooth), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("side", [2, 3])
def test_the_filled_photo_prefers_no_direction(side: int) -> None:
    keep = random_mask((3, 64, 32), 0.7, seed=4)
    y = Mask(keep).A(photo(64, 32))
    turned = fill_unseen(Measurement(y.flip(side), Mask(keep.flip(side))))
    torch.testing.assert_close(turned.flip(side), fill_unseen(Measurement(y, Mask(keep))), rtol=0, atol=1e-6)


def test_a_hole_in_a_slope_goes_on_with_it() -> None:
    slope = torch.linspace(-0.9, 0.9, 64, dtype=torch.float64).expand(1, 3, 64, 64).contiguous()
    mask = Mask(box_mask((3, 64, 64), 20))
    error = (fill_unseen(Measurement(mask.A(slope), mask)) - slope).abs()
    assert float(error.max()) < 0.12  # an even fill is off by .28 at its edges


def test_a_noisy_photo_is_smoothed() -> None:
    measurement = observed(Identity(WIDE), photo(64, 48), 0.4)
    left = (fill_unseen(measurement) - photo(64, 48)).square().mean().sqrt()
    assert float(left) < 0.6 * 0.4


def test_channel_that_was_never_seen_is_filled_with_grey() -> None:
    keep = torch.ones(1, 3, 4, 4)
    keep[:, 2] = 0
    filled = fill_unseen(Measurement(Mask(keep).A(photo(4, 4)), Mask(keep)))
    assert torch.equal(filled[:, 2], torch.zeros(1, 4, 4, dtype=torch.float64))


def test_black_and_white_photo_starts_grey() -> None:
    y = photo(64, 48)[:, :1]
    filled = fill_unseen(Measurement(y, Grayscale(WIDE)))
    assert float((filled - y).square().mean().sqrt()) < 0.01
    torch.testing.assert_close(Grayscale(WIDE).A(filled), y, rtol=0, atol=1e-4)
    assert float(filled.abs().max()) < 1.5


def test_block_means_are_met_at_the_cut_edge_too() -> None:
    operator = AreaDownscale((3, 9, 7), 4)
    y = operator.A(photo(9, 7))
    torch.testing.assert_close(operator.A(fill_unseen(Measurement(y, operator))), y, rtol=0, atol=1e-3)


def test_fill_takes_the_gain_of_a_measurement_into_account() -> None:
    """Two photos of an even picture, one of them scaled: the hole gets the picture's value."""
    keep = torch.ones(1, 1, 8, 8)
    keep[..., 2:6, 2:6] = 0
    mask = Mask(keep)
    stack = Stack([mask, Scale((3, 8, 8), 0.2) @ mask])
    x = torch.full((1, 3, 8, 8), 0.8, dtype=torch.float64)
    torch.testing.assert_close(fill_unseen(Measurement(stack.A(x), stack, 0.05)), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", [1.5, 3.0])
def test_the_rounding_of_8_bits_is_not_amplified_by_a_blur(width: float) -> None:
    truth = photo(64, 64)
    operator = Blur(gaussian_kernel(width), (3, 64, 64), "reflect")
    y = ((operator.A(truth) + 1) / 2 * 255).round() / 255 * 2 - 1
    assert float(fill_unseen(Measurement(y, operator)).abs().max()) < 1.5
