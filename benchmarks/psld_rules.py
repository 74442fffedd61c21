"""Step-size rules for PSLD in few calls that were tried beside the line search, and lost: see results/psld_rules.md."""

import itertools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from samplers.psld import psld_residuals
from samplers.steps import Autoencoder, ddim_step, noise_sampler, per_image, vjp

# Of sigma: how much of gamma is in force.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda sigma: 1.0,
    "late": lambda sigma: 1 / (1 + sigma**2),
    "early": lambda sigma: sigma**2 / (1 + sigma**2),
}


def sample_by_rule(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    *,
    measurement: Any,
    autoencoder: Autoencoder,
    omega: float = 1.0,
    gamma: float = 0.1,
    schedule: Literal["constant", "late", "early"] = "constant",
    length: float | None = None,
) -> Tensor:
    """The gradients of Algorithm 2 with other lengths. Arguments as for `sample_psld`, and

    Args:
        schedule: of the gluing weight over sigma.
        length: rms length of each step in units of sigma_next, in place of the gradient's own.
    """
    noise, x = noise_sampler(x, None), x.detach()  # none is drawn: eta is 0
    for sigma, after in itertools.pairwise(sigmas):
        glue = gamma * SCHEDULES[schedule](float(sigma))
        with torch.enable_grad():
            x.requires_grad_()
            z0 = model(x, sigma.expand(len(x)), **(extra_args or {}))
            z = z0.detach().requires_grad_()
            fit, gap = psld_residuals(z, measurement, autoencoder, "pinv" if glue else None)
            loss = omega * fit if gap is None else omega * fit + glue * gap
            (gradient,) = torch.autograd.grad(loss.sum(), z)
            step = vjp(z0, x, -gradient)
        if length is None:
            # From the variance-preserving state of the paper, as in sample_psld.
            step = ((1 + sigma**2) * (1 + after**2)).sqrt() * step
        else:
            size = step.flatten(1).square().mean(1).sqrt().clamp(min=torch.finfo(step.dtype).tiny)
            step = per_image(length * after / size, step) * step
        x = ddim_step(x.detach(), z0.detach(), sigma, after, 0.0, noise) + step
    return x.detach()
