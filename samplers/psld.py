"""PSLD: posterior sampling with latent diffusion (Rout et al., NeurIPS 2023, arXiv 2307.00619, Algorithm 2)."""

import itertools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from .checks import check_choices, check_common
from .held import held_back, reachable
from .latent_consistency import closer, match_by_decoder, residual_of, spread_of
from .pixels import noise_norm
from .steps import Autoencoder, ddim_step, noise_sampler, per_image, vjp

GLUES, RULES = ("pinv", "adjoint", "goodness"), ("paper", "line_search")


def psld_residuals(
    denoised: Tensor, measurement: Any, autoencoder: Autoencoder | None, glue: str | None
) -> tuple[Tensor, Tensor | None]:
    """The two un-squared norms of Algorithm 2, one value for each image.

    Args:
        denoised: z0_hat, (B, c, h, w).
        measurement: with `y`, `operator`.
        autoencoder: E and D, or None for pixel space (D = E = I).
        glue: "pinv" glues with A^+, which makes the glued image meet A x = y for any A; "adjoint" is the letter of the paper,
            the same where A A^T = I; "goodness" glues nothing, x_g = D(z0); None leaves the second norm out, and with it A^+
            and the encoder.

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
    glued = image
    if glue != "goodness":
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
    glue: Literal["pinv", "adjoint", "goodness"] = "pinv",
    squared: bool = False,
    rule: Literal["paper", "line_search"] = "paper",
    inner_steps: int = 1,
    last_steps: int = 10,
) -> Tensor:
    """Sample the posterior with PSLD. Every norm, step and random number is per image: a batch equals single runs.

    Relatives of PSLD as settings: gamma = 0 is latent DPS; glue = "goodness" is GML-DPS (eq. 8 of the paper); autoencoder = None,
    gamma = 0, eta = 1 and omega = 2 zeta' is DPS with the step size zeta' (Chung et al., ICLR 2023, which differentiates the
    squared norm).

    The paper's steps omega grad ||A D(z0) - y|| have a length that knows neither the number of steps nor the operator, which is
    why it takes 1000 of them. rule = "line_search" finds the length instead, in 20 to 50 calls: conjugate gradients with an
    exact line search move z0 towards the measurement through the decoder, not below the noise, and the network's vector-Jacobian
    product carries that move d to x, scaled so that it would give d back in a network with <d, J J^T d> = ||d||^2 (a Polyak
    step). The last step needs no network gradient and takes `last_steps` inner ones.

    Args:
        model: `model(x, sigma, **extra_args)` -> denoised x0, differentiable. sigma: (B,).
        x: (B, c, h, w), noise at sigmas[0] in the k-state x = x0 + sigma * eps.
        sigmas: (steps + 1,), never rising, positive except for a last 0.
        extra_args: passed to the model; "seed" seeds the noise that eta > 0 adds; "denoise_mask", broadcastable to x, is 0 where
            the model holds x0 fixed, as inpainting in ComfyUI does: the guidance then moves nothing there.
        callback: called each step with x, i, sigma, sigma_hat, denoised (detached) and residual, ||A D(z0) - y|| (B,).
        disable: unused; k-diffusion's switch for a progress bar.
        measurement: `Measurement` on the device of x.
        autoencoder: E and D, or None for a pixel-space model.
        omega: weight of the measurement term ||A D(z0) - y||: a number, or a matrix (d, d), d = c h w, that multiplies its
            gradient (the matrix steps of the paper's theory). With rule = "line_search" the share of the found step, a number; the
            step to sigma 0 goes all the way.
        gamma: the same for the gluing term ||E(A^+ y + (I - A^+ A) D(z0)) - z0||; 0 with rule = "line_search".
        eta: fresh noise: 0 is DDIM, 1 is DDPM.
        glue: "pinv"; "adjoint" for the letter of the paper; "goodness" for ||E(D(z0)) - z0||.
        squared: squared norms, as in the paper's theory (section 3.2); its experiments, and the default, use plain norms.
        rule: "paper" or "line_search".
        inner_steps: steps of conjugate gradients in each step but that to sigma 0; used by rule = "line_search" only.
        last_steps: the same in the step to sigma 0.

    Returns:
        x at sigmas[-1], (B, c, h, w), detached.

    Raises:
        ValueError: negative weights, a negative eta, an unknown glue or rule, weights the rule has no use for, rising
            sigmas, batches that do not fit.
    """
    check_choices({"glue": (glue, GLUES), "rule": (rule, RULES)})
    measurement = check_common(x, sigmas, measurement, eta, inner_steps, last_steps)
    _check_weights(x, omega, gamma, rule)
    glued = glue if isinstance(gamma, Tensor) or gamma > 0 else None
    extra_args = extra_args or {}
    noise = noise_sampler(x, extra_args.get("seed"))
    search = None
    if rule == "line_search":
        free = held_back(extra_args.get("denoise_mask"))
        search = LineSearch(measurement, autoencoder, omega, inner_steps, last_steps, free)
    x = x.detach()
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        through_network = search is None or bool(sigma_next > 0)
        with torch.set_grad_enabled(through_network):
            x = x.requires_grad_(through_network)
            z0 = model(x, sigma.expand(len(x)), **extra_args)
        if search is None:
            # The gradient stops at z0 and goes on as a vector-Jacobian product: the autoencoder's graph is freed before the
            # network's is walked, and the product can be scaled for float16 networks.
            with torch.enable_grad():
                z = z0.detach().requires_grad_()
                fit, gap = psld_residuals(z, measurement, autoencoder, glued)
                terms = [(omega, fit)] if gap is None else [(omega, fit), (gamma, gap)]
                step = _weighted_gradient(x, z0, z, terms, squared, scale=measurement.y[0].numel() ** 0.5)
            # Algorithm 2 steps in the variance-preserving state z = x / c, c = sqrt(1 + sigma^2): grad_z = c grad_x, and a
            # step of z after the move to sigma_next is c_next times that step of x.
            step = -((1 + sigma**2) * (1 + sigma_next**2)).sqrt() * step
        else:
            step, fit = search.step(x, z0, sigma, sigma_next)
        x, z0 = x.detach(), z0.detach()
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": z0, "residual": fit.detach()})
        x = ddim_step(x, z0, sigma, sigma_next, eta, noise) + step
    return x


def _check_weights(x: Tensor, omega: float | Tensor, gamma: float | Tensor, rule: str) -> None:
    for name, value in (("omega", omega), ("gamma", gamma)):
        if isinstance(value, Tensor) and value.shape != (x[0].numel(),) * 2:
            raise ValueError(f"{name}: got a matrix {tuple(value.shape)}, expected ({x[0].numel()}, {x[0].numel()})")
        if not isinstance(value, Tensor) and not 0 <= value < float("inf"):
            raise ValueError(f"{name}: got {value}, expected a finite number >= 0, or a matrix")
    if rule == "line_search" and (isinstance(omega, Tensor) or isinstance(gamma, Tensor) or gamma > 0):
        raise ValueError('omega, gamma: with rule "line_search" omega is a number and gamma 0; it has no gluing term')


class LineSearch:
    """The steps of rule = "line_search"; see `sample_psld`."""

    def __init__(
        self,
        measurement: Any,
        autoencoder: Autoencoder | None,
        omega: float,
        inner_steps: int,
        last_steps: int,
        free: Tensor | None = None,
    ) -> None:
        self.whole, self.measurement = measurement, reachable(measurement, free)
        self.autoencoder, self.free = autoencoder, free
        self.omega, self.inner_steps, self.last_steps = omega, inner_steps, last_steps
        self.noise_norm = noise_norm(self.measurement)

    def step(self, x: Tensor, z0: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
        """What to add to x after the move to sigma_next, (B, c, h, w), and ||A D(z0) - y||, (B,)."""
        last = not x.requires_grad
        steps = self.last_steps if last else self.inner_steps
        prior = None if self.autoencoder is None else (z0.detach(), spread_of(sigma))
        given = (self.measurement, self.autoencoder, steps, self.noise_norm, prior, last)
        target, fit = match_by_decoder(z0, *given, free=self.free)
        with torch.no_grad():
            shown = fit if self.free is None else residual_of(z0, self.whole, self.autoencoder)
            if last:
                return closer(target, z0, fit, self.measurement, self.autoencoder, self.noise_norm) - z0, shown
        move = self.omega * (target - z0.detach())
        back = vjp(z0, x, move)
        size, length = (v.flatten(1).norm(dim=1) for v in (move, back))
        # Where the network hardly reacts to x the scale explodes: never move x by more than the noise it still has.
        longest = sigma_next * x[0].numel() ** 0.5
        tiny = torch.finfo(x.dtype).tiny ** 0.5
        return per_image(torch.minimum((size / length.clamp(min=tiny)) ** 2, longest / length.clamp(min=tiny)), x) * back, shown


def _weighted_gradient(
    x: Tensor, z0: Tensor, z: Tensor, terms: list[tuple[float | Tensor, Tensor]], squared: bool, scale: float
) -> Tensor:
    """sum_k W_k grad_x n_k (or n_k^2) over (W_k, n_k), where the norms n_k are functions of z, a detached copy of z0(x).

    The gradient of a norm has entries of about 1 / sqrt(values), small enough to vanish in a float16 autoencoder: `scale` takes
    them to about 1 on their way to z.
    """

    def back(loss: Tensor, retain_graph: bool) -> Tensor:
        (gradient,) = torch.autograd.grad(scale * loss.sum(), z, retain_graph=retain_graph)
        return vjp(z0, x, gradient / scale, retain_graph=retain_graph)

    losses = [(weight, norm**2 if squared else norm) for weight, norm in terms]
    if not any(isinstance(weight, Tensor) for weight, _ in losses):
        return back(sum(weight * loss for weight, loss in losses), retain_graph=False)
    step = torch.zeros_like(x)
    for weight, loss in losses:
        gradient = back(loss, retain_graph=True)
        weighted = gradient.flatten(1) @ weight.T if isinstance(weight, Tensor) else weight * gradient
        step = step + weighted.reshape(x.shape)
    return step
