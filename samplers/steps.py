"""What the samplers share: the autoencoder, the DDIM step, seeded noise, and the vector-Jacobian product through a network.

All in the k-diffusion state x = x0 + sigma * eps; the variance-preserving state is x / sqrt(1 + sigma^2).
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

NoiseSampler = Callable[[], Tensor]


class Autoencoder(Protocol):
    """Between scaled latents (B, c, h, w) and images (B, C, H, W) in [-1, 1]; both directions differentiable.

    An attribute `dtype`, if there is one, is the precision they compute in; without one it is that of what they are given.
    """

    def decode(self, z: Tensor) -> Tensor: ...

    def encode(self, image: Tensor) -> Tensor: ...


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, ...), to broadcast against a batch."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def ancestral_split(sigma: Tensor, sigma_next: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Split sigma_next into a part along the old noise and fresh noise, sigma_next^2 = down^2 + up^2.

    up = eta * sigma_next * sqrt(1 - sigma_next^2 / sigma^2) is DDIM's sigma_eta (Song et al. 2021, eq. 16) in the k-state, at
    most sigma_next: then all noise is fresh.
    """
    up = torch.minimum(eta * sigma_next * (1 - (sigma_next / sigma) ** 2).clamp(min=0).sqrt(), sigma_next)
    return (sigma_next**2 - up**2).clamp(min=0).sqrt(), up


def ddim_step(
    x: Tensor,
    denoised: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    eta: float,
    noise: NoiseSampler,
    deviation: float = 0.0,
) -> Tensor:
    """One DDIM(eta) step from sigma to sigma_next. x, denoised: (B, C, H, W); sigmas: scalars.

    deviation: of x0 around `denoised`, given x. A sample of the next x needs one of x0; with the mean in its place the variance
    lacks (1 - down / sigma)^2 deviation^2 (Bao et al., Analytic-DPM, ICLR 2022), which is added to the fresh noise. Not at
    sigma_next = 0, where x0 itself is the result.
    """
    down, up = ancestral_split(sigma, sigma_next, eta)
    # (down / sigma) (x - x0) and not down * ((x - x0) / sigma): the ratio stays exact when both sigmas are huge.
    x = denoised + (down / sigma) * (x - denoised)
    if deviation and sigma_next > 0:
        up = torch.hypot(up, (1 - down / sigma) * deviation)
    return x + up * noise() if eta > 0 or deviation else x


def noise_sampler(x: Tensor, seed: int | None) -> NoiseSampler:
    """Standard normal noise of x's shape, drawn on the CPU from one generator for each image.

    Image i of a batch draws what image 0 of a run with seed + i draws, so that a batch equals single runs on every device.
    """
    # The start noise of image 0 comes from manual_seed(seed); the constant keeps this stream apart from it.
    generators = [torch.Generator().manual_seed(((seed or 0) + i ^ 0x5DEECE66D) % 2**63) for i in range(len(x))]

    def draw() -> Tensor:
        noise = [torch.randn(x.shape[1:], generator=g, dtype=torch.float32) for g in generators]
        return torch.stack(noise).to(x)

    return draw


def vjp(output: Tensor, inputs: Tensor, cotangent: Tensor, retain_graph: bool = False) -> Tensor:
    """J^T v for output = F(inputs), each image's v scaled to unit maximum on the way.

    A float16 network flushes small cotangents to zero (relative error 0.65 at 1e-6); the product is linear, so that scaling
    costs nothing. The graph of `output` is freed unless `retain_graph`.
    """
    scale = cotangent.flatten(1).abs().amax(1).clamp(min=torch.finfo(cotangent.dtype).tiny)
    scale = per_image(scale, cotangent)
    (product,) = torch.autograd.grad(output, inputs, cotangent / scale, retain_graph=retain_graph)
    return product * scale
