"""Guidance weights of C-PiGDM and what their exact integration needs, for each singular direction of A.

The guidance of a direction with singular value s, eigenvalue l = s^2 of A^T A, is Omega(sigma) (x_y - x0); the conjugate
transform divides by E(sigma) = exp(-int sigma Omega dsigma). Only ratios of E are ever used: E itself underflows. Everything
is given per l, as Omega / l and ln(...) / l, which stays finite where l goes to 0 and multiplies A^T (y - A x0) in place of
A^+ (y - A x0). With noise = 0 the weights are the same for all directions that A sees, and functions are read at l = 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

NODES = 24  # of the Gauss-Legendre rule
SMALLEST = 1e-30  # stands for the eigenvalue 0 where the limit is meant


class Weight(Protocol):
    """Guidance weight. values: eigenvalues l of A^T A; sigma: noise levels; tensors that broadcast against each other."""

    noise: float

    def omega_rate(self, values: Tensor, sigma: Tensor) -> Tensor:
        """Omega(sigma) / l."""
        ...

    def decay_rate(self, values: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """ln(E(sigma_next) / E(sigma)) / l >= 0 for sigma >= sigma_next, that is -ln(theta) / l."""
        ...


@dataclass(frozen=True)
class Paper:
    """Omega = w rho / (1 + sigma^2), rho = sigma^2 / (sigma^2 + k (1 + sigma^2)), k = noise^2 / l (C-PiGDM, 2405.17673).

    w = 0 is DDIM. Without noise, w = infinity is DDNM (theta = 0), which the caller sees to.

    Attributes:
        w: strength, >= 0.
        noise: standard deviation of the measurement noise, in [-1, 1] units.
    """

    w: float
    noise: float

    def omega_rate(self, values: Tensor, sigma: Tensor) -> Tensor:
        q, n = sigma**2, self.noise**2
        return self.w / (1 + q) * q / (values * q + n * (1 + q))

    def decay_rate(self, values: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        q, r, n = sigma**2, sigma_next**2, self.noise**2
        if n == 0:
            return self.w / 2 * torch.log((1 + q) / (1 + r)) / values
        values = values.clamp(min=SMALLEST)
        total = values + n
        # (w/2) [ln(1 + q) - k/(1 + k) log1p((1 + 1/k) q)] from r to q, arranged so that it can be divided by l = 0.
        ratio, rise = (n + total * q) / (n + total * r), (q - r) / ((1 + q) * (1 + r))
        return self.w / 2 * (torch.log(ratio) / total - torch.log1p(values * rise / (n + values * r / (1 + r))) / values)


@dataclass(frozen=True)
class Bayes:
    """Omega = l / (l r^2 + noise^2), r^2 = sigma^2 tau^2 / (sigma^2 + tau^2): exact for a prior N(., tau^2 I).

    Attributes:
        tau: standard deviation of the prior, in units of the state, > 0; infinity gives r = sigma.
        noise: standard deviation of the measurement noise, in [-1, 1] units.
    """

    tau: float
    noise: float

    def omega_rate(self, values: Tensor, sigma: Tensor) -> Tensor:
        return 1 / (values / (1 / sigma**2 + self.tau**-2) + self.noise**2)

    def decay_rate(self, values: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        r, n, precision = sigma_next**2, self.noise**2, self.tau**-2
        fall = sigma**2 - r
        values = values.clamp(min=SMALLEST)
        a = values + n * precision
        return (fall * precision / a + values / a * (torch.log1p(a * fall / (a * r + n)) / a)) / 2


def pull(weight: Weight, sigma: Tensor, sigma_next: Tensor) -> Callable[[Tensor], Tensor]:
    """l -> (1 - theta) / l, theta = E(sigma) / E(sigma_next)."""

    def function(values: Tensor) -> Tensor:
        values = values.clamp(min=SMALLEST)
        return -torch.expm1(-values * weight.decay_rate(values, sigma, sigma_next)) / values

    return function


def psi(
    weight: Weight, sigma: Tensor, sigma_next: Tensor, top: float, vp: bool, lam: float = 0.0
) -> Callable[[Tensor], Tensor]:
    """l -> Psi = (1 / E(sigma_next)) int_sigma^sigma_next s^2 E(s) p(s) / p(sigma) ds, the integral of the frozen Jacobian term.

    The Jacobian mixes directions, so that p, the course of Omega, has to be the same for all: it is that of the direction
    that A sees best. Where Omega is proportional to one function of sigma, as without noise, nothing is approximate.

    Args:
        weight: of the guidance.
        sigma, sigma_next: scalars.
        top: the largest eigenvalue of A^T A.
        vp: freeze the Jacobian of the variance-preserving state, as the paper does, in place of the k-state's.
        lam: the paper's lambda.
    """

    def course(s: Tensor) -> Tensor:
        p = weight.omega_rate(torch.full_like(s, top), s)
        return s**2 * (p / (1 + s**2).sqrt() if vp else p)

    scale = sigma**2 / course(sigma)
    return _integral(weight, sigma, sigma_next, lam, lambda values, s: course(s) * scale)


@dataclass(frozen=True)
class Coefficients:
    """x+ = a x + b eps + c x_y in each singular direction; functions of l, c of c / l."""

    a: Callable[[Tensor], Tensor]
    b: Callable[[Tensor], Tensor]
    c_rate: Callable[[Tensor], Tensor]


def over_compensated(weight: Weight, sigma: Tensor, sigma_next: Tensor, lam: float) -> Coefficients:
    """The step with the paper's lambda: E is multiplied by exp(lambda t), which one Euler step then takes back.

    t is the time of the paper's variance-preserving process, ln(1 + sigma^2) = 0.1 t + 9.95 t^2. As steps shrink lambda has no
    effect, and with lambda = 0 this is the step of the module's head.
    """
    step = lam * (vp_time(sigma) - vp_time(sigma_next))

    def a(values: Tensor) -> Tensor:
        theta = torch.exp(-values * weight.decay_rate(values.clamp(min=SMALLEST), sigma, sigma_next))
        return (1 - step) * step.exp() * torch.where(values > 0, theta, 1.0)

    def rate(values: Tensor, s: Tensor) -> Tensor:
        return weight.omega_rate(values.clamp(min=SMALLEST), s)

    b = _integral(weight, sigma, sigma_next, lam, lambda values, s: 1 - s**2 * values * rate(values, s))
    c = _integral(weight, sigma, sigma_next, lam, lambda values, s: -s * rate(values, s))
    return Coefficients(a, b, c)


def vp_time(sigma: Tensor) -> Tensor:
    """t of the paper's process (beta from 0.1 to 20) at which the noise level of the k-state is sigma."""
    return ((0.01 + 39.8 * torch.log1p(sigma**2)).sqrt() - 0.1) / 19.9


def _integral(
    weight: Weight, sigma: Tensor, sigma_next: Tensor, lam: float, f: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """l -> (1 / E(sigma_next)) int_sigma^sigma_next E(s) f(l, s) ds, by the Gauss-Legendre rule."""
    nodes, weights = (v.to(sigma) for v in gauss_legendre())
    # E falls away from sigma_next within tau^2 / sigma_next, often a small part of the step: put many nodes there.
    s = sigma_next + (sigma - sigma_next) * nodes**4
    growth = torch.exp(lam * (vp_time(s) - vp_time(sigma_next)))
    factors = -(sigma - sigma_next) * 4 * nodes**3 * weights * growth

    def function(values: Tensor) -> Tensor:
        seen = values.clamp(min=SMALLEST)
        total, unseen = torch.zeros_like(values), values.new_zeros(())
        for node, factor in zip(s, factors, strict=True):  # one at a time: a spectrum may be large
            decay = weight.decay_rate(seen, node, sigma_next) * seen
            total += decay.neg_().exp_() * (factor * f(seen, node))
            unseen = unseen + factor * f(torch.zeros_like(unseen), node)
        return torch.where(values > 0, total, unseen)

    return function


def gauss_legendre() -> tuple[Tensor, Tensor]:
    """Nodes and weights of the Gauss-Legendre rule on [0, 1], float64, from the Jacobi matrix (Golub and Welsch 1969)."""
    k = torch.arange(1, NODES, dtype=torch.float64)
    off = k / (4 * k**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (nodes + 1) / 2, vectors[0] ** 2
