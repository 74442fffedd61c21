"""A Gaussian mixture with low-rank covariances, its exact posterior under a linear measurement, and a distance to it."""

import math

import torch
from torch import Tensor

F64 = torch.float64


class Mixture:
    """p(x0) = sum_k pi_k N(mu_k, s2_k I + U_k diag(g_k) U_k^T).

    As `support.analytic.GaussianMixture`, with a denoiser made of two matrix products, which is some 20 times faster for
    thousands of samples, and with what is needed to sample and condition.

    Args:
        pi (K), mu (K, D), s2 (K), u (K, D, R) with orthonormal columns, g (K, R): float64.
    """

    def __init__(self, pi: Tensor, mu: Tensor, s2: Tensor, u: Tensor, g: Tensor) -> None:
        self.pi, self.mu, self.s2, self.g = pi, mu, s2, g
        self.axes = u.transpose(0, 1).flatten(1)  # (D, K R)
        self.along_mu = torch.einsum("kd,kdr->kr", mu, u)
        self.covariance = s2[:, None, None] * torch.eye(mu.shape[1], dtype=F64) + torch.einsum("kdr,kr,ker->kde", u, g, u)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x0 + sigma eps = x]. x: (B, ...), sigma: (B,). Differentiable."""
        flat = x.flatten(1)
        noise = sigma[:, None] ** 2 + self.s2  # (B, K)
        along = (flat @ self.axes).unflatten(1, self.g.shape) - self.along_mu  # (B, K, R)
        shrink = self.g / (noise[..., None] + self.g)
        square = flat.square().sum(1, keepdim=True) - 2 * flat @ self.mu.T + self.mu.square().sum(1)
        logdet = (flat.shape[1] - self.g.shape[1]) * noise.log() + (noise[..., None] + self.g).log().sum(-1)
        weight = (self.pi.log() - ((square - (shrink * along**2).sum(-1)) / noise + logdet) / 2).softmax(1) / noise
        turned = (weight[..., None] * shrink * along).flatten(1) @ self.axes.T
        score = weight @ self.mu - weight.sum(1, keepdim=True) * flat + turned
        return x + sigma.reshape(-1, *[1] * (x.ndim - 1)) ** 2 * score.reshape(x.shape)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, D)"""
        return _draw(self.pi, self.mu, torch.linalg.cholesky(self.covariance), n, generator)

    def posterior(self, matrix: Tensor, y: Tensor, noise: float) -> "Posterior":
        """Given y = matrix x0 + noise n. matrix: (m, D), y: (m,). Without noise on what the matrix sees, exactly."""
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        seen = s > 1e-6 * s[0]
        vt, z, spread = vt[seen], (u.T @ y)[seen] / s[seen], torch.diag((noise / s[seen]) ** 2)
        weights, means, covariances = [], [], []
        for pi, mu, covariance in zip(self.pi, self.mu, self.covariance, strict=True):
            evidence = torch.linalg.cholesky(vt @ covariance @ vt.T + spread)
            gain = torch.cholesky_solve(vt @ covariance, evidence).T
            miss = z - vt @ mu
            white = torch.linalg.solve_triangular(evidence, miss[:, None], upper=False)
            weights.append(pi.log() - white.square().sum() / 2 - evidence.diagonal().log().sum())
            means.append(mu + gain @ miss)
            covariances.append(covariance - gain @ vt @ covariance)
        share = torch.stack(weights).softmax(0)
        alive = share > 1e-12  # most modes are ruled out
        values, vectors = torch.linalg.eigh(torch.stack(covariances)[alive])
        return Posterior(share[alive], torch.stack(means)[alive], vectors * values.clamp(min=0).sqrt()[:, None])


class Posterior:
    """sum_k w_k N(mean_k, root_k root_k^T)."""

    def __init__(self, weights: Tensor, means: Tensor, roots: Tensor) -> None:
        self.weights, self.means, self.roots = weights, means, roots

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, D)"""
        return _draw(self.weights, self.means, self.roots, n, generator)


def _draw(weights: Tensor, means: Tensor, roots: Tensor, n: int, generator: torch.Generator) -> Tensor:
    k = torch.multinomial(weights, n, replacement=True, generator=generator)
    noise = torch.randn(n, means.shape[1], generator=generator, dtype=F64)
    return means[k] + torch.einsum("nij,nj->ni", roots[k], noise)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased: 0 on average for two samples of one distribution. (n, D), (m, D)."""
    n, m = len(x), len(y)
    within = torch.cdist(x, x).sum() / (n * (n - 1)) + torch.cdist(y, y).sum() / (m * (m - 1))
    return float(2 * torch.cdist(x, y).mean() - within)


def karras(n: int, high: float, low: float = 0.02, rho: float = 7.0) -> Tensor:
    """n noise levels from high to low (Karras et al. 2022, eq. 5), and 0."""
    ramp = torch.linspace(high ** (1 / rho), low ** (1 / rho), n, dtype=F64)
    return torch.cat([ramp**rho, torch.zeros(1, dtype=F64)])


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    v = torch.tensor(values, dtype=F64)
    return float(v.mean()), float(v.std() / math.sqrt(len(v)))
