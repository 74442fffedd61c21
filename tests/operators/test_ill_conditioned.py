"""Blurs whose singular values run down to rounding: what float64 allows, and what float32 makes of them."""

import pytest
import torch
from torch import Tensor

from operators import Blur, disk_kernel, gaussian_kernel, motion_kernel
from operators.base import EIGENVALUE_CUT

BOUNDARIES = ("circular", "zero", "reflect", "replicate")
KERNELS = {
    "gaussian 1.5": gaussian_kernel(1.5, 13),
    "gaussian 3": gaussian_kernel(3.0, (13, 9)),
    "gaussian 10": gaussian_kernel(10.0, 13),
    "box": torch.ones(4, 6, dtype=torch.float64),
    "disk": disk_kernel(3.0),
    "motion": motion_kernel(9.0, 30.0),
    "shaken": motion_kernel(9.0, 30.0, intensity=0.7, seed=1),
}


def matrix(apply: object, n: int, shape: tuple[int, ...]) -> Tensor:
    return apply(torch.eye(n, dtype=torch.float64).reshape(n, *shape)).flatten(1).T


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("name", KERNELS)
def test_moore_penrose_as_far_as_float64_goes(name: str, boundary: str) -> None:
    """A singular value s of the largest costs s when it is dropped, and rounding / s when it is kept: 1.5e-8 either way at worst.

    Spread over the pixels that is 2e-9 of the largest entry; a cut of 1e-6 would leave 2e-7.
    """
    shape = (1, 13, 18)
    operator = Blur(KERNELS[name], shape, boundary)
    a, p = matrix(operator.A, 234, shape), matrix(operator.A_dagger, 234, shape)
    for left, right in ((a @ p @ a, a), (p @ a @ p, p), (a @ p, (a @ p).T), (p @ a, (p @ a).T)):
        assert float((left - right).abs().max()) <= 3e-9 * max(1.0, float(right.abs().max()))


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_61_taps(boundary: str) -> None:
    """The same on a picture, image by image; the norms of what a wide blur leaves are the sums of the above."""
    shape = (1, 61, 67)
    operator = Blur(gaussian_kernel(3.0, 61), shape, boundary)
    x, y = (torch.randn(2, *shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1))
    once, back = operator.A(x), operator.A_dagger(y)
    for left, right in ((operator.A(operator.A_dagger(once)), once), (operator.A_dagger(operator.A(back)), back)):
        assert float((left - right).abs().max()) <= 2e-8 * float(right.abs().max())
    for f in (torch.sqrt, lambda v: v / (v + 1e-4), lambda v: torch.exp(-v)):
        twice = operator.spectral(operator.spectral(x, f), f)
        torch.testing.assert_close(operator.spectral(x, lambda v, f=f: f(v).square()), twice, rtol=0, atol=1e-9)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_float32_keeps_to_what_it_resolves(boundary: str) -> None:
    """In float32 nothing is amplified by more than 1e6, and what is amplified by up to 1e3 agrees with float64."""
    shape = (1, 40, 44)
    operator = Blur(gaussian_kernel(2.0, 17), shape, boundary)
    y = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    assert float(operator.A_dagger(y).norm()) <= 1.01 * EIGENVALUE_CUT[torch.float32] ** -0.5 * float(y.norm())
    smooth = operator.spectral(y.double(), lambda v: v > 1e-6)  # singular values above 1e-3
    blurred = operator.A(smooth)
    wide, narrow = operator.A_dagger(blurred), operator.A_dagger(blurred.float())
    rounding = 2**-24 * 1e6 * float(blurred.norm())
    assert float((wide - smooth).norm()) <= 1e-6 * float(smooth.norm())
    assert float((narrow - wide).norm()) <= rounding


def test_a_mirror_symmetric_kernel_under_reflect_is_inverted_directly() -> None:
    """Out of focus at 256 pixels: conjugate gradients would need some 10,000 iterations."""
    operator = Blur(disk_kernel(4.0), (3, 256, 256), "reflect")
    x = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    y = operator.A(x)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-11)):
        met = operator.A(operator.A_dagger(y.to(dtype)))
        assert float((met - y).norm()) <= tolerance * float(y.norm())
    assert torch.equal(operator.project(x), x)
    assert operator.project(x) is not x


def test_float32_drops_the_frequencies_that_it_does_not_resolve() -> None:
    """A disk whose smallest singular value is 2.5e-7: float64 keeps it, and in float32 it is null, as in every other form."""
    operator = Blur(disk_kernel(4.6), (1, 192, 256), "reflect")
    transfer = operator.form._inverse_transfer.value.sqrt()  # of the torus; its smallest entry is the worst cosine
    i, j = divmod(int(transfer.argmin()), transfer.shape[1])
    assert 1e-7 < float(transfer.min() / transfer.max()) < 1e-6
    rows, columns = (torch.cos(torch.pi * k * torch.arange(n) / (n - 1)) for k, n in ((i, 192), (j, 256)))
    worst = torch.outer(rows, columns)[None, None].double()
    assert float(operator.A(worst).norm()) < 1e-6 * float(worst.norm())
    assert torch.equal(operator.project(worst), worst)
    assert float(operator.project(worst.float()).norm()) < 1e-3 * float(worst.norm())
    assert float(operator.A_dagger(worst.float()).norm()) < 1e6 * float(worst.norm())


def test_a_kernel_that_loses_a_frequency_is_not_inverted() -> None:
    """[1, 2, 1] x [1, 2, 1] and a bit: 0 at the highest frequency, which reflection allows."""
    taps = torch.tensor([[0.0, 1, 0], [1, 4, 1], [0, 1, 0]], dtype=torch.float64)
    operator = Blur(taps, (1, 9, 12), "reflect")
    assert not operator.exact
    a, p = matrix(operator.A, 108, (1, 9, 12)), matrix(operator.A_dagger, 108, (1, 9, 12))
    torch.testing.assert_close(p, torch.linalg.pinv(a, rtol=1e-8), rtol=0, atol=1e-9)
