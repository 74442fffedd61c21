"""What a run starts from, given a photo: the picture that it suggests, and the noise that hides what is wrong with that."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from .pixels import ROUNDING, convolve

REACH = 1e-5  # weights below this share of the largest count as none: the tails of a blur
# Standard deviations in [-1, 1] units, no statistics of pictures but chosen for fills that are near to the truth in latents, on the
# demo prior's tuning split (benchmarks/results/latent_tuning.md).
DETAIL = 0.1  # of a pixel around what its neighbours say; twice as much in pictures of half the size
READING = 0.05  # at least, of a reading around its pixel: a value of y that is a mean over several is none of them
SMOOTHED = 0.3  # of the truth around the smooth picture
# For data of unit variance, sigma from which the faults of the filled photo drown in the noise, but for holes, and for the colours of
# a black and white photo, which stay pale.
LOWEST = 1.2
HOLE = 3.0  # side of the hole, in pixels of the state, that drowns there, too


def fill_unseen(measurement: Any) -> Tensor:
    """A smooth picture that agrees with the measurement: a start for a sampler.

    Each pixel's reading, the mean of the values of y that depend on it (A^T y / A^T A 1), counts as its precision is to the detail
    of pictures, and what its surroundings say as the rest: see `_smooth`. Then A x = y as far as the noise (at least the rounding
    of 8 bits) asks for it, so that a blur's inverse does not amplify it; directions that A does not see stay smooth.

    Args:
        measurement: `y` (B, c, h, w) in [-1, 1], `operator`, `sigma`.

    Returns:
        (B, C, H, W), in [-1, 1] units; 0 in channels that nothing tells of.
    """
    operator, y = measurement.operator, measurement.y
    ones = torch.ones((len(y), *operator.in_shape), device=y.device)  # float32, as 1 / sigma^2 is beyond float16
    weight = operator.A_adjoint(operator.A(ones))
    read = weight > REACH * weight.amax((1, 2, 3), keepdim=True)
    reading = torch.where(read, operator.A_adjoint(y.float()) / torch.where(read, weight, 1), 0).clamp(-1, 1)
    # Of operators that average, sigma^2 / weight is a reading's variance, counting once what several pixels share; but all colours
    # of one black and white pixel are read alike, so that grey stays grey.
    precision = torch.where(read, weight.amax(1, keepdim=True), 0) / max(measurement.sigma, READING) ** 2
    smooth = _smooth(reading, precision, DETAIL).to(y.dtype)
    return operator.prox_l2(smooth, y, (SMOOTHED / max(measurement.sigma, ROUNDING)) ** 2)


def _smooth(reading: Tensor, precision: Tensor, detail: float) -> Tensor:
    """Pictures from readings of their pixels: the mean of each pixel's own and of what the picture of half the size says there.

    Each step up and down is the fusion of Chou, Willsky and Benveniste (IEEE Trans. Automatic Control 39, 1994) on a pyramid of
    overlapping cells, in the manner of Gortler et al.'s push-pull (SIGGRAPH 1996): every pixel of half the size gathers 4 x 4
    readings, which count as four, each as far off as its own error and the detail make it.

    Args:
        reading, precision: (B, C, H, W); 1 / variance of the reading, 0 where there is none.
        detail: standard deviation of a pixel around what its neighbours say.

    Returns:
        (B, C, H, W).
    """
    h, w = reading.shape[2:]
    if h == w == 1:
        return reading
    share = precision * detail**2 / (1 + precision * detail**2)
    taps = torch.tensor([1, 3, 3, 1], dtype=reading.dtype, device=reading.device) / 8

    margin = (1, 1 + w % 2, 1, 1 + h % 2)
    gathered, sums = (convolve(v, taps, margin, stride=2) for v in (share, share * reading))
    coarse = sums / torch.where(gathered > 0, gathered, 1)
    coarse = _smooth(coarse, 4 * gathered / detail**2, 2 * detail)
    around = interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)[..., :h, :w]
    return share * reading + (1 - share) * around


def largest_hole(measurement: Any) -> int:
    """Side, in pixels, of the largest square window of the picture that no measured value depends on; 0 if there is none.

    Args:
        measurement: `y` (1 or B, c, h, w), `operator`. Of a batch the largest hole of all counts.
    """
    operator, y = measurement.operator, measurement.y
    draws = torch.randn(2, *y.shape[1:], generator=torch.Generator().manual_seed(0)).to(y)
    # Random values, as those of ones cancel in operators with negative weights. A lost value of y is not read from.
    reached = sum(operator.A_adjoint(draw.expand_as(y).contiguous()).abs() for draw in draws).amax(1)
    seen = (reached > REACH * reached.amax((1, 2), keepdim=True)).long()
    # Sums over all rectangles from the top left corner give those over every window.
    sums = pad(seen.cumsum(1).cumsum(2), (1, 0, 1, 0))

    def fits(s: int) -> bool:
        return bool((sums[:, s:, s:] - sums[:, :-s, s:] - sums[:, s:, :-s] + sums[:, :-s, :-s] == 0).any())

    low, high = 0, min(seen.shape[1:])
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def start_level(measurement: Any, ratio: int) -> float:
    """sigma, for data of unit variance, from which the noise hides what is wrong with `fill_unseen(measurement)`.

    Starting higher spends network calls on what the photo says already. What is wrong with a filled hole is as large as the hole,
    and noise of sigma leaves of a mean over n x n values sigma / n: the level is in proportion to the hole's side.

    Args:
        measurement: as for `largest_hole`.
        ratio: side of a pixel of the state, in pixels of the picture: 8 for most latents.
    """
    return LOWEST * max(1.0, largest_hole(measurement) / ratio / HOLE)
