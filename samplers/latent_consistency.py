"""The latent nearby whose picture agrees with the measurement: data consistency where A acts on D(z)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .pixels import ROUNDING, USUAL
from .steps import Autoencoder, per_image, vjp

DOUBT = (
    0.2  # of a network's x0 where sigma is small, in latents of unit variance; benchmarks/results/latent_tuning.md has others
)
# Root mean squares, of latents of about unit variance: of a finite difference, and of the first look ahead. From .01 the first step
# would be extrapolated nine times as far, which costs 0.3 dB on masks; .09 is what bfloat16 needs, too.
DIFFERENCE, LOOK_AHEAD = 0.01, 0.09
ARRIVED = 1e-3  # of the goal: a residual as near to it is on it


def spread_of(sigma: Tensor, tau: float = 1.0) -> float:
    """Standard deviation of the truth's latent around the network's x0 at a noise level; tau: that of all latents."""
    s = float(sigma)
    return math.hypot(s / math.hypot(1, s / tau), DOUBT * min(tau, 1))


def match_by_decoder(
    z: Tensor,
    measurement: Any,
    autoencoder: Autoencoder | None,
    steps: int,
    goal: Tensor,
    prior: tuple[Tensor, float] | None = None,
    last: bool = False,
    free: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Move z towards A D(z) = y by conjugate gradients on ||A D(z) - y||^2 / 2, at most until the residual is `goal`.

    With noise a prior counts too: the steps then minimise ||A D(z) - y||^2 / sigma^2 + ||z - mean||^2 / spread^2, but none moves
    away from y outside the noise. A decoder draws no picture exactly, so that without the prior noise would have to make up for
    the rest of the residual.

    Each step takes one vjp of the decoder, for its direction, and decodes once: at z and the direction by the length of the step
    before, where the next is likely to be. That gives A J d for the exact line search of the linearised decoder, and the place
    where the next vjp is taken: K steps decode K + 1 times. What A D(z) is after a step is interpolated between the two ends, or
    extrapolated where the step is longer. The step that would cross the goal ends on it (discrepancy principle), whether it comes
    from further away or, back to the prior's mean, from nearer to y.

    Args:
        z: (B, c, h, w) scaled latents.
        measurement: `y` (B, ...), `operator`, `sigma`.
        autoencoder: only D is used; None is pixel space, D = I.
        steps: at most this many.
        goal: ||A D(z) - y|| to end on, (B,): that of `pixels.noise_norm` for a sample, 0 for a mean, which the prior alone holds back.
        prior: mean, like z, and standard deviation of the truth's latent, before y is seen.
        last: what is returned is the result. Then each step decodes twice, a little ahead and at z: late steps are so short that
            in half precision finite differences reach further, and what is interpolated from there costs 0.3 dB (striped masks).
        free: (1 or B, 1 or c, h, w), how much of its move each value of z takes, 0 where it is held; `measurement` should then be
            what is `reachable`. None: all of it.

    Returns:
        The latents, (B, c, h, w), detached, and ||A D(z) - y|| before the first step, (B,).
    """
    operator, y = measurement.operator, measurement.y
    decode = (lambda z: z) if autoencoder is None else autoencoder.decode
    looks_ahead = steps > 1 and not last
    move = max(
        LOOK_AHEAD if looks_ahead else DIFFERENCE,
        torch.finfo(getattr(autoencoder, "dtype", z.dtype)).eps ** 0.5,  # above the decoder's rounding
    )
    start = z = z.detach()
    moves = None if free is None else free > 0
    mean, spread = (z, float("inf")) if prior is None else (prior[0].detach(), prior[1])
    damping = (measurement.sigma / spread) ** 2
    entries = z[0].numel() if moves is None else moves.expand_as(z).flatten(1).sum(1).clamp(min=1)  # that move
    # No step is longer than four times z itself, or unit variance: the line search knows no bound where the decoder hardly reacts,
    # as one does that a network gone astray has saturated.
    longest = 4 * z.flatten(1).norm(dim=1).clamp(min=z[0].numel() ** 0.5)
    before = direction = torch.zeros_like(z)
    done = torch.zeros(len(z), dtype=torch.bool, device=z.device)
    exact = ~done  # whether the residual is that of z itself, and not interpolated
    stuck = done  # the last step found no way down: perhaps from what was interpolated
    point, seen, residual = _decoded(z, operator, y, decode)
    fit = residual.flatten(1).norm(dim=1)
    length = moved = torch.zeros_like(fit)  # of the last step, in its direction and in z
    for step in range(1, steps + 1):
        near = (residual.flatten(1).norm(dim=1) - goal).abs() < ARRIVED * goal
        done = done | (near & exact)
        if bool(done.all()):
            break
        descent = vjp(seen, point, residual) - damping * (z - mean)
        descent = descent if moves is None else moves * descent
        seen = seen.detach()  # its graph goes before the next is built
        # Polak and Ribiere's choice, which starts anew where the decoder's curvature has spoilt the old direction.
        beta = _ratio(_dot(descent, descent - before), _dot(before, before)).clamp(min=0)
        direction = descent + per_image(beta, z) * direction
        before = descent
        size = _dot(direction, direction).sqrt().clamp(min=1e-30)
        least = move * entries**0.5 / size
        ahead = torch.maximum(torch.minimum(length, moved / size), least)
        doubtful = (near | (stuck & ~exact)) & ~done  # decoded where it is, before it counts
        stays = done | doubtful
        to = z + per_image(torch.where(stays, 0, ahead), z) * direction
        point, seen, there = _decoded(to, operator, y, decode, differentiable=looks_ahead and step < steps)
        exact = doubtful
        slope = (residual - there) / per_image(ahead, residual)
        away = damping * _dot(z - mean, direction)
        length = torch.minimum(_length(residual, slope, goal, away, damping * size**2), longest / size)
        length = torch.where(stays, 0, length)
        z = z + per_image(length, z) * direction
        residual = torch.where(per_image(exact, residual), there, residual - per_image(length, residual) * slope)
        stuck = (length == 0) & ~stays
        length = torch.where(stays, ahead, length)
        moved = length * size
        if not looks_ahead and step < steps:
            point, seen, residual = _decoded(z, operator, y, decode)
            exact = ~done
    return z if free is None else start + free * (z - start), fit


def _decoded(
    z: Tensor, operator: Any, y: Tensor, decode: Callable[[Tensor], Tensor], differentiable: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """z, A D(z) with the graph between them, and y - A D(z) without."""
    with torch.set_grad_enabled(differentiable):
        z = z.detach().clone().requires_grad_(differentiable)
        seen = operator.A(decode(z))
    return z, seen, y - seen.detach()


def _length(residual: Tensor, slope: Tensor, goal: Tensor, away: Tensor, stiffness: Tensor) -> Tensor:
    """How many slopes, (B,), to subtract from the residual: to the least of the sum of squares, at most until the residual is the goal.

    Args:
        residual, slope: (B, ...).
        goal: ||residual|| to end on, (B,).
        away, stiffness: of the prior's part of the sum: half its derivative here and half its second derivative, (B,).
    """
    curve, down = _dot(slope, slope).clamp(min=1e-30), _dot(residual, slope)
    best = down / curve
    excess = (_dot(residual, residual) - goal**2) / curve
    room = (-excess).clamp(min=0)
    # At a goal of 0 the root is 0, and of rounding it would be 1e8 times as much.
    early = torch.where(goal > 0, (best**2 - excess.clamp(min=0)).clamp(min=0).sqrt(), 0)
    back = _ratio(room, (best**2 + room).sqrt() - best)
    return torch.minimum(torch.where(best > 0, best - early, back), ((down - away) / (curve + stiffness)).clamp(min=0))


def closer(
    z: Tensor, start: Tensor, fit: Tensor, measurement: Any, autoencoder: Autoencoder | None, noise_norm: Tensor
) -> Tensor:
    """z, or for images where that is further from the measurement than the start was, and than the noise, the start.

    Args:
        z, start: (B, c, h, w).
        fit: ||A D(start) - y||, (B,).
        noise_norm: ||A D(z) - y|| at which an image agrees, (B,), from `pixels.noise_norm`.
    """
    near = torch.maximum(fit, (1 + ARRIVED) * noise_norm)
    return torch.where(per_image(residual_of(z, measurement, autoencoder) <= near, z), z, start)


def residual_of(z: Tensor, measurement: Any, autoencoder: Autoencoder | None) -> Tensor:
    """||A D(z) - y||, (B,)."""
    return measurement.residual_norm(z if autoencoder is None else autoencoder.decode(z))


def match_by_encoder(z: Tensor, measurement: Any, autoencoder: Autoencoder, steps: int) -> tuple[Tensor, Tensor]:
    """Move z by E(corrected picture) - E(picture), which cancels what E(D(z)) differs from z; no gradients at all.

    The first four arguments and what it returns are as for `match_by_decoder`.
    """
    operator, y = measurement.operator, measurement.y
    gamma = (USUAL / max(measurement.sigma, ROUNDING)) ** 2
    fit = None
    for _ in range(steps):
        image = autoencoder.decode(z)
        fit = measurement.residual_norm(image) if fit is None else fit
        z = z + autoencoder.encode(operator.prox_l2(image, y, gamma)) - autoencoder.encode(image)
    return z, fit


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each image, (B,)."""
    return (a * b).flatten(1).sum(1)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where that is beyond all bounds. No small number stands for 0: in float32 it made infinity of large pictures."""
    return (a / b).nan_to_num(0, 0, 0)
