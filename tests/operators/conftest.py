"""One list of operators, each with its dense matrix, that every property test runs through."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from operators import (
    AreaDownscale,
    BicubicDownscale,
    Blur,
    Crop,
    Dense,
    Grayscale,
    Identity,
    LanczosDownscale,
    LinearOperator,
    Mask,
    Scale,
    Stack,
    box_mask,
    disk_kernel,
    from_deepinv,
    gaussian_kernel,
    motion_kernel,
    random_mask,
    stripe_mask,
)
from operators.base import EIGENVALUE_CUT

S = (3, 13, 18)  # odd, rectangular
D = (3, 12, 18)  # divisible by 2, 3, 6


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kernel(h: int, w: int, seed: int = 0) -> Tensor:
    """Asymmetric, not separable, well conditioned: a dominant tap."""
    taps = torch.rand(h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    taps[h // 2, w // 2] += 0.4 * h * w
    return taps


def gaussian(sigma: float = 0.8) -> Tensor:
    return gaussian_kernel(sigma, (7, 5))


class BoxPhysics:
    """Quacks like a deepinv physics: 2 x 2 sums of one channel."""

    def A(self, x: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(x, 2) * 4

    def A_adjoint(self, y: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(y, scale_factor=2)


# name -> (operator, exact)
CASES: dict[str, tuple[Callable[[], LinearOperator], bool]] = {
    "identity": (lambda: Identity(S), True),
    "scale": (lambda: Scale(S, -1.7), True),
    "mask random": (lambda: Mask(random_mask(S, 0.4, seed=1)), True),
    "mask per channel": (lambda: Mask(random_mask(S, 0.4, seed=1, per_channel=True)), True),
    "mask box": (lambda: Mask(box_mask(S, (5, 7))), True),
    "mask stripes": (lambda: Mask(stripe_mask(S, 4, 2, 1, "both")), True),
    "crop": (lambda: Crop(S, (7, 11), (2, 3)), True),
    "blur @ crop": (lambda: Blur(kernel(3, 5), (3, 7, 11)) @ Crop(S, (7, 11), (2, 3)), True),
    "bicubic @ crop": (lambda: BicubicDownscale((3, 9, 11), 2) @ Crop(S, (9, 11), (0, 7)), True),
    "mask @ crop": (lambda: Mask(random_mask((3, 7, 11), 0.4, seed=1)) @ Crop(S, (7, 11), (6, 0)), True),
    "grayscale": (lambda: Grayscale(S), True),
    "grayscale of two": (lambda: Grayscale((2, 5, 7), (0.3, -1.2)), True),
    "area 1": (lambda: AreaDownscale(S, 1), True),
    "area 3": (lambda: AreaDownscale(D, 3), True),
    "area 4, partial blocks": (lambda: AreaDownscale(S, 4), True),
    "area 7, partial blocks": (lambda: AreaDownscale(S, 7), True),
    "area 15, one row": (lambda: AreaDownscale(S, 15), True),
    "bicubic 2": (lambda: BicubicDownscale(S, 2), True),
    "bicubic 1.7": (lambda: BicubicDownscale(S, 1.7), True),
    "bicubic to 4 x 17": (lambda: BicubicDownscale(S, out_size=(4, 17)), True),
    "bicubic 3, circular": (lambda: BicubicDownscale(D, 3, boundary="circular"), True),
    "bicubic 2.5, circular": (lambda: BicubicDownscale(S, 2.5, boundary="circular"), True),
    "lanczos 3": (lambda: LanczosDownscale(S, 3), True),
    "lanczos 9, wider than the picture": (lambda: LanczosDownscale(S, 9), True),
    "blur circular": (lambda: Blur(kernel(3, 5), S), True),
    "blur circular, even": (lambda: Blur(kernel(4, 2), S), True),
    "blur circular, null directions": (lambda: Blur(torch.ones(3, 3), (2, 9, 12)), True),
    "blur circular, large": (lambda: Blur(kernel(13, 18), S), True),
    "blur zero": (lambda: Blur(gaussian(), S, "zero"), True),
    "blur reflect": (lambda: Blur(gaussian(), S, "reflect"), True),
    "blur replicate": (lambda: Blur(gaussian(), S, "replicate"), True),
    "blur reflect, even": (lambda: Blur(torch.outer(torch.tensor([1.0, 5, 2, 1]), torch.tensor([1.0, 4])), S, "reflect"), True),
    "blur zero, not separable": (lambda: Blur(kernel(3, 5), S, "zero"), False),
    "blur reflect, not separable": (lambda: Blur(kernel(4, 5), S, "reflect"), False),
    "blur replicate, not separable": (lambda: Blur(kernel(5, 2), S, "replicate"), False),
    "blur reflect, a disk": (lambda: Blur(disk_kernel(1.7), (1, 13, 18), "reflect"), False),
    "blur of one row": (lambda: Blur(kernel(1, 5), (3, 1, 18), "reflect"), True),
    "blur of one column": (lambda: Blur(kernel(4, 1), (2, 13, 1), "replicate"), True),
    "blur of one pixel": (lambda: Blur(kernel(1, 1), (1, 1, 1), "reflect"), True),
    "bicubic 7/3": (lambda: BicubicDownscale(S, Fraction(7, 3)), True),
    "blur motion": (lambda: Blur(motion_kernel(3, 30), (1, 13, 18), "replicate"), False),
    "dense wide": (lambda: Dense(seeded(20, 60), (3, 4, 5), (5, 2, 2)), True),
    "dense tall, rank 3": (lambda: Dense(seeded(30, 3) @ seeded(3, 12), (3, 2, 2), (5, 3, 2)), True),
    "mask @ area": (lambda: Mask(random_mask((3, 4, 5), 0.3, 2, True)) @ AreaDownscale(S, 4), True),
    "area @ mask": (lambda: AreaDownscale(S, 4) @ Mask(random_mask(S, 0.7, 3, True)), True),
    "gray @ mask @ area": (
        lambda: Grayscale((3, 4, 5)) @ Mask(random_mask((3, 4, 5), 0.5, 2, True)) @ AreaDownscale(S, 4),
        True,
    ),
    "area @ blur, Fourier": (lambda: AreaDownscale(D, 3) @ Blur(kernel(3, 5), D), True),
    "bicubic @ blur, Fourier": (lambda: BicubicDownscale(D, 2, boundary="circular") @ Blur(kernel(3, 5), D), True),
    "blur @ area, Fourier": (lambda: Blur(kernel(3, 5), (3, 4, 6)) @ AreaDownscale(D, 3), True),
    "area @ area, Fourier": (lambda: AreaDownscale((3, 4, 6), 2) @ Blur(kernel(3, 2), (3, 4, 6)) @ AreaDownscale(D, 3), True),
    "blur @ blur, Fourier": (lambda: Blur(kernel(3, 5), S) @ Blur(kernel(4, 2, 1), S), True),
    "lanczos @ blur, separable": (lambda: LanczosDownscale(S, 2) @ Blur(gaussian(), S, "reflect"), True),
    "bicubic @ circular blur, separable": (lambda: BicubicDownscale(S, 2) @ Blur(gaussian(), S), True),
    "area @ blur, separable": (lambda: AreaDownscale(S, 4) @ Blur(gaussian(), S, "zero"), True),
    "stripes @ blur, separable": (lambda: Mask(stripe_mask(S, 4, 1)) @ Blur(gaussian(), S, "reflect"), True),
    "gray @ blur": (lambda: Grayscale(S) @ Blur(gaussian(), S, "reflect"), True),
    "blur @ gray": (lambda: Blur(kernel(3, 5), (1, 13, 18)) @ Grayscale(S), True),
    "gray @ area @ blur": (lambda: Grayscale((3, 4, 6)) @ AreaDownscale(D, 3) @ Blur(kernel(3, 5), D), True),
    "scale @ bicubic": (lambda: Scale((3, 7, 9), 0.5) @ BicubicDownscale(S, 2), True),
    "dense @ blur": (lambda: Dense(seeded(9, 702), S, (1, 3, 3)) @ Blur(kernel(3, 5), S), True),
    "area @ dense": (lambda: AreaDownscale((1, 4, 4), 2) @ Dense(seeded(16, 60), (3, 4, 5), (1, 4, 4)), True),
    "mask @ blur": (lambda: Mask(random_mask(S, 0.3)) @ Blur(kernel(3, 5), S), False),
    "bicubic @ mask": (lambda: BicubicDownscale(S, 2) @ Mask(random_mask(S, 0.3)), False),
    "stack": (lambda: Stack([Grayscale(S), AreaDownscale(S, 4), Mask(random_mask(S, 0.9))]), False),
    "from_deepinv": (lambda: from_deepinv(BoxPhysics(), (1, 8, 10)), False),
}


@dataclass(frozen=True)
class Case:
    name: str
    operator: LinearOperator
    exact: bool

    def x(self, batch: int = 2, seed: int = 1) -> Tensor:
        return seeded(batch, *self.operator.in_shape, seed=seed)

    def y(self, batch: int = 2, seed: int = 2) -> Tensor:
        return seeded(batch, *self.operator.out_shape, seed=seed)

    @functools.cached_property
    def matrix(self) -> Tensor:
        """(M, N): column j is A applied to pixel j."""
        return as_matrix(self.operator.A, self.operator.in_shape)

    @functools.cached_property
    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (M, M), the eigenvalues of A A^T (M,), of A^T A (N,), V (N, N)."""
        u, s, vt = torch.linalg.svd(self.matrix)
        return u, padded(s**2, len(u)), padded(s**2, len(vt)), vt.T

    @functools.cached_property
    def pinv(self) -> Tensor:
        u, values, _, v = self.svd
        n = min(len(u), len(v))
        seen = values[:n] > EIGENVALUE_CUT[self.operator.precision] * values.max()
        return v[:, :n] * torch.where(seen, values[:n].rsqrt(), 0.0) @ u[:, :n].T


def padded(values: Tensor, n: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, n - len(values)))


def as_matrix(apply: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    n = torch.Size(shape).numel()
    return apply(torch.eye(n, dtype=torch.float64).reshape(n, *shape)).flatten(1).T


@functools.cache
def build(name: str) -> Case:
    make, exact = CASES[name]
    return Case(name, make(), exact)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return build(request.param)


@pytest.fixture(name="as_matrix")
def _as_matrix() -> Callable:
    return as_matrix


@pytest.fixture
def all_cases() -> dict[str, Case]:
    return {name: build(name) for name in CASES}


@pytest.fixture
def rebuild() -> Callable[[str], LinearOperator]:
    return lambda name: CASES[name][0]()
