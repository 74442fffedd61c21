"""Blur kernel makers. Each returns an (h, w) float64 tensor with sum 1 and its centre at (h // 2, w // 2).

Lengths are in pixels. Angles are in degrees, counter-clockwise from the horizontal as the picture is seen (rows run down).
"""

import itertools
import math

import torch
from torch import Tensor

from .checks import as_finite, as_pair

MAX_SIDE = 8192  # of a kernel: half a gigabyte


def gaussian_kernel(
    sigma: float | tuple[float, float], size: int | tuple[int, int] | None = None, angle: float = 0.0
) -> Tensor:
    """exp(-u^2 / (2 sigma_u^2) - v^2 / (2 sigma_v^2)) at the pixel centres.

    Args:
        sigma: standard deviation > 0, or (sigma_u, sigma_v) along and across `angle`.
        size: taps, one number or (height, width); None covers 4 sigma each way.
        angle: direction of sigma_u.
    """
    sigmas = tuple(sigma) if isinstance(sigma, tuple | list) else (sigma, sigma)
    if len(sigmas) != 2:
        raise ValueError(f"sigma: got {sigma!r}, expected one number or two, along and across the angle")
    along, across = (_positive("sigma", s) for s in sigmas)
    y, x = _grid(size, 4 * max(along, across))
    direction = math.radians(float(as_finite("angle", angle)))
    cos, sin = math.cos(direction), math.sin(direction)
    u, v = x * cos - y * sin, x * sin + y * cos
    # Along the axes the exponent is a sum of a row and a column part, and the kernel stays separable to rounding.
    return _normalised(torch.exp(-0.5 * ((u / along).square() + (v / across).square())))


def disk_kernel(radius: float, size: int | tuple[int, int] | None = None) -> Tensor:
    """Out of focus: the share of each pixel that a disk of this radius covers (on 16 x 16 points in each pixel).

    Args:
        radius: > 0, need not be whole.
        size: taps, one number or (height, width); None fits the disk.
    """
    radius = _positive("radius", radius)
    y, x = _grid(size, radius - 0.5)
    points = ((torch.arange(16, dtype=torch.float64) + 0.5) / 16 - 0.5).tolist()
    covered = torch.zeros(len(y), x.shape[1], dtype=torch.float64)
    for down, across in itertools.product(points, points):  # one after the other: all at once they are 256 kernels
        covered += (y + down).square() + (x + across).square() <= radius**2
    return _normalised(covered)


def motion_kernel(
    length: float,
    angle: float = 0.0,
    size: int | tuple[int, int] | None = None,
    intensity: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Camera shake along a line, or along a random path.

    A straight line weighs each pixel by exactly the length that runs through it. A path turns as it goes, like a Brownian
    heading; it is centred on its mean and shared among the four pixels around each point (bilinear), so that the kernel's
    centroid is exactly its centre.

    Args:
        length: of the line or path, > 0.
        angle: its (first) direction.
        size: taps, one number or (height, width); None fits it.
        intensity: 0 is straight; larger bends more (standard deviation of the total turn, in half turns).
        seed: of the path.
    """
    length = _positive("length", length)
    if not (math.isfinite(intensity) and intensity >= 0):
        raise ValueError(f"intensity: got {intensity}, expected a finite number >= 0")
    direction = math.radians(float(as_finite("angle", angle)))
    if intensity == 0:
        return _line(length, math.cos(direction), -math.sin(direction), size)
    if length > 2 * MAX_SIDE:
        raise ValueError(f"length: got {length} pixels, expected at most {2 * MAX_SIDE}")
    steps = 64 * math.ceil(length)
    turns = torch.randn(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    heading = direction + math.pi * intensity * turns.cumsum(0) / math.sqrt(steps)
    path = torch.stack((-heading.sin(), heading.cos()), 1).cumsum(0) * (length / steps)
    path = path - path.mean(0)
    (h, w) = _size(size, float(path.abs().max()) + 0.5)
    corner = path.floor()
    weight = path - corner
    kernel = torch.zeros(h * w, dtype=torch.float64)
    for i, share_y in ((0, 1 - weight[:, 0]), (1, weight[:, 0])):
        for j, share_x in ((0, 1 - weight[:, 1]), (1, weight[:, 1])):
            _deposit(kernel, (h, w), corner + torch.tensor([i, j]), share_y * share_x)
    return _normalised(kernel.reshape(h, w))


def image_kernel(image: Tensor) -> Tensor:
    """Any picture as a kernel: its channels are averaged, and its sum set to 1.

    Args:
        image: (H, W) or (C, H, W), finite, >= 0 and not all 0. An even size keeps its centre at (H // 2, W // 2).
    """
    image = as_finite("image", image)
    if image.ndim not in (2, 3) or image.numel() == 0:
        raise ValueError(f"image: got shape {tuple(image.shape)}, expected (height, width) or (channels, height, width)")
    if bool((image < 0).any()):
        raise ValueError("image: got negative values, expected a picture in [0, 1]")
    return _normalised(image.mean(0) if image.ndim == 3 else image, "image")


def _line(length: float, dx: float, dy: float, size: int | tuple[int, int] | None) -> Tensor:
    """The length of a centred segment of direction (dx, dy), |d| = 1, in each pixel."""
    half = length / 2
    h, w = _size(size, max(half * abs(dx), half * abs(dy)) - 0.5)
    borders = torch.arange(math.ceil(half) + 1, dtype=torch.float64) + 0.5
    crossings = [sign * borders / abs(d) for d in (dx, dy) if abs(d) > 1e-12 for sign in (1, -1)]
    at = torch.cat([*crossings, torch.tensor([half, -half], dtype=torch.float64)]).clamp(-half, half).sort().values
    middle = (at[1:] + at[:-1]) / 2
    kernel = torch.zeros(h * w, dtype=torch.float64)
    _deposit(kernel, (h, w), torch.stack((middle * dy, middle * dx), 1).round(), at.diff())
    return _normalised(kernel.reshape(h, w))


def _deposit(kernel: Tensor, size: tuple[int, int], pixel: Tensor, weight: Tensor) -> None:
    """Add weights (N,) to a flat kernel at pixels (N, 2) counted from its centre; what falls outside is dropped."""
    index = pixel.long() + torch.tensor([size[0] // 2, size[1] // 2])
    inside = (index >= 0).all(1) & (index < torch.tensor(size)).all(1)
    kernel.index_add_(0, index[inside, 0] * size[1] + index[inside, 1], weight[inside])


def _size(size: int | tuple[int, int] | None, reach: float) -> tuple[int, int]:
    """The (h, w) asked for, or the odd square that reaches so many pixels from the centre pixel's centre."""
    if size is None:
        size = 2 * max(math.ceil(reach - 1e-9), 0) + 1
    h, w = as_pair("size", size) if isinstance(size, tuple | list) else (size, size)
    if not all(isinstance(n, int) and 0 < n <= MAX_SIDE for n in (h, w)):
        raise ValueError(f"size: got {size} pixels, expected integers from 1 to {MAX_SIDE}, one or (height, width)")
    return h, w


def _grid(size: int | tuple[int, int] | None, reach: float) -> tuple[Tensor, Tensor]:
    """Rows (h, 1) and columns (1, w) of the pixel centres, counted from the kernel's centre."""
    h, w = _size(size, reach)
    y, x = (torch.arange(n, dtype=torch.float64) - n // 2 for n in (h, w))
    return y[:, None], x[None, :]


def _positive(name: str, value: float) -> float:
    if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: got {value!r}, expected a finite number > 0")
    return float(value)


def _normalised(kernel: Tensor, name: str = "kernel") -> Tensor:
    total = kernel.sum()
    if total == 0:
        raise ValueError(f"{name}: is 0 everywhere, expected at least one positive value")
    return kernel / total
