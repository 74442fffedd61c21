"""From which noise level a run starts: how large the largest hole is, beside counting, and what follows from it."""

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
    Stack,
    box_mask,
    gaussian_kernel,
    stripe_mask,
)
from samplers import largest_hole, start_level

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
    levels = {side: start_level(blank(Mask(box_mask((3, 128, 128), (side, side), (8, 8)))), 8) for side in (8, 48, 96)}
    assert levels == pytest.approx({8: photo, 48: photo, 96: 2 * photo})
    on_pixels = blank(Mask(box_mask((3, 32, 32), (12, 12), (8, 8))))
    assert start_level(on_pixels, 1) == pytest.approx(2 * photo)
