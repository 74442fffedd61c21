"""What posterior.py compares: the published methods, ours, and the variants of ours that were tried on the way."""

import math
from collections.abc import Callable
from typing import Any

import torch
from support.mixture import F64, karras
from torch import Tensor

from benchmarks.posterior_problems import PRIOR, SHAPE, Problem, denoise, generator
from operators import Measurement
from samplers import sample_cpigdm, sample_psld

Sampler = Callable[[Problem, int], Tensor]


# Published, and ours -----------------------------------------------------------------------------------------------------


# What the exact denoiser of a prior of about unit variance can take; the sampler's own settings are those for trained networks.
EXACT = {"tau": 1.0, "reach": 2.0, "eta": 1.0}


def ours(problem: Problem, n: int, high: float = 5.0, low: float = 0.05, **options: Any) -> Tensor:
    options = options if "weight" in options else {**EXACT, **options}
    return sample_cpigdm(denoise, problem.start(high), karras(n, high, low), measurement=problem.measurement, **options)


def paper(problem: Problem, n: int, w: float, noise: float) -> Tensor:
    """As published: uniform in the time of its process, t from 0.4 to 0.001 (sigma 2.03 to 0.0105), the last x is the result."""
    t = torch.linspace(0.4, 0.001, n + 1, dtype=F64)
    sigmas = torch.expm1(9.95 * t**2 + 0.1 * t).sqrt()
    measurement = Measurement(problem.measurement.y, problem.operator, noise)
    return sample_cpigdm(denoise, problem.start(sigmas[0]), sigmas, measurement=measurement, weight="paper", w=w, jacobian="vp")


def pigdm(problem: Problem, n: int, tau: float, integrator: str = "discrete", eta: float = 1.0) -> Tensor:
    options = {"weight": "bayes", "tau": tau, "integrator": integrator, "jacobian": "k", "eta": eta}
    return sample_cpigdm(denoise, 10 * problem.eps, karras(n, 10.0, 0.02), measurement=problem.measurement, **options)


def dps(problem: Problem, n: int) -> Tensor:
    options = {"omega": 2.0, "gamma": 0.0, "eta": 1.0}
    return sample_psld(denoise, 10 * problem.eps, karras(n, 10.0, 0.02), measurement=problem.measurement, **options)


OURS, SHIPPED = "**ours** (dual)", "ours, with the settings for networks"
# Name -> network passes in a step (a vector-Jacobian product counts as one more), sampler.
METHODS: dict[str, tuple[int, Sampler]] = {
    "C-PiGDM, paper's noise-free form, w = 15": (2, lambda problem, n: paper(problem, n, 15.0, 0.0)),
    "C-PiGDM, paper's noisy form, w = 2": (2, lambda problem, n: paper(problem, n, 2.0, problem.noise)),
    "PiGDM, r = sigma": (2, lambda problem, n: pigdm(problem, n, math.inf)),
    "PiGDM, tau = 1": (2, lambda problem, n: pigdm(problem, n, 1.0)),
    "PiGDM, continuous, by Euler's method": (2, lambda problem, n: pigdm(problem, n, 1.0, "euler", 0.0)),
    "DPS": (2, dps),
    "DDIM, without the photo": (1, lambda problem, n: ours(problem, n, high=10.0, low=0.02, weight="paper", w=0.0, eta=0.0)),
    "DDNM": (1, lambda problem, n: ours(problem, n, low=0.02, weight="paper", w=math.inf, eta=0.0)),
    "C-PiGDM, Bayes weight": (1, lambda problem, n: ours(problem, n, low=0.02, weight="bayes", eta=0.0)),
    SHIPPED: (1, lambda problem, n: ours(problem, n, tau=0.1**0.5, reach=0.3, eta=2.0)),
    OURS: (1, ours),
}


# What was tried on the way --------------------------------------------------------------------------------------------------


class Variant:
    """The dual method in the operator's singular vectors, with every part exchangeable.

    Args:
        tau: as in the sampler.
        rate: Newton steps for each factor of e in sigma; infinity is a full one in every step.
        keep: power with which nu grows as sigma falls; 1 keeps the tilt's length in units of sigma, 0 keeps nu.
        memory: whether nu is kept at all.
        newton: Newton steps on nu with the exact covariance of x0 given x, in place of tau; 0 uses tau. Each evaluates the
            network again, and each covariance stands for as many vector-Jacobian products as there are measurements.
        leak: the constraint is A x0 + (noise^2 + leak) nu = y.
        multistep: linear extrapolation of x0c from the last two steps (DPM-Solver++ 2M).
    """

    def __init__(
        self,
        tau: float = 1.0,
        rate: float = 4.0,
        keep: float = 1.0,
        memory: bool = True,
        newton: int = 0,
        leak: float = 0.0,
        multistep: bool = False,
        eta: float = 1.0,
    ) -> None:
        self.tau, self.rate, self.keep, self.memory = tau, rate, keep, memory
        self.newton, self.leak, self.multistep, self.eta = newton, leak, multistep, eta

    def __call__(self, problem: Problem, n: int) -> Tensor:
        u, s, vt = torch.linalg.svd(problem.matrix, full_matrices=False)
        seen = s > 1e-6
        s, rows = s[seen], s[seen, None] * vt[seen]
        y = problem.measurement.y.flatten(1) @ u[:, seen]
        values, noise = s**2, problem.noise**2
        sigmas, g = karras(n, 5.0, 0.05), generator(7)
        x, nu, before = problem.start(5.0).flatten(1), torch.zeros_like(y), None
        for i in range(n):
            a, b = float(sigmas[i]), float(sigmas[i + 1])
            for repeat in range(max(self.newton, 1)):
                seen_by_network = (x + a**2 * nu @ rows).reshape(-1, *SHAPE)
                x0 = denoise(seen_by_network, torch.full((len(x),), a, dtype=F64)).flatten(1)
                miss = y - x0 @ rows.T - noise * nu
                if self.newton:
                    covariance = self.covariance(seen_by_network, a)
                    inner = rows @ covariance @ rows.T + (noise + 1e-8) * torch.eye(len(s), dtype=F64)
                    d = torch.linalg.solve(inner, miss[..., None])[..., 0]
                    corrected = x0 + torch.einsum("nde,ne->nd", covariance, d @ rows)
                else:
                    variance = 1 / (1 / a**2 + 1 / self.tau**2)
                    corrected = x0 + variance * (miss / (values * variance + noise)) @ rows
                    d = (miss - self.leak * nu) / (values * variance + noise + self.leak)
                if repeat < self.newton - 1:
                    nu = nu + d
            share = 1 - (b / a) ** self.rate
            growth = ((a**2 + noise / values) / (b**2 + noise / values)) ** (self.keep / 2) if b else 1.0
            nu = growth * (nu + share * d) if self.memory else torch.zeros_like(nu)
            target = corrected
            if self.multistep and before is not None and b:
                last, ratio = before
                target = corrected + (corrected - last) * math.log(a / b) / math.log(ratio) / 2
            before = corrected, a / b if b else 1.0
            up = self.eta * b * math.sqrt(max(1 - (b / a) ** 2, 0))
            x = target + math.sqrt(b**2 - up**2) / a * (x - target)
            x = x + up * torch.randn(x.shape, generator=g, dtype=F64)
        return x.reshape(-1, *SHAPE)

    @staticmethod
    def covariance(x: Tensor, sigma: float) -> Tensor:
        """sigma^2 times the denoiser's Jacobian, (B, D, D)."""

        def one(v: Tensor) -> Tensor:
            return PRIOR.denoise(v.reshape(1, *SHAPE), torch.tensor([sigma], dtype=F64)).flatten()

        return sigma**2 * torch.func.vmap(torch.func.jacrev(one), chunk_size=64)(x.flatten(1))


VARIANTS: dict[str, Sampler] = {
    "ours": ours,
    "no noise added (eta = 0)": lambda problem, n: ours(problem, n, eta=0.0),
    "eta = 0.7": lambda problem, n: ours(problem, n, eta=0.7),
    "start at sigma 2": lambda problem, n: ours(problem, n, high=2.0),
    "start at sigma 15": lambda problem, n: ours(problem, n, high=15.0),
    "last sigma 0.02": lambda problem, n: ours(problem, n, low=0.02),
    "tau = 0.5": lambda problem, n: ours(problem, n, tau=0.5),
    "tau = 2": lambda problem, n: ours(problem, n, tau=2.0),
    "reach = 1": lambda problem, n: ours(problem, n, reach=1.0),
    "reach = 0.5": lambda problem, n: ours(problem, n, reach=0.5),
    "a full Newton step each time (rate = infinity)": Variant(rate=math.inf),
    "rate = 8": Variant(rate=8.0),
    "rate = 2": Variant(rate=2.0),
    "nu kept, not its length (keep = 0)": Variant(keep=0.0),
    "keep = 0.5": Variant(keep=0.5),
    "leak = 0.1": Variant(leak=0.1),
    "no memory: PiGDM's weight, no Jacobian": Variant(memory=False),
    "2M extrapolation": Variant(multistep=True, eta=0.0),
    "Bayes weight, eta = 1": lambda problem, n: ours(problem, n, weight="bayes", eta=1.0),
    "Bayes weight with Jacobian (2 passes a step)": lambda problem, n: ours(problem, n, weight="bayes", eta=0.0, jacobian="k"),
}
# With the exact covariance: far more expensive, so fewer samples.
COSTLY: dict[str, Sampler] = {
    "ours, as many samples as the rows below": ours,
    "moment matching: exact covariance, no memory": Variant(newton=1, memory=False),
    "exact covariance, with memory": Variant(newton=1, keep=0.0, rate=math.inf),
    "exact covariance, 3 Newton steps (3 calls a step)": Variant(newton=3, keep=0.0, rate=math.inf),
}
