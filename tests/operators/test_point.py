"""A kernel from one point of light, on real photographs with known kernels."""

import math

import pytest
import skimage.data
import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from operators import Blur, disk_kernel, estimate_blur_from_point, gaussian_kernel, motion_kernel

KERNELS = {
    "gaussian": gaussian_kernel(2.0),
    "ellipse": gaussian_kernel((3.0, 1.2), angle=25),
    "disk": disk_kernel(4.3),
    "motion": motion_kernel(13.0, 35.0),
    "shaken hand": motion_kernel(20.0, 70.0, intensity=0.6, seed=3),
    "steep": motion_kernel(9.0, 90.0),
}
# Even parts of photographs, with their own grain: (name, top, left, the point's light by channel).
PLACES = {
    "sky, a dark speck": ("camera", 50, 75, (-1.2,)),
    "wall": ("astronaut", 50, 100, (-1.2, -1.2, -1.2)),
    "dark table": ("coffee", 0, 25, (1.2, 1.2, 1.0)),
    "rocket's sky": ("rocket", 175, 475, (1.2, 1.0, 0.8)),
    "moon": ("moon", 450, 375, (0.8,)),
    "retina, a point without red": ("retina", 675, 975, (0.0, 0.8, 1.2)),
}


def scene(place: str, size: int = 51) -> Tensor:
    name, top, left, _ = PLACES[place]
    photo = torch.from_numpy(getattr(skimage.data, name)()).double() / 127.5 - 1
    photo = photo[None] if photo.ndim == 2 else photo.permute(2, 0, 1)
    return photo[None, :, top : top + size, left : left + size]


def with_point(place: str, kernel: Tensor, noise: float = 0.0, height: float = 1.0, at: tuple[int, int] = (25, 24)) -> Tensor:
    """A photo blurred by the kernel, with a point as bright as the kernel's peak leaves it; noise and 8 bits."""
    x = scene(place)
    light = torch.tensor(PLACES[place][3], dtype=torch.float64)[:, None, None] * height / kernel.max()
    x = x.clone()
    x[0, :, at[0] : at[0] + 1, at[1] : at[1] + 1] += light
    h, w = kernel.shape
    x = pad(x, (w - 1 - w // 2, w // 2, h - 1 - h // 2, h // 2), mode="replicate").transpose(0, 1)
    x = conv2d(x, kernel.flip(0, 1)[None, None]).transpose(0, 1)
    x = x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def aligned(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two kernels on one odd canvas, centre on centre."""
    reach = [max(a.shape[i] // 2, b.shape[i] // 2) for i in (0, 1)]
    canvases = []
    for k in (a, b):
        canvas = torch.zeros([2 * r + 1 for r in reach], dtype=torch.float64)
        top, left = (r - n // 2 for r, n in zip(reach, k.shape, strict=True))
        canvas[top : top + k.shape[0], left : left + k.shape[1]] = k
        canvases.append(canvas)
    return canvases[0], canvases[1]


def gap(found: Tensor, true: Tensor) -> float:
    """Relative distance of two kernels, at the best shift of at most a pixel: where the point was nobody knows."""
    a, b = aligned(pad(found, (1, 1, 1, 1)), true)
    shifts = [a.roll((i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    return min(float((shifted - b).norm() / b.norm()) for shifted in shifts)


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("place", PLACES)
def test_the_kernel_is_found(place: str, noise: float) -> None:
    missed = {}
    for name, kernel in KERNELS.items():
        e = estimate_blur_from_point(with_point(place, kernel, noise))
        assert float(e.kernel.sum()) == pytest.approx(1)
        assert bool((e.kernel >= 0).all())
        assert all(n % 2 == 1 for n in e.kernel.shape)
        missed[name] = gap(e.kernel, kernel)
        assert missed[name] < 3 * e.relative_error + 0.06, name
        light = [v for v in PLACES[place][3] if v]
        assert e.contrast == pytest.approx(sum(light) / len(light), rel=0.3)
    assert max(missed.values()) < 0.2, missed


def test_noise_is_in_the_stated_error() -> None:
    """The error of the taps that hold the light, over draws of the noise."""
    kernel, place = KERNELS["motion"], "moon"
    clean = estimate_blur_from_point(with_point(place, kernel)).kernel
    gaps, stated = [], []
    for seed in range(20):
        x = with_point(place, kernel)
        x = x + 0.03 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
        e = estimate_blur_from_point(x)
        found, true = aligned(e.kernel, clean)
        gaps.append((found - true)[true > 0.02])
        stated.append(e.error)
    spread = float(torch.cat(gaps).square().mean().sqrt())
    assert 0.5 < spread / (sum(stated) / len(stated)) < 1.6


def test_the_kernel_undoes_the_blur() -> None:
    """What the estimate is for: the photo deblurred with it is nearly the photo deblurred with the true kernel."""
    x = torch.from_numpy(skimage.data.camera()).double()[None, None, 100:228, 180:308] / 127.5 - 1
    true, found = KERNELS["shaken hand"], estimate_blur_from_point(with_point("moon", KERNELS["shaken hand"])).kernel
    y = Blur(true, x.shape[1:]).A(x)
    y = y + 0.005 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype)
    error = {}
    for name, kernel in (("true", true), ("found", found)):
        deblurred = Blur(kernel, x.shape[1:]).prox_l2(0 * x, y, 1e3)
        error[name] = float((deblurred - x).square().mean().sqrt())
    assert error["found"] < 1.5 * error["true"]
    assert error["found"] < 0.6 * float((y - x).square().mean().sqrt())


def two_points() -> Tensor:
    kernel = gaussian_kernel(1.5)
    base = scene("moon")
    return with_point("moon", kernel, at=(15, 15)) + with_point("moon", kernel, at=(36, 34)) - base


@pytest.mark.parametrize(
    ("crop", "message"),
    [
        (lambda: scene("moon"), "nothing stands out|reaches its border|noise would be"),
        (lambda: torch.zeros(1, 1, 40, 40), "nothing stands out"),
        (lambda: with_point("moon", gaussian_kernel(2.0), noise=0.1, height=0.15), "nothing stands out|noise would be"),
        (lambda: with_point("moon", gaussian_kernel(2.0), at=(3, 25)), "reaches its border|nothing stands out"),
        (lambda: with_point("moon", disk_kernel(4.0), height=2.0), "white or black, where"),
        (lambda: with_point("moon", torch.ones(1, 1, dtype=torch.float64), height=1.2), "as sharp as pixels"),
        (two_points, "more than one thing"),
        (lambda: torch.linspace(-0.5, 0.5, 40).sign().mul(0.5).expand(1, 1, 40, 40), "border|nothing"),
        (lambda: torch.zeros(1, 3, 10, 40), "at least 11 x 11"),
        (lambda: torch.zeros(1, 3, 1024, 1025), "at most as many pixels as 1024 x 1024"),
        (lambda: torch.zeros(2, 1, 40, 40), "shape"),
        (lambda: torch.full((1, 1, 40, 40), math.nan), "NaN"),
    ],
)
def test_refuses(crop: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_blur_from_point(crop())


def test_input_is_not_changed() -> None:
    x = with_point("moon", KERNELS["disk"])
    before = x.clone()
    estimate_blur_from_point(x)
    assert torch.equal(x, before)
