"""Each forward map against its definition, written another way."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import conv2d, pad

from operators import (
    AreaDownscale,
    BicubicDownscale,
    Blur,
    Grayscale,
    LanczosDownscale,
    Mask,
    gaussian_kernel,
    random_mask,
)

MODES = {"circular": "circular", "zero": "constant", "reflect": "reflect", "replicate": "replicate"}


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("boundary", MODES)
@pytest.mark.parametrize("size", [(1, 1), (3, 3), (5, 3), (4, 4), (2, 7), (1, 6), (13, 18), (12, 17)])
@pytest.mark.parametrize("separable", [True, False])
def test_blur_is_convolution(boundary: str, size: tuple[int, int], separable: bool) -> None:
    x = image(2, 3, 13, 18)
    kernel = torch.rand(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if separable:
        kernel = torch.outer(kernel[:, 0], kernel[0])
    kernel = kernel / kernel.sum()
    h, w = size
    # y[i] = sum_j k[j] x[i - j + c]: c pixels are read after i and h - 1 - c before it; conv2d correlates, hence the flip.
    room = (w - 1 - w // 2, w // 2, h - 1 - h // 2, h // 2)
    expected = conv2d(pad(x, room, mode=MODES[boundary]), kernel.flip(0, 1).expand(3, 1, h, w), groups=3)
    torch.testing.assert_close(Blur(kernel, (3, 13, 18), boundary).A(x), expected, rtol=0, atol=1e-13)


def test_blur_moves_a_point_to_the_kernel() -> None:
    kernel = torch.tensor([[0.0, 1, 2], [3, 4, 5], [6, 7, 8]], dtype=torch.float64)
    point = torch.zeros(1, 1, 9, 11, dtype=torch.float64)
    point[0, 0, 4, 5] = 1
    for boundary in MODES:
        blurred = Blur(kernel, (1, 9, 11), boundary).A(point)
        torch.testing.assert_close(blurred[0, 0, 3:6, 4:7], kernel / 36)


@pytest.mark.parametrize("boundary", ["circular", "reflect", "replicate"])
def test_blur_keeps_a_constant(boundary: str) -> None:
    x = torch.full((1, 3, 20, 21), 0.7, dtype=torch.float64)
    torch.testing.assert_close(Blur(torch.rand(5, 6) + 1, (3, 20, 21), boundary).A(x), x)


def test_blur_can_keep_the_kernels_own_gain() -> None:
    edges = torch.tensor([[-1.0, 0, 1]])
    x = torch.arange(12.0, dtype=torch.float64).expand(1, 1, 8, 12)
    for boundary in MODES:
        y = Blur(edges, (1, 8, 12), boundary, normalize=False).A(x)
        torch.testing.assert_close(y[..., 1:-1], torch.full((1, 1, 8, 10), -2.0, dtype=torch.float64))


def test_a_float32_kernel_separates_to_its_own_rounding() -> None:
    kernel = gaussian_kernel((2.0, 1.0), 9).float()
    operator = Blur(kernel, (3, 24, 25), "reflect")
    assert operator.exact
    assert Blur(operator.kernel, (3, 24, 25), "reflect", normalize=False).exact, "as after saving and loading"
    x = image(1, 3, 24, 25)
    expected = (
        conv2d(pad(x, (4, 4, 4, 4), mode="reflect"), kernel.double().expand(3, 1, 9, 9), groups=3) / kernel.double().sum()
    )
    torch.testing.assert_close(operator.A(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(12, 18), (13, 17), (7, 30)])
@pytest.mark.parametrize("factor", [1, 2, 3, 4, 6, 7, 12])
def test_area_is_the_mean_of_each_block(size: tuple[int, int], factor: int) -> None:
    x = image(2, 3, *size)
    y = AreaDownscale((3, *size), factor).A(x)
    assert y.shape[2:] == (math.ceil(size[0] / factor), math.ceil(size[1] / factor))
    for i in range(y.shape[2]):
        for j in range(y.shape[3]):
            block = x[..., i * factor : (i + 1) * factor, j * factor : (j + 1) * factor]
            torch.testing.assert_close(y[..., i, j], block.mean((2, 3)))


@pytest.mark.parametrize("boundary", ["reflect", "circular"])
@pytest.mark.parametrize(("kind", "resample"), [(BicubicDownscale, Image.BICUBIC), (LanczosDownscale, Image.LANCZOS)])
@pytest.mark.parametrize(
    ("size", "out_size"),
    [((64, 96), (16, 24)), ((61, 97), (31, 33)), ((80, 80), (80, 80)), ((90, 75), (40, 60)), ((99, 64), (33, 63))],
)
def test_agrees_with_pillow_inside(
    kind: type, resample: int, size: tuple[int, int], out_size: tuple[int, int], boundary: str
) -> None:
    x = torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    picture = Image.fromarray(x[0, 0].float().numpy(), mode="F")
    theirs = torch.from_numpy(np.array(picture.resize(out_size[::-1], resample))).double()
    ours = kind((1, *size), out_size=out_size, boundary=boundary).A(x)[0, 0]
    inside = slice(3, -3)  # a Lanczos kernel reaches over three output pixels
    torch.testing.assert_close(ours[inside, inside], theirs[inside, inside], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [BicubicDownscale, LanczosDownscale])
def test_resize_keeps_constants_and_field_of_view(kind: type) -> None:
    for factor in (1, 1.5, 4 / 3, Fraction(5, 2), 4, 7.3):
        operator = kind((3, 40, 61), factor)
        flat = torch.full((1, 3, 40, 61), -0.3, dtype=torch.float64)
        torch.testing.assert_close(operator.A(flat), torch.full_like(operator.A(flat), -0.3))
        # A ramp in continuous coordinates stays the same ramp inside.
        ramp = ((torch.arange(61, dtype=torch.float64) + 0.5) / 61).expand(1, 3, 40, 61)
        n = operator.out_shape[2]
        inside = operator.A(ramp)[0, 0, 0]
        expected = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        torch.testing.assert_close(inside[4:-4], expected[4:-4], rtol=0, atol=1e-3)
    assert kind((3, 40, 61), 1).A(ramp).sub(ramp).abs().max() < 1e-14


@pytest.mark.parametrize(
    ("factor", "expected"),
    [(1, (40, 61)), (2, (20, 31)), (1.1, (37, 56)), (4 / 3, (30, 46)), (Fraction(3, 2), (27, 41)), (50, (1, 2))],
)
def test_resize_shapes(factor: float, expected: tuple[int, int]) -> None:
    assert BicubicDownscale((3, 40, 61), factor).out_shape == (3, *expected)
    assert BicubicDownscale((3, 11, 22), 1.1).out_shape == (3, 10, 20)


def test_grayscale_weights() -> None:
    x = image(2, 3, 5, 6)
    for weights, values in (("709", (0.2126, 0.7152, 0.0722)), ("601", (0.299, 0.587, 0.114)), ("equal", (1 / 3,) * 3)):
        expected = sum(v * x[:, i : i + 1] for i, v in enumerate(values))
        torch.testing.assert_close(Grayscale((3, 5, 6), weights).A(x), expected)
    torch.testing.assert_close(Grayscale((3, 5, 6)).A(x), Grayscale((3, 5, 6), "709").A(x))
    torch.testing.assert_close(
        Grayscale((3, 5, 6), torch.tensor([1.0, 2, 3])).A(x), (x * torch.tensor([1.0, 2, 3])[:, None, None]).sum(1, True)
    )
    gray = Grayscale((3, 5, 6), "601").A(image(1, 1, 5, 6).expand(1, 3, 5, 6))
    torch.testing.assert_close(gray, image(1, 1, 5, 6))


class TestMask:
    def test_lost_pixels_do_not_matter(self) -> None:
        operator = Mask(random_mask((3, 9, 8), 0.5, seed=1))
        x, junk = torch.rand(2, 3, 9, 8), 1e6 * torch.rand(2, 3, 9, 8)
        holes = torch.where(operator.keep.bool(), x, junk)
        for name in ("A", "A_adjoint", "A_dagger", "project", "project_range"):
            assert torch.equal(getattr(operator, name)(holes), x * operator.keep)
        assert torch.equal(operator.prox_l2(x, holes, 3.0), operator.prox_l2(x, x, 3.0))

    def test_one_mask_for_each_image(self) -> None:
        keep = torch.cat([random_mask((3, 6, 7), 0.5, seed) for seed in range(4)])
        operator, x = Mask(keep), torch.rand(4, 3, 6, 7)
        assert torch.equal(operator.A(x), keep * x)
        assert torch.equal(operator.spectral(x, lambda v: 2 + v), (2 + keep) * x)
        with pytest.raises(ValueError, match="batch of 3, expected 4"):
            operator.A(x[:3])
        area = AreaDownscale((3, 6, 7), 2) @ operator
        assert area.exact
        torch.testing.assert_close(area.A(area.A_dagger(area.A(x))), area.A(x))
        blurred = operator @ Blur(torch.rand(3, 3), (3, 6, 7))
        assert blurred.batch == 4
        torch.testing.assert_close(blurred.A(blurred.A_dagger(blurred.A(x))), blurred.A(x), rtol=0, atol=1e-5)

    def test_accepts_any_kind_of_number_and_keeps_its_own_copy(self) -> None:
        keep = random_mask((3, 6, 7), 0.5)
        for dtype in (torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64):
            assert torch.equal(Mask(keep.to(dtype)).keep, keep)
        operator = Mask(keep)
        keep.zero_()
        operator.keep.zero_()
        assert operator.A(torch.ones(1, 3, 6, 7)).any()

    def test_forward_mode_and_function_transforms(self) -> None:
        operator = Mask(random_mask((3, 6, 7), 0.5))
        v = torch.rand(1, 3, 6, 7)
        assert torch.equal(torch.func.jvp(operator.A, (v,), (v,))[1], operator.A(v))
        assert torch.equal(torch.func.grad(lambda x: operator.A(x).square().sum())(v), 2 * operator.A(v))
        x = torch.rand(1, 3, 6, 7, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(operator.A, (x,), check_forward_ad=True)
