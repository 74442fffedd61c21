"""Analytic models with known denoisers, used in place of networks by the sampler tests."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class GaussianMixture:
    """p(x0) = sum_k pi_k N(mu_k, s2_k I + U_k diag(g_k) U_k^T), and the exact denoiser E[x0 | x0 + sigma eps = x]."""

    def __init__(self, pi: Tensor, mu: Tensor, s2: Tensor, u: Tensor, g: Tensor) -> None:
        self.pi, self.mu, self.s2, self.u, self.g = pi, mu, s2, u, g

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x: (B, ...), sigma: (B,) -> (B, ...). Differentiable."""
        d = x.flatten(1)[:, None, :] - self.mu  # (B, K, D)
        noise = sigma[:, None] ** 2 + self.s2  # (B, K)
        along = torch.einsum("bkd,kdr->bkr", d, self.u)
        shrink = self.g / (noise[..., None] + self.g)  # Woodbury: U has orthonormal columns
        solved = (d - torch.einsum("bkr,kdr->bkd", along * shrink, self.u)) / noise[..., None]
        logdet = (self.mu.shape[1] - self.g.shape[1]) * noise.log() + (noise[..., None] + self.g).log().sum(-1)
        log_weight = self.pi.log() - 0.5 * ((d * solved).sum(-1) + logdet)
        score = -(log_weight.softmax(1)[..., None] * solved).sum(1)
        return x + sigma.reshape(-1, *[1] * (x.ndim - 1)) ** 2 * score.reshape(x.shape)


def gaussian(mean: Tensor, variance: float) -> Callable[..., Tensor]:
    """The denoiser of N(mean, variance I)."""

    def model(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        share = (variance / (variance + sigma**2)).reshape(-1, 1, 1, 1)
        return mean + share * (x - mean)

    return model


def alphas_to_sigma(alpha_bar: float) -> float:
    return math.sqrt((1 - alpha_bar) / alpha_bar)
