"""Kernels: gain, centroid, moments, direction, size."""

import math

import pytest
import torch
from torch import Tensor

from operators import disk_kernel, gaussian_kernel, image_kernel, motion_kernel

KERNELS = {
    "gaussian": lambda: gaussian_kernel(1.7),
    "gaussian, anisotropic": lambda: gaussian_kernel((3.0, 1.0), angle=30),
    "gaussian, 61 taps": lambda: gaussian_kernel(3.0, 61),
    "disk": lambda: disk_kernel(4.3),
    "disk, small": lambda: disk_kernel(0.3),
    "line": lambda: motion_kernel(9, 37),
    "line, even length": lambda: motion_kernel(6.4, 90),
    "line, short": lambda: motion_kernel(0.5, 20),
    "path": lambda: motion_kernel(25, 10, intensity=0.7, seed=3),
}


def moments(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Centroid (y, x) from the centre tap, y downwards, and the 2 x 2 covariance."""
    h, w = kernel.shape
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) - n // 2 for n in (h, w)), indexing="ij")
    points = torch.stack((y, x))
    centroid = (points * kernel).sum((1, 2))
    centred = points - centroid[:, None, None]
    return centroid, torch.einsum("ihw,jhw,hw->ij", centred, centred, kernel)


@pytest.mark.parametrize("name", KERNELS)
def test_gain_centroid_and_type(name: str) -> None:
    kernel = KERNELS[name]()
    assert kernel.dtype == torch.float64
    assert kernel.ndim == 2
    assert abs(float(kernel.sum()) - 1) < 1e-14
    assert (kernel >= 0).all()
    assert moments(kernel)[0].abs().max() < 1e-12
    assert torch.equal(kernel, KERNELS[name]())


def test_gaussian_moments_and_direction() -> None:
    torch.testing.assert_close(
        moments(gaussian_kernel(2.0, 41))[1], 4 * torch.eye(2, dtype=torch.float64), rtol=1e-6, atol=1e-9
    )
    covariance = moments(gaussian_kernel((3.0, 1.5), 61, angle=0))[1]
    torch.testing.assert_close(covariance, torch.diag(torch.tensor([2.25, 9.0], dtype=torch.float64)), rtol=1e-6, atol=1e-9)
    cos, sin = math.cos(math.radians(30)), math.sin(math.radians(30))
    along = torch.tensor([-sin, cos], dtype=torch.float64)  # up and to the right
    covariance = moments(gaussian_kernel((3.0, 1.5), 61, angle=30))[1]
    torch.testing.assert_close(float(along @ covariance @ along), 9.0, rtol=1e-6, atol=0)
    torch.testing.assert_close(gaussian_kernel(2.0, 15, angle=77), gaussian_kernel(2.0, 15))


def test_straight_motion() -> None:
    torch.testing.assert_close(motion_kernel(5)[2], torch.full((5,), 0.2, dtype=torch.float64))
    torch.testing.assert_close(motion_kernel(4, 0)[2], torch.tensor([0.5, 1, 1, 1, 0.5], dtype=torch.float64) / 4)
    torch.testing.assert_close(motion_kernel(4, 90), motion_kernel(4, 0).T)
    torch.testing.assert_close(motion_kernel(7.3, 200), motion_kernel(7.3, 20))
    diagonal = motion_kernel(3 * math.sqrt(2), 45)
    torch.testing.assert_close(diagonal, torch.eye(3, dtype=torch.float64).flip(0) / 3)  # up and to the right
    assert motion_kernel(0.7, 33).shape == (1, 1)


@pytest.mark.parametrize("angle", [0, 13, 45, 60, 90, 135, 170])
def test_straight_motion_is_exact_below_a_pixel(angle: float) -> None:
    """Against a brute-force rasterisation, and its spread against length^2 / 12."""
    length = 11.37
    kernel = motion_kernel(length, angle)
    t = (torch.arange(2_000_000, dtype=torch.float64) + 0.5) / 2_000_000 * length - length / 2
    h, w = kernel.shape
    row = (-t * math.sin(math.radians(angle))).round().long() + h // 2
    column = (t * math.cos(math.radians(angle))).round().long() + w // 2
    assert ((row >= 0) & (row < h) & (column >= 0) & (column < w)).all()
    expected = torch.bincount(row * w + column, minlength=h * w).double().reshape(h, w) / len(t)
    torch.testing.assert_close(kernel, expected, rtol=0, atol=2e-6)
    along = torch.tensor([-math.sin(math.radians(angle)), math.cos(math.radians(angle))], dtype=torch.float64)
    assert abs(float(along @ moments(kernel)[1] @ along) - length**2 / 12) < 0.35


def test_random_path() -> None:
    one, two = (motion_kernel(30, 0, intensity=0.5, seed=seed) for seed in (1, 2))
    assert one.shape != two.shape or not torch.equal(one, two)
    for intensity in (1e-9, 0.2, 1.0, 3.0):
        kernel = motion_kernel(20, 25, intensity=intensity, seed=7)
        assert (kernel > 0).sum() >= 20 / (1 + 10 * intensity)
        assert moments(kernel)[0].abs().max() < 1e-12
    # Hardly bent, it is the straight line, seen through the bilinear spread.
    gap = moments(motion_kernel(20, 25, intensity=1e-9))[1] - moments(motion_kernel(20, 25))[1]
    assert gap.abs().max() < 0.5


def test_disk() -> None:
    kernel = disk_kernel(5.5)
    assert kernel.shape == (11, 11)
    torch.testing.assert_close(kernel, kernel.T)
    torch.testing.assert_close(kernel, kernel.flip(0))
    torch.testing.assert_close(
        moments(kernel)[1].diagonal(), torch.full((2,), 5.5**2 / 4 + 1 / 12, dtype=torch.float64), rtol=0.01, atol=0
    )
    assert abs(float(kernel[5, 5]) * math.pi * 5.5**2 - 1) < 0.01
    assert (disk_kernel(2.0) - disk_kernel(2.01)).abs().max() < 0.01


def test_sizes() -> None:
    assert gaussian_kernel(1.0).shape == (9, 9)
    assert gaussian_kernel(1.0, 5).shape == (5, 5)
    assert gaussian_kernel((2.0, 1.0), (4, 7)).shape == (4, 7)
    assert disk_kernel(3.0, 15).shape == (15, 15)
    assert motion_kernel(9, 0, 21).shape == (21, 21)
    assert motion_kernel(9, 0, 21, intensity=0.4).shape == (21, 21)
    torch.testing.assert_close(motion_kernel(9, 30, 21)[6:-6, 6:-6], motion_kernel(9, 30, 9))


def test_image_kernel() -> None:
    picture = torch.rand(3, 6, 5)
    kernel = image_kernel(picture)
    torch.testing.assert_close(kernel, (picture.double().mean(0) / picture.double().mean(0).sum()))
    torch.testing.assert_close(image_kernel(picture[0]), picture[0].double() / picture[0].double().sum())


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: gaussian_kernel(0), "sigma"),
        (lambda: gaussian_kernel((1.0, -2.0)), "sigma"),
        (lambda: gaussian_kernel(math.nan), "sigma"),
        (lambda: gaussian_kernel((1.0, 2.0, 3.0)), "sigma: got"),
        (lambda: gaussian_kernel((2.0, 1.0), angle=math.nan), "angle: got"),
        (lambda: gaussian_kernel(1.0, 0), "size"),
        (lambda: gaussian_kernel(1.0, (3,)), "size: got"),
        (lambda: gaussian_kernel(1.0, 2.5), "size"),
        (lambda: disk_kernel(-1), "radius"),
        (lambda: disk_kernel(math.inf), "radius"),
        (lambda: motion_kernel(0), "length"),
        (lambda: motion_kernel(1e12, intensity=0.5), "length: got"),
        (lambda: motion_kernel(5, math.nan), "angle"),
        (lambda: motion_kernel(5, 0, intensity=-1), "intensity"),
        (lambda: image_kernel(torch.zeros(3, 3)), "image"),
        (lambda: image_kernel(torch.zeros(0, 3)), "image"),
        (lambda: image_kernel(torch.tensor([[1.0, -1.0]])), "image"),
        (lambda: image_kernel(torch.tensor([[1.0, math.nan]])), "image"),
        (lambda: image_kernel(torch.zeros(1, 1, 3, 3)), "image"),
    ],
)
def test_errors_name_the_argument(make: object, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        make()
