"""The start-up guard: autograd's gradient against finite differences, through the model, the VAE and the operator."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...samplers.psld import psld_residuals
from ...samplers.steps import vjp

# Relative: step sizes as a change of the residual that they should cause, and how far the two derivatives may be apart. In 16-bit
# networks rounding is a thousandth of each activation, so that small steps drown in it.
EXACT = (1e-2, 0.03)
ROUGH = (5e-2, 0.15)
SHRINK = (1.0, 0.25, 1 / 16)


def check_gradient(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    measurement: Any,
    autoencoder: Any,
    precision: torch.dtype,
    glue: str | None = None,
) -> str:
    """Compare both derivatives of the norms that a run differentiates, summed over the batch, in one direction at x.

    The norms are ||A D(x0(x)) - y||, and for a run that glues ||E(x_glued) - z0||, in which the encoder takes part. The direction
    is halfway between autograd's gradient, in which a missing part shows at full size, and a seeded random one. Two step sizes
    tell the curvature, which is taken out (Richardson), and whether the differences settle at all; where they do not, smaller
    steps are tried.

    Args:
        model: x -> denoised x0, (B, c, h, w).
        x: (B, c, h, w), the start state.
        precision: the lowest of the networks'; decides step and tolerance.
        glue: of `psld_residuals`, for a run that glues.

    Returns:
        What was found, a line for each norm.

    Raises:
        ValueError: the derivatives differ, or the differences do not settle.
    """

    def fit(denoised: Tensor) -> Tensor:
        return psld_residuals(denoised, measurement, autoencoder, None)[0]

    def gap(denoised: Tensor) -> Tensor:
        return psld_residuals(denoised, measurement, autoencoder, glue)[1]

    norms = {"|A x - y|": fit} if glue is None else {"|A x - y|": fit, "|E(x_glued) - z|": gap}
    return "\n".join(_compare(model, x, norm, name, precision) for name, norm in norms.items())


def _compare(
    model: Callable[[Tensor], Tensor], x: Tensor, norm: Callable[[Tensor], Tensor], name: str, precision: torch.dtype
) -> str:
    x = x.detach().requires_grad_()
    denoised = model(x)
    z = denoised.detach().requires_grad_()
    residual = norm(z)
    gradient = vjp(denoised, x, torch.autograd.grad(residual.sum(), z)[0])
    x, total = x.detach(), float(residual.detach().double().sum())
    size = torch.linalg.vector_norm(gradient)
    if not float(size) > 0:
        return f"gradient check: the gradient of {name} is zero at the start, where nothing can be compared"
    generator = torch.Generator().manual_seed(0)
    random = torch.stack([torch.randn(x.shape[1:], generator=generator) for _ in x]).to(x)
    direction = gradient / size + random / random.norm()
    direction = direction / direction.norm()
    expected = float((gradient * direction).sum())

    def difference(step: float) -> float:
        with torch.no_grad():
            ends = [float(norm(model(x + sign * step * direction)).double().sum()) for sign in (1, -1)]
        return (ends[0] - ends[1]) / (2 * step)

    change, tolerance = EXACT if precision in (torch.float32, torch.float64) else ROUGH
    found = 0.0
    for shrink in SHRINK:
        step = change * shrink * total / abs(expected)
        wide, narrow = difference(step), difference(step / 2)
        found = (4 * narrow - wide) / 3
        largest = max(abs(wide), abs(narrow), abs(expected))
        if abs(wide - narrow) <= tolerance * largest:
            if abs(found - expected) <= 2 * tolerance * largest:
                return f"gradient check passed, {name}: autograd {expected:.4g}, finite differences {found:.4g}"
            raise ValueError(
                f"check_gradients: autograd's derivative of {name} is {expected:.4g}, finite differences give {found:.4g}. A patch or "
                "wrapper on the model or the VAE computes a part without a gradient; remove such nodes one by one"
            )
    raise ValueError(
        f"check_gradients: finite differences of {name} do not settle (last {found:.4g}, autograd {expected:.4g}). A patch or "
        "wrapper on the model rounds, quantises or picks (token merging); remove it"
    )
