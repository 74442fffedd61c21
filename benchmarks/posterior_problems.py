"""What posterior.py solves: problems whose exact posterior can be sampled, on pixels and through a decoder."""

import math
import pathlib
from typing import Any

import numpy as np
import torch
from support.mixture import F64, Mixture, energy_distance, karras
from torch import Tensor

from operators import AreaDownscale, Dense, LinearOperator, Mask, Measurement, gaussian_kernel
from operators.separable import Separable, convolution_matrix
from samplers import fill_unseen, sample_cpigdm
from samplers.pixels import noise_norm

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden"
TRUTHS, EXACT = 12, 1024
SHAPE = (3, 8, 8)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def arrays(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files if file[key].dtype == np.float64}


# On pixels ---------------------------------------------------------------------------------------------------------------


GMM = arrays("prior_gmm")
PRIOR = Mixture(GMM["pi"], GMM["mu"], GMM["s2"], GMM["U"], GMM["g"])


def blur() -> LinearOperator:
    """Gaussian, sigma 1, zero boundary; 1-D singular values below 0.03 are nulled, as in the paper's program."""
    taps = gaussian_kernel(1.0, 7).sum(0).double()
    u, s, vt = torch.linalg.svd(convolution_matrix(taps / taps.sum(), SHAPE[1], "zero"))
    matrix = u @ torch.diag(torch.where(s < 0.03, 0.0, s)) @ vt
    return Separable(matrix, matrix, SHAPE[0])


OPERATORS = {
    "area x4": AreaDownscale(SHAPE, 4),
    "box": Mask((1 - GMM["box"]).expand(1, *SHAPE)),
    "blur": blur(),
}


def matrix_of(operator: LinearOperator) -> Tensor:
    pixels = math.prod(operator.in_shape)
    return operator.A(torch.eye(pixels, dtype=F64).reshape(-1, *operator.in_shape)).flatten(1).T


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """In pieces that stay in the processor's cache."""
    return torch.cat([PRIOR.denoise(a, b) for a, b in zip(x.split(384), sigma.split(384), strict=True)])


class Problem:
    """One operator and noise level: truths, measurements, exact samples, and start noise for every sample."""

    def __init__(self, name: str, noise: float, samples: int, seed: int = 0) -> None:
        self.name, self.noise, self.samples, self.operator = name, noise, samples, OPERATORS[name]
        self.matrix = matrix_of(self.operator)
        truth = PRIOR.sample(TRUTHS, generator(100 + seed)).reshape(-1, *SHAPE)
        clean = self.operator.A(truth)
        y = clean + noise * torch.randn(clean.shape, generator=generator(101 + seed), dtype=F64)
        y = y * (self.matrix.abs().sum(1) > 0).reshape(clean.shape[1:])  # a mask's lost pixels are zero, not noise
        self.exact = []
        for i in range(TRUTHS):
            self.exact.append(PRIOR.posterior(self.matrix, y[i].flatten(), noise).sample(EXACT, generator(200 + i + seed)))
        self.measurement = Measurement(y.repeat_interleave(samples, 0), self.operator, noise)
        self.eps = torch.randn(len(self.measurement.y), *SHAPE, generator=generator(102 + seed), dtype=F64)
        self.fill = fill_unseen(self.measurement)

    def start(self, sigma: float | Tensor) -> Tensor:
        return self.fill + sigma * self.eps

    def score(self, x: Tensor) -> list[float]:
        """The energy distance of each truth's samples to the exact ones."""
        parts = x.flatten(1).split(self.samples)
        return [energy_distance(a, b) for a, b in zip(parts, self.exact, strict=True)]


# In a latent space -------------------------------------------------------------------------------------------------------


class Latent:
    """The 64-d latent mixture of tests/golden/psld_toy_model.npz, its decoder, and a mask that keeps 20 % of the pixels."""

    SAMPLES = 64

    def __init__(self, bent: bool) -> None:
        toy = arrays("psld_toy_model")
        self.toy, self.bent = toy, bent
        self.prior = Mixture(toy["pi"], toy["mu"], toy["s2"], toy["U"], toy["g"])
        self.operator = Mask((torch.rand(1, 1, 8, 8, generator=generator(3)) < 0.2).expand(1, *SHAPE))
        kept = self.operator.A(torch.ones(1, *SHAPE, dtype=F64)).flatten() > 0
        self.matrix, self.offset = toy["Wd"][kept], toy["bd"][kept]
        z = self.prior.sample(TRUTHS, generator(7))
        self.images = self.decode(z.reshape(-1, 4, 4, 4))
        self.linear_y = z @ self.matrix.T
        self.exact = []
        for i in range(TRUTHS):
            self.exact.append(self.prior.posterior(self.matrix, self.linear_y[i], 0.0).sample(EXACT, generator(200 + i)))
        self.eps = torch.randn(TRUTHS * self.SAMPLES, 4, 4, 4, generator=generator(11), dtype=F64)

    def decode(self, z: Tensor) -> Tensor:
        image = z.flatten(1) @ self.toy["Wd"].T + self.toy["bd"]
        return (image.tanh() if self.bent else image).reshape(-1, *SHAPE)

    def encode(self, image: Tensor) -> Tensor:
        flat = image.flatten(1)
        flat = flat.clamp(-0.999, 0.999).atanh() if self.bent else flat
        return (flat @ self.toy["We"].T + self.toy["be"]).reshape(-1, 4, 4, 4)

    def measurement(self, noise: float) -> Measurement:
        y = self.operator.A(self.images)
        y = y + noise * self.operator.A(torch.randn(y.shape, generator=generator(12), dtype=F64))
        return Measurement(y.repeat_interleave(self.SAMPLES, 0), self.operator, noise)

    def run(self, n: int, noise: float = 0.0, **options: Any) -> Tensor:
        measurement = self.measurement(noise)
        x = self.encode(fill_unseen(measurement)) + 14.6 * self.eps
        sigmas = karras(n, 14.6, 0.03)
        return sample_cpigdm(self.prior.denoise, x, sigmas, measurement=measurement, autoencoder=self, **options)

    def ideal(self, n: int, **options: Any) -> Tensor:
        """Consistency solved exactly: for this mask the measurement is a linear one of the latent, with either decoder."""
        operator = Dense(self.matrix, (4, 4, 4), (1, 1, len(self.matrix)))
        y = self.linear_y.repeat_interleave(self.SAMPLES, 0).reshape(-1, 1, 1, len(self.matrix))
        x = self.encode(fill_unseen(self.measurement(0.0))) + 14.6 * self.eps
        options = {"tau": 1.0, **options}
        return sample_cpigdm(self.prior.denoise, x, karras(n, 14.6, 0.03), measurement=Measurement(y, operator), **options)

    def score(self, z: Tensor) -> list[float]:
        """As of `Problem`."""
        parts = z.flatten(1).split(self.SAMPLES)
        return [energy_distance(a, b) for a, b in zip(parts, self.exact, strict=True)]

    def residual(self, z: Tensor, noise: float) -> list[float]:
        """The mean, the least and the greatest ||A D(z) - y|| / (sigma sqrt(m))."""
        measurement = self.measurement(noise)
        ratio = measurement.residual_norm(self.decode(z)) / noise_norm(measurement)
        return [float(ratio.mean()), float(ratio.min()), float(ratio.max())]
