"""Pictures and measurements in pixel space: filling what was not seen, and agreeing with what was."""

from typing import Any

import torch
from torch import Tensor


def fill_unseen(measurement: Any) -> Tensor:
    """A^+ y, with the mean of each channel in the directions that the measurement does not see.

    Holes of a mask then have the mean of the kept pixels; where a constant is seen (downscaling, blur) it is A^+ y itself.

    Args:
        measurement: `y` (B, c, h, w) in [-1, 1], `operator`.

    Returns:
        (B, C, H, W), in [-1, 1] units.
    """
    operator = measurement.operator
    x = operator.A_dagger(measurement.y)
    seen = operator.project(torch.ones_like(x))
    weight = (seen * seen).sum((2, 3), keepdim=True)
    mean = (x * seen).sum((2, 3), keepdim=True) / torch.where(weight > 0, weight, 1.0)
    return x + (mean - operator.project(mean.expand_as(x)))


def enforce_consistency(x: Tensor, measurement: Any, error: float, sweeps: int = 20) -> Tensor:
    """Correct x as little as possible so that it agrees with y.

    Noise-free: x + A^+ (y - A x), the nearest picture with A x = y. Where that leaves [-1, 1], clamping and projecting take
    turns (alternating projections onto two convex sets), the projection last: A x = y holds, the range up to a rest that fades
    with the sweeps. With noise: the posterior mean of x ~ N(x, error^2) under y, which is prox_l2 with gamma = error^2 / sigma^2
    (the Wiener form), and no clamping.

    Args:
        x: (B, C, H, W) in [-1, 1].
        measurement: `y`, `operator`, `sigma`.
        error: expected standard deviation of x around the truth, in [-1, 1] units; used only when sigma > 0.
        sweeps: at most this many rounds of alternating projections.
    """
    operator, y = measurement.operator, measurement.y
    if measurement.sigma > 0:
        return operator.prox_l2(x, y, (error / measurement.sigma) ** 2)
    x = x + operator.A_dagger(y - operator.A(x))
    for _ in range(sweeps):
        inside = x.clamp(-1, 1)
        if bool((inside == x).all()):
            break
        x = inside + operator.A_dagger(y - operator.A(inside))
    return x
