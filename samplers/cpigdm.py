"""C-PiGDM: posterior sampling in few network calls (Pandey, Yang and Mandt, NeurIPS 2024, arXiv 2405.17673), and beyond it.

Guidance adds sigma Omega (x_y - x0) to the flow of x, x_y = A^+ y. The paper integrates its stiff linear part exactly; in the
k-state the step is closed form, with theta = E(sigma) / E(sigma_next) of `weights.py` for each singular direction:

    x0c = x0 + V (1 - theta) V^T (x_y - x0)
    x+  = x0c + sigma_next eps + V Psi V^T j,      j = (d eps / d x)^T V Omega V^T (x_y - x0)

The default, weight = "dual", keeps a memory between steps: see `Dual`.
"""

import itertools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from .checks import check_choices, check_common
from .held import held_back, reachable
from .latent_consistency import match_by_decoder
from .pixels import noise_norm
from .spaces import ExactPixels, Latents, NoisyPixels, Space, Spectral
from .steps import Autoencoder, ddim_step, noise_sampler, per_image, vjp
from .weights import Bayes, Paper, Weight, over_compensated, psi, pull

WEIGHTS, INTEGRATORS, JACOBIANS = ("dual", "bayes", "paper"), ("conjugate", "euler", "discrete"), ("off", "k", "vp")
CONSISTENCIES = ("decoder", "encoder")


def sample_cpigdm(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    *,
    measurement: Any,
    autoencoder: Autoencoder | None = None,
    weight: Literal["dual", "bayes", "paper"] = "dual",
    w: float = 15.0,
    tau: float | None = None,
    reach: float = 0.3,
    eta: float | None = None,
    spread: float = 0.0,
    consistency: Literal["decoder", "encoder"] = "decoder",
    inner_steps: int = 4,
    last_steps: int = 10,
    stop: float = 0.0,
    jacobian: Literal["off", "k", "vp"] = "off",
    integrator: Literal["conjugate", "euler", "discrete"] = "conjugate",
    lam: float = 0.0,
) -> Tensor:
    """Sample the posterior in 5 to 20 network calls. Every step and random number is per image: a batch equals single runs.

    One call of the network each step, without its gradient unless `jacobian` asks for it. Relatives as settings:

    * the paper's C-PiGDM: weight = "paper", jacobian = "vp"; sigma from 2.03 (its t = 0.4), w = 15, with noise 2;
    * DDNM: weight = "paper", w = infinity. DDIM: weight = "paper", w = 0;
    * PiGDM (Song et al., ICLR 2023): integrator = "discrete", weight = "bayes", tau = infinity, jacobian = "k", eta = 1; that is
      r = sigma, which without noise cancels and with it is a choice; as an Euler method for the guided flow: integrator =
      "euler", tau = 1;
    * DPS, latent DPS and GML-DPS are settings of `sample_psld`.

    Args:
        model: `model(x, sigma, **extra_args)` -> denoised x0; differentiable if `jacobian` is not "off". sigma: (B,).
        x: (B, c, h, w) at sigmas[0] in the k-state x = x0 + sigma * eps: noise, or `fill_unseen(measurement)` (encoded, for a
            latent model) plus noise.
        sigmas: (steps + 1,), never rising, positive except for a last 0.
        extra_args: passed to the model; "seed" seeds the noise that eta > 0 adds; "denoise_mask", broadcastable to x, is 0 where
            the model holds x0 fixed, as inpainting in ComfyUI does: the guidance then moves nothing there.
        callback: called each step with x, i, sigma, sigma_hat, denoised (detached) and residual, ||A D(x0) - y|| (B,).
        disable: unused; k-diffusion's switch for a progress bar.
        measurement: `Measurement` on the device of x. Its sigma is the noise; 0 meets y exactly, if the last sigma is 0.
        autoencoder: E and D, or None for a pixel-space model.
        weight: "dual", see `Dual`; "bayes", Omega = s^2 / (s^2 r^2 + noise^2); "paper", Omega = w rho / (1 + sigma^2).
        w: strength of the paper's weight, >= 0.
        tau: standard deviation of the prior around its mean, in units of the state. Default 1 in latents, sqrt(0.1) in pixels. With
            noise it also says how near steps through the decoder stay to the network's x0. "paper" has no use for it.
        reach: "dual" moves the network's input by at most reach * sigma (rms), > 0. A network denoises badly what lies further out
            than the noise it was trained on; an exact denoiser can take 2.
        eta: fresh noise: 0 is DDIM, 1 is DDPM, more is more, until all noise of a step is fresh, at sigma_next / sigma <=
            sqrt(1 - 1 / eta^2). Default 2 for "dual", else 0. In few steps much fresh noise takes out what errors of the last x0
            left in x: pictures come nearer to the truth, and the samples of one photo to each other. With 1 their spread is more
            nearly that of the posterior.
        spread: fresh noise for what the network's x0, a mean, leaves out: its deviation in units of r = sigma tau / sqrt(sigma^2 +
            tau^2), >= 0. With 1 samples of a Gaussian prior of deviation tau keep their variance from step to step, whatever eta is.
            For several samples of one photo; a single one comes nearer to the truth without.
        consistency: for latents: "decoder" moves x0 by gradients through the decoder, "encoder" by decoding, correcting the
            picture and encoding, in less memory.
        inner_steps: for latents: consistency steps after each network call at sigma up to 4 tau, but that of the step to sigma 0; one
            above.
        last_steps: the same in the step to sigma 0.
        stop: for latents and consistency "decoder": share of the noise, 0 to 1, at which the steps before that to sigma 0 end
            (discrepancy principle). x0 is a mean there, and how near to y that lies the prior tells; 0 leaves it to the prior. With
            more, few measured values end nearer to their noise, and pictures stay as far from y as a sigma given too large says.
        jacobian: "k" adds the network's Jacobian, frozen in the k-state, one vector-Jacobian product for each step; "vp" freezes
            it in the variance-preserving state, as the paper does.
        integrator: "conjugate" is the exact one; "euler" and "discrete" are plain PiGDM.
        lam: the paper's lambda, for "conjugate" only.

    Returns:
        x at sigmas[-1], (B, c, h, w), detached.

    Raises:
        ValueError: arguments out of range, settings that exclude each other, rising sigmas, batches that do not fit.
    """
    check_choices({"weight": (weight, WEIGHTS), "consistency": (consistency, CONSISTENCIES)})
    check_choices({"jacobian": (jacobian, JACOBIANS), "integrator": (integrator, INTEGRATORS)})
    if eta is None:
        eta = 2.0 if weight == "dual" else 0.0
    measurement = check_common(x, sigmas, measurement, eta, inner_steps, last_steps)
    _check_numbers(w=w, tau=tau, reach=reach, spread=spread, lam=lam, stop=stop)
    plain = weight != "dual" and integrator != "conjugate"
    if weight == "dual" and (jacobian != "off" or integrator != "conjugate" or lam):
        raise ValueError('weight: "dual" goes with jacobian "off", integrator "conjugate" and lam 0 only')
    if plain and lam:
        raise ValueError(f'lam: got {lam} with integrator {integrator!r}; it belongs to "conjugate"')
    extra_args = extra_args or {}
    free = held_back(extra_args.get("denoise_mask"))
    pixels = autoencoder is None
    if tau is None or weight == "paper":
        tau = 0.1**0.5 if pixels else 1.0
    if not pixels:
        space: Space = Latents(measurement, autoencoder, consistency, inner_steps, last_steps, tau, stop, free)
    else:
        space = (NoisyPixels if measurement.sigma > 0 else ExactPixels)(measurement, free)
    if weight == "dual":
        method: Dual | Guidance = Dual(space, tau, reach)
    else:
        chosen = Paper(w, space.noise) if weight == "paper" else Bayes(tau, space.noise)
        method = Guidance(space, chosen, jacobian, integrator, lam)
    differentiate = jacobian != "off"
    noise = noise_sampler(x, extra_args.get("seed"))
    levels = sigmas.detach().cpu().double()  # numbers that go with tensors of any device
    x = x.detach()
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        with torch.set_grad_enabled(differentiate):
            seen = method.network_input(x, sigma).requires_grad_(differentiate)
            x0 = model(seen, sigma.expand(len(x)), **extra_args)
        with torch.no_grad():
            denoised = x0.detach()
            prior_mean = method.untilted(denoised, levels[i])
            innovation, fit = space.innovation(denoised, prior_mean, levels[i], last=bool(sigma_next == 0))
            if callback is not None:
                callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised, "residual": fit})
            target, change = method.step(seen, x0, innovation, levels[i], levels[i + 1])
            deviation = spread * float(levels[i] ** -2 + tau**-2) ** -0.5
            x = ddim_step(x, target, sigma, sigma_next, eta, noise, deviation) + change
            if free is not None and sigma_next == 0 and pixels and w > 0:
                # No closed form meets what of y the free pixels can meet.
                part = reachable(measurement, free)
                x, _ = match_by_decoder(denoised, part, None, last_steps, noise_norm(part), last=True, free=free)
    return x


class Dual:
    """The default weight: a multiplier nu for the constraint A x0 = y, carried from step to step.

    Given x at sigma, tilting the network's p(x0 | x) by exp(nu . A x0) is the same as giving it x + sigma^2 A^T nu. For a
    Gaussian prior the tilted mean is the posterior mean E[x0 | x, y] where A x0 + noise^2 nu = y. One Newton step towards that,
    with C = r^2 I as the covariance of x0 given x, r^2 = sigma^2 tau^2 / (sigma^2 + tau^2), is

        d = (r^2 A A^T + noise^2)^-1 (y - A x0 - noise^2 nu),    x0c = x0 + r^2 A^T d,    nu <- nu + d

    which is PiGDM's guidance in place of a gradient, x0c its linearised result: with one call a step, and without a Jacobian,
    later steps make up for what the linearisation and C lack, instead of starting anew. x itself stays a sample of the posterior
    at noise level sigma, so that the DDIM step from x0c is exact for a Gaussian prior with that C, with noise as without.

    Three measures for few and for many steps. The tilt is meant to look to the network like the noise that it replaces: its
    length in units of sigma is kept between steps, that is nu grows by sqrt((sigma^2 + k) / (sigma_next^2 + k)) with k = noise^2
    / l, the noise of a direction in units of x. Steps smaller than a factor of e^(1/4) in sigma add only a share of d. And
    `reach` bounds the length, per image.

    The step to sigma 0 is the result, in which too large an r lets the noise in, and a network's x0 is often nearer to the truth than
    C says. Where x0 is nearer to y than C has it, the correction is for an error of the size that its residual tells. Part of that
    nearness is nu's doing, so that the result of an exact denoiser of a Gaussian errs up to 1 % more for it; that of a network mostly
    errs less (benchmarks/results/latent_tuning.md).
    """

    RATE = 4.0  # Newton steps for each factor of e in sigma

    def __init__(self, space: Space, tau: float, reach: float) -> None:
        self.space, self.tau, self.reach = space, tau, reach
        self.nu: Tensor | None = None
        self.shift: Tensor | None = None  # A^T nu

    def network_input(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x.clone() if self.shift is None else x + sigma**2 * self.shift

    def variance(self, sigma: Tensor) -> Tensor:
        """r^2"""
        return 1 / (1 / sigma**2 + self.tau**-2)

    def untilted(self, x0: Tensor, sigma: Tensor) -> Tensor:
        """What the network would say without nu, were C its covariance: x0 holds what the steps before learnt of y."""
        return x0 if self.shift is None else x0 - self.variance(sigma).to(x0) * self.shift

    def step(
        self, seen: Tensor, x0: Tensor, innovation: Tensor, sigma: Tensor, sigma_next: Tensor
    ) -> tuple[Tensor, Tensor | float]:
        """x0c, and 0. innovation: of x0."""
        space, s, t = self.space, sigma, sigma_next
        variance, n = self.variance(s), space.noise**2
        nu = torch.zeros_like(innovation) if self.nu is None else self.nu
        d = space.gram(innovation - n * nu, lambda values: 1 / (values * variance + n))
        target = x0 + variance.to(x0) * space.adjoint(d)
        if t == 0 and n > 0:
            target = space.settled(x0, float(variance) ** 0.5, target)
        if t > 0:
            nu = nu + (1 - (t / s) ** self.RATE).to(d) * d
            nu = space.gram(nu, lambda values: ((values * s**2 + n) / (values * t**2 + n)).sqrt())
            shift = space.adjoint(nu)
            length = t.to(shift) * shift.flatten(1).square().mean(1).sqrt()
            share = (self.reach / length.clamp(min=torch.finfo(shift.dtype).tiny)).clamp(max=1)
            self.nu, self.shift = per_image(share, nu) * nu, per_image(share, shift) * shift
        return target, 0.0


class Guidance:
    """The weights without memory, integrated exactly or, for comparison, by the rules of PiGDM."""

    def __init__(self, space: Space, weight: Weight, jacobian: str, integrator: str, lam: float) -> None:
        self.space, self.weight, self.jacobian, self.integrator, self.lam = space, weight, jacobian, integrator, lam
        self.project = isinstance(weight, Paper) and weight.w == float("inf")

    def network_input(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x.clone()

    def untilted(self, x0: Tensor, sigma: Tensor) -> Tensor:
        return x0

    def step(self, seen: Tensor, x0: Tensor, innovation: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
        """x0, and what to add after the DDIM step from it."""
        space, weight, s, t = self.space, self.weight, sigma, sigma_next
        denoised = x0.detach()

        def back(h: Spectral) -> Tensor:
            return space.adjoint(space.gram(innovation, h))

        def omega(values: Tensor) -> Tensor:
            return weight.omega_rate(values, s)

        if self.project:
            return denoised, space.full(innovation)
        if self.integrator != "conjugate":
            length = s**2 if self.integrator == "discrete" else (s - t) * s
            push = back(lambda values: length * omega(values))
            return denoised, push if self.jacobian == "off" else vjp(x0, seen, push)
        if t == 0 and space.noise == 0 and not (isinstance(weight, Paper) and weight.w == 0):
            return denoised, space.full(innovation)  # theta of the paper's weight is not 0 at sigma = 0; the result is to agree
        if self.lam:
            eps, step = (seen.detach() - denoised) / s.to(x0), over_compensated(weight, s, t, self.lam)
            change = back(step.c_rate) + space.apply(denoised, lambda v: step.a(v) + v * step.c_rate(v) - 1)
            change = change + space.apply(eps, lambda v: step.a(v) * s + step.b(v) - t)
        else:
            change = back(pull(weight, s, t))
        if self.jacobian != "off":
            push = back(omega)
            turn = (push - vjp(x0, seen, push)) / s.to(x0)
            change = change + space.apply(turn, psi(weight, s, t, space.top, self.jacobian == "vp", self.lam))
        return denoised, change


def _check_numbers(*, w: float, tau: float | None, reach: float, spread: float, lam: float, stop: float) -> None:
    if not w >= 0:
        raise ValueError(f"w: got {w}, expected a number >= 0")
    if not 0 <= spread < float("inf"):
        raise ValueError(f"spread: got {spread}, expected a finite number >= 0")
    for name, value in (("tau", 1.0 if tau is None else tau), ("reach", reach)):
        if value is None or not value > 0:
            raise ValueError(f"{name}: got {value}, expected a number > 0")
    if not 0 <= stop <= 1:
        raise ValueError(f"stop: got {stop}, expected a share from 0 to 1")
    if not abs(lam) < float("inf"):
        raise ValueError(f"lam: got {lam}, expected a finite number")
