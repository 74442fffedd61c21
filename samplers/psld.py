"""PSLD: posterior sampling with latent diffusion (Rout et al., NeurIPS 2023, arXiv 2307.00619, Algorithm 2)."""

import itertools
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from .steps import ddim_step, noise_sampler, vjp


class Autoencoder(Protocol):
    """Between scaled latents (B, c, h, w) and images (B, C, H, W) in [-1, 1]; both directions differentiable."""

    def decode(self, z: Tensor) -> Tensor: ...

    def encode(self, image: Tensor) -> Tensor: ...


def psld_residuals(
    denoised: Tensor, measurement: Any, autoencoder: Autoencoder | None, glue: str | None
) -> tuple[Tensor, Tensor | None]:
    """The two un-squared norms of Algorithm 2, one value for each image.

    Args:
        denoised: z0_hat, (B, c, h, w).
        measurement: with `y`, `operator`.
        autoencoder: E and D, or None for pixel space (D = E = I).
        glue: "pinv" glues with A^+, which makes the glued image meet A x = y for any A; "adjoint" is the letter of the paper,
            the same where A A^T = I; None leaves the second norm out, and with it A^+ and the encoder.

    Returns:
        ||A D(z0) - y||, (B,), in [-1, 1] image units.
        ||E(x_g) - z0||, (B,), in latent units, where x_g = D(z0) + A^+ (y - A D(z0)); None without glue.
    """
    operator = measurement.operator
    image = denoised if autoencoder is None else autoencoder.decode(denoised)
    residual = measurement.y - operator.A(image)
    fit = torch.linalg.vector_norm(residual.flatten(1), dim=1)
    if glue is None:
        return fit, None
    glued = image + (operator.A_dagger(residual) if glue == "pinv" else operator.A_adjoint(residual))
    recoded = glued if autoencoder is None else autoencoder.encode(glued)
    return fit, torch.linalg.vector_norm((recoded - denoised).flatten(1), dim=1)


def sample_psld(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    *,
    measurement: Any,
    autoencoder: Autoencoder | None = None,
    omega: float | Tensor = 1.0,
    gamma: float | Tensor = 0.1,
    eta: float = 0.0,
    glue: Literal["pinv", "adjoint"] = "pinv",
    squared: bool = False,
) -> Tensor:
    """Sample the posterior with PSLD. Every norm, step and random number is per image: a batch equals single runs.

    With gamma = 0 it is latent DPS; with autoencoder = None and gamma = 0 it is DPS (Chung et al., ICLR 2023).

    Args:
        model: `model(x, sigma, **extra_args)` -> denoised x0, differentiable. sigma: (B,).
        x: (B, c, h, w), noise at sigmas[0] in the k-state x = x0 + sigma * eps.
        sigmas: (steps + 1,), never rising, positive except for a last 0.
        extra_args: passed to the model; "seed" seeds the noise that eta > 0 adds.
        callback: called each step with x, i, sigma, sigma_hat, denoised (detached) and residual, ||A D(z0) - y|| (B,).
        disable: unused; k-diffusion's switch for a progress bar.
        measurement: `Measurement` on the device of x.
        autoencoder: E and D, or None for a pixel-space model.
        omega: weight of the measurement term ||A D(z0) - y||: a number, or a matrix (d, d), d = c h w, that multiplies its
            gradient (the matrix steps of the paper's theory).
        gamma: the same for the gluing term ||E(A^+ y + (I - A^+ A) D(z0)) - z0||.
        eta: 0 is DDIM, 1 is DDPM noise.
        glue: "pinv", or "adjoint" for the letter of the paper.
        squared: squared norms, as in the paper's theory (section 3.2); its experiments, and the default, use plain norms.

    Returns:
        x at sigmas[-1], (B, c, h, w), detached.

    Raises:
        ValueError: negative weights, an eta outside [0, 1], an unknown glue, rising sigmas, batches that do not fit.
    """
    for name, value in (("omega", omega), ("gamma", gamma)):
        if isinstance(value, Tensor) and value.shape != (x[0].numel(),) * 2:
            raise ValueError(f"{name}: got a matrix {tuple(value.shape)}, expected ({x[0].numel()}, {x[0].numel()})")
        if not isinstance(value, Tensor) and not 0 <= value < float("inf"):
            raise ValueError(f"{name}: got {value}, expected a finite number >= 0, or a matrix")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: got {eta}, expected a number between 0 (DDIM) and 1 (DDPM)")
    if glue not in ("pinv", "adjoint"):
        raise ValueError(f'glue: got {glue!r}, expected "pinv" or "adjoint"')
    if sigmas.ndim != 1 or not bool(((sigmas[:-1] >= sigmas[1:]) & (sigmas[:-1] > 0)).all()) or float(sigmas.min()) < 0:
        raise ValueError(f"sigmas: got {sigmas.tolist()}, expected a falling list of numbers > 0, the last one >= 0")
    if len(measurement.y) not in (1, len(x)):
        raise ValueError(f"x: got a batch of {len(x)} for a measurement of {len(measurement.y)}, expected equal batches")
    glued = glue if isinstance(gamma, Tensor) or gamma > 0 else None
    extra_args = extra_args or {}
    noise = noise_sampler(x, extra_args.get("seed"))
    x = x.detach()
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        with torch.enable_grad():
            x = x.requires_grad_()
            z0 = model(x, sigma.expand(len(x)), **extra_args)
            # The gradient stops at z0 and goes on as a vector-Jacobian product: the autoencoder's graph is freed before the
            # network's is walked, and the product can be scaled for float16 networks.
            z = z0.detach().requires_grad_()
            fit, gap = psld_residuals(z, measurement, autoencoder, glued)
            step = _weighted_gradient(x, z0, z, [(omega, fit)] if gap is None else [(omega, fit), (gamma, gap)], squared)
        x, z0 = x.detach(), z0.detach()
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": z0, "residual": fit.detach()})
        # Algorithm 2 steps in the variance-preserving state z = x / c, c = sqrt(1 + sigma^2): grad_z = c grad_x, and a step
        # of z after the move to sigma_next is c_next times that step of x.
        scale = ((1 + sigma**2) * (1 + sigma_next**2)).sqrt()
        x = ddim_step(x, z0, sigma, sigma_next, eta, noise) - scale * step
    return x


def _weighted_gradient(x: Tensor, z0: Tensor, z: Tensor, terms: list[tuple[float | Tensor, Tensor]], squared: bool) -> Tensor:
    """sum_k W_k grad_x n_k (or n_k^2) over (W_k, n_k), where the norms n_k are functions of z, a detached copy of z0(x)."""
    losses = [(weight, norm**2 if squared else norm) for weight, norm in terms]
    if not any(isinstance(weight, Tensor) for weight, _ in losses):
        total = sum(weight * loss for weight, loss in losses)
        return vjp(z0, x, torch.autograd.grad(total.sum(), z)[0])
    step = torch.zeros_like(x)
    for weight, loss in losses:
        (gradient,) = torch.autograd.grad(loss.sum(), z, retain_graph=True)
        gradient = vjp(z0, x, gradient, retain_graph=True)
        weighted = gradient.flatten(1) @ weight.T if isinstance(weight, Tensor) else weight * gradient
        step = step + weighted.reshape(x.shape)
    return step
