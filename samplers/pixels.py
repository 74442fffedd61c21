"""Pictures and measurements in pixel space: what was measured, and how a picture is made to agree with it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

USUAL = 0.1  # error of a sampled picture, in [-1, 1] units
ROUNDING = 2 / 255 / 12**0.5  # standard deviation of the error of an 8-bit photo, in [-1, 1] units


def measured(operator: Any, y: Tensor) -> Tensor:
    """1 on the values of y that depend on the picture, 0 on the others, such as the lost pixels of a mask.

    Those are the rows of A that are zero. Random pictures tell them apart from rows that merely sum to zero, such as those of
    an edge filter, and from the rounding of an FFT.

    Args:
        operator: A.
        y: (B, *out_shape), for its size, precision and device.

    Returns:
        (B, *out_shape), of the precision of y.
    """
    draws = torch.randn(4, *operator.in_shape, generator=torch.Generator().manual_seed(0)).to(y)
    reached = sum(operator.A(draw.expand(len(y), *draw.shape).contiguous()).abs() for draw in draws)
    return (reached > 8 * torch.finfo(y.dtype).eps * reached.max()).to(y)


def noise_norm(measurement: Any) -> Tensor:
    """What the noise alone makes ||A x - y||: sigma sqrt(m) for the m values of y that measure anything, (B,)."""
    return measurement.sigma * measured(measurement.operator, measurement.y).flatten(1).sum(1).sqrt()


def expected_error(x: Tensor, measurement: Any) -> Tensor:
    """The error of x that explains how far A x is from y: its standard deviation, (B,), in [-1, 1] units.

    By moments, for white errors: E ||A x - y||^2 = m sigma^2 + error^2 tr(A A^T). 0 where the residual is that of the noise.

    Args:
        x: (B, C, H, W) in [-1, 1].
        measurement: `y` (1 or B, c, h, w), `operator`, `sigma`.
    """
    excess = measurement.residual_norm(x) ** 2 - noise_norm(measurement) ** 2
    trace = _trace(measurement.operator, x)
    return (excess.clamp(min=0) / torch.where(trace == 0, 1.0, trace)).sqrt()


def contradicts(x: Tensor, measurement: Any, error: float) -> Tensor:
    """Whether x is nearer to y than an x with white errors of this standard deviation would be, (B,) bool.

    By three standard deviations of ||A x - y||^2, as if its values were independent: a few values contradict nothing. An x that was
    fitted to y may be as near and err as much.
    """
    noise = noise_norm(measurement) ** 2
    values = measured(measurement.operator, measurement.y).flatten(1).sum(1)
    expected = noise + error**2 * _trace(measurement.operator, x)
    return measurement.residual_norm(x) ** 2 < (1 - 3 * (2 / values.clamp(min=1)) ** 0.5) * expected


def _trace(operator: Any, x: Tensor) -> Tensor:
    """tr(A A^T), from one random picture, (B,)."""
    draw = torch.randn(operator.in_shape, generator=torch.Generator().manual_seed(0)).to(x)
    return operator.A(draw.expand(x.shape).contiguous()).square().flatten(1).sum(1)


def enforce_consistency(
    x: Tensor, measurement: Any, error: float | None = None, sweeps: int = 20, photos: Sequence[Any] = ()
) -> Tensor:
    """Correct x as little as possible so that it agrees with y.

    Noise-free: x + A^+ (y - A x), the nearest picture with A x = y. Where that leaves [-1, 1], clamping and projecting take
    turns (alternating projections onto two convex sets), the projection last: A x = y holds, the range up to a rest that fades
    with the sweeps. With noise: the posterior mean of x ~ N(x, error^2) under y, which is prox_l2 with gamma = error^2 / sigma^2
    (the Wiener form), and no clamping.

    Args:
        x: (B, C, H, W) in [-1, 1].
        measurement: `y` (1 or B, c, h, w), `operator`, `sigma`.
        error: expected standard deviation of x around the truth, in [-1, 1] units. None is what its own residual says, by
            `expected_error`, up to 0.1; more, up to 0.1, where that does not bring the residual down to the noise: errors that a
            blur lets through are larger in it than white ones. Used only when sigma > 0.
        sweeps: at most this many rounds of alternating projections.
        photos: the measurements that a combined one is made of. Each has to be within its noise then: what one of them leaves is
            not averaged with what the others do.

    Raises:
        ValueError: noise-free, and meeting y exactly would amplify the rounding of an 8-bit photo into the picture.
    """
    operator, y = measurement.operator, measurement.y.expand(len(x), -1, -1, -1)
    if measurement.sigma > 0:
        if error is None:
            return _as_it_needs(x, measurement, photos or [measurement])
        return operator.prox_l2(x, y, (error / measurement.sigma) ** 2)
    exact = x + operator.A_dagger(y - operator.A(x))
    # A blur's inverse has gains of up to 1e6: a y that was rounded to 8 bits then moves x by far more than it would if the
    # rounding were taken into account.
    careful = operator.prox_l2(x, y, (USUAL / ROUNDING) ** 2)
    moved, due = ((v - x).square().mean((1, 2, 3)).sqrt() for v in (exact, careful))
    if bool((moved > (4 * due).clamp(min=0.05)).any()):
        raise ValueError(
            "measurement: a photo cannot be met exactly through this operator, whose inverse amplifies rounding errors to "
            f"{float(moved.max()) / 2:.2g} on the 0 to 1 scale. Give the measurement (not the blur) a sigma above 0; 0.002 stands for the rounding of 8 bits"
        )
    x = exact
    for _ in range(sweeps):
        inside = x.clamp(-1, 1)
        if bool((inside == x).all()):
            break
        x = inside + operator.A_dagger(y - operator.A(inside))
    return x


def _as_it_needs(x: Tensor, measurement: Any, photos: Sequence[Any]) -> Tensor:
    """`enforce_consistency` with noise, each picture with the error that its residuals tell, raised until it agrees."""
    errors = torch.stack([expected_error(x, photo) for photo in photos]).amax(0).clamp(max=USUAL)
    goals = [noise_norm(photo).expand(len(x)) for photo in photos]

    def agrees(image: Tensor, i: int) -> bool:
        return all(float(residual(image, photo, i)) <= goal[i] for photo, goal in zip(photos, goals, strict=True))

    images = []
    for i, error in enumerate(errors.tolist()):
        image = corrected(x, measurement, i, error)
        while 0 < error < USUAL and not agrees(image, i):
            error = min(2 * error, USUAL)
            image = corrected(x, measurement, i, error)
        images.append(image)
    return torch.cat(images)


def corrected(x: Tensor, measurement: Any, i: int, error: float) -> Tensor:
    """Image i of x, (1, C, H, W), as the mean under y of an image that is off by white errors of this size."""
    operator, y = _of_image(measurement, i)
    return operator.prox_l2(x[i : i + 1], y, (error / measurement.sigma) ** 2)


def residual(image: Tensor, measurement: Any, i: int) -> Tensor:
    """||A x - y|| of one image, (1, C, H, W), with the measurement of image i."""
    operator, y = _of_image(measurement, i)
    return (operator.A(image) - y).norm()


def _of_image(measurement: Any, i: int) -> tuple[Any, Tensor]:
    """Operator and y of image i; one y may stand for all."""
    return measurement.operator.select(i), measurement.y[i : i + 1] if len(measurement.y) > 1 else measurement.y


def feather_holes(x: Tensor, agreed: Tensor, keep: Tensor, width: float) -> Tensor:
    """Let what a correction changed next to a hole fade out into the hole; kept pixels stay as they are.

    The change agreed - x of kept pixels is carried into the hole as its Gaussian-weighted mean, times twice the weight that kept
    pixels have there (1 at a straight edge), at most 1. Holes are clamped to [-1, 1]: nothing there was measured.

    Args:
        x, agreed: (B, C, H, W), before and after the correction.
        keep: (1 or B, 1 or C, H, W), 1 on kept pixels, 0 in holes.
        width: standard deviation of the Gaussian, in pixels, > 0.
    """
    radius = int(3 * width + 0.5)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device) / width) ** 2)
    taps = taps / taps.sum()

    weight, change = (convolve(v, taps, (radius,) * 4) for v in (keep, keep * (agreed - x)))
    change = change / weight.clamp(min=1e-12)
    return torch.where(keep > 0, agreed, (agreed + (2 * weight).clamp(max=1) * change).clamp(-1, 1))


def convolve(v: Tensor, taps: Tensor, margin: tuple[int, int, int, int], stride: int = 1) -> Tensor:
    """Every channel of v, (B, C, H, W), with the same taps along columns and rows; margin: zeros left, right, above and below."""
    planes = pad(v.flatten(0, 1)[:, None], margin)
    planes = conv2d(planes, taps[None, None, :, None], stride=(stride, 1))
    planes = conv2d(planes, taps[None, None, None], stride=(1, stride))
    return planes.reshape(*v.shape[:2], *planes.shape[2:])
