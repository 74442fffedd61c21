"""Composition: the same map as one after the other, and which products stay closed."""

from typing import Any

import pytest
import torch

from operators import (
    AreaDownscale,
    BicubicDownscale,
    Blur,
    Crop,
    Dense,
    Grayscale,
    Identity,
    LinearOperator,
    Mask,
    Product,
    Scale,
    Stack,
    box_mask,
    gaussian_kernel,
    random_mask,
    stripe_mask,
)

S = (3, 12, 18)
G = gaussian_kernel(0.8, 5)
K = torch.rand(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


PAIRS: list[tuple[Any, Any, bool]] = [
    (lambda: Mask(random_mask((3, 4, 6), 0.5)), lambda: AreaDownscale(S, 3), True),
    (lambda: AreaDownscale(S, 3), lambda: Mask(random_mask(S, 0.5)), True),
    (lambda: Grayscale(S), lambda: Mask(random_mask(S, 0.5, per_channel=True)), True),
    (lambda: Mask(random_mask((1, 12, 18), 0.5), 1), lambda: Grayscale(S), True),
    (lambda: AreaDownscale((1, 12, 18), 5), lambda: Grayscale(S), True),
    (lambda: Scale(S, 2.0), lambda: Mask(box_mask(S, 4)), True),
    (lambda: Blur(K, S), lambda: Scale(S, -2.0), True),
    (lambda: Scale(S, -2.0), lambda: Blur(G, S, "zero"), True),
    (lambda: Blur(K, S), lambda: Blur(G, S), True),
    (lambda: Blur(G, S, "zero"), lambda: Blur(G, S, "reflect"), True),
    (lambda: AreaDownscale(S, 2), lambda: Blur(K, S), True),
    (lambda: BicubicDownscale(S, 3, boundary="circular"), lambda: Blur(K, S), True),
    (lambda: Blur(K, (3, 6, 9)), lambda: AreaDownscale(S, 2), True),
    (lambda: Blur(gaussian_kernel(0.6, 3), (3, 4, 6), "replicate"), lambda: BicubicDownscale(S, 3), True),
    (lambda: Mask(stripe_mask(S, 3)), lambda: Blur(G, S, "reflect"), True),
    (lambda: Grayscale(S), lambda: Blur(K, S), True),
    (lambda: Grayscale((3, 4, 6)), lambda: BicubicDownscale(S, 3), True),
    (lambda: Dense(random(4, 18), (3, 2, 3), (1, 2, 2)), lambda: AreaDownscale(S, 6), True),
    (lambda: Mask(random_mask(S, 0.5)), lambda: Blur(G, S), False),
    (lambda: Blur(G, S), lambda: Mask(random_mask(S, 0.5)), False),
    (lambda: AreaDownscale(S, 5), lambda: Blur(K, S), False),
    (lambda: Blur(K, S, "zero"), lambda: Blur(G, S, "zero"), False),
    (lambda: Grayscale(S), lambda: Blur(K, S, "reflect"), False),
]


@pytest.mark.parametrize(("make_outer", "make_inner", "exact"), PAIRS)
def test_pairs(make_outer: Any, make_inner: Any, exact: bool) -> None:
    outer, inner = make_outer(), make_inner()
    product = outer @ inner
    assert isinstance(product, Product)
    assert product.exact is exact
    assert (product.in_shape, product.out_shape) == (inner.in_shape, outer.out_shape)
    x, y = random(2, *inner.in_shape), random(2, *outer.out_shape)
    torch.testing.assert_close(product.A(x), outer.A(inner.A(x)), rtol=0, atol=1e-12)
    torch.testing.assert_close(product.A_adjoint(y), inner.A_adjoint(outer.A_adjoint(y)), rtol=0, atol=1e-12)


def test_trivial_products_stay_simple() -> None:
    blur, mask = Blur(K, S), Mask(random_mask(S, 0.5, 1))
    assert Identity(S) @ blur is blur
    assert blur @ Identity(S) is blur
    both = mask @ Mask(random_mask(S, 0.5, 2, per_channel=True))
    assert isinstance(both, Mask)
    assert torch.equal(both.keep, mask.keep * random_mask(S, 0.5, 2, per_channel=True))
    assert isinstance(Scale(S, 2.0) @ Scale(S, 3.0), Scale)
    assert (Scale(S, 2.0) @ Scale(S, 3.0)).gain == 6.0


def test_every_bracketing_finds_the_closed_form() -> None:
    gray, area, blur = Grayscale((3, 4, 6)), AreaDownscale(S, 3), Blur(K, S)
    x = random(1, *S)
    for product in ((gray @ area) @ blur, gray @ (area @ blur)):
        assert product.exact
        torch.testing.assert_close(product.A(x), gray.A(area.A(blur.A(x))), rtol=0, atol=1e-12)
    mask = Mask(random_mask((1, 4, 6), 0.3), 1)
    assert (mask @ gray @ area).exact
    assert not (mask @ gray @ area @ blur).exact


@pytest.mark.parametrize(
    ("make", "boundary"),
    [
        (lambda c: BicubicDownscale((c, 12, 18), 2), "reflect"),
        (lambda c: AreaDownscale((c, 12, 18), 3), "reflect"),
        (lambda c: AreaDownscale((c, 12, 18), 3), "circular"),
    ],
)
def test_what_acts_on_every_colour_alike_may_stand_anywhere(make: Any, boundary: str) -> None:
    """Black and white, or a scale, between a blur and what makes it smaller: the same closed form as after them."""
    blur, x = Blur(G, S, boundary), random(1, *S)
    for between, after in ((Grayscale(S), Grayscale(make(3).out_shape)), (Scale(S, -2.0), Scale(make(3).out_shape, -2.0))):
        product, same = make(between.out_shape[0]) @ between @ blur, after @ make(3) @ blur
        assert product.exact
        y = product.A(x)
        torch.testing.assert_close(y, same.A(x), rtol=0, atol=1e-12)
        torch.testing.assert_close(product.prox_l2(x, y + 1, 50.0), same.prox_l2(x, y + 1, 50.0), rtol=0, atol=1e-10)
        torch.testing.assert_close(product.A(product.A_dagger(y)), y, rtol=0, atol=1e-7)


def test_repr_reads_as_it_was_written() -> None:
    product = Mask(random_mask((3, 4, 6), 0.5)) @ AreaDownscale(S, 3)
    assert repr(product) == "Mask(3x4x6 -> 3x4x6) @ AreaDownscale(3x12x18 -> 3x4x6)"


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"takes \(3, 12, 18\)"):
        Blur(K, S) @ AreaDownscale(S, 3)
    with pytest.raises(ValueError, match="0 everywhere"):
        Mask(box_mask(S, 4)) @ Mask(box_mask(S, 4, invert=True))
    with pytest.raises(ValueError, match="nothing of an image is left"):
        Crop(S, (4, 4), (4, 7)) @ Mask(box_mask(S, 4))
    with pytest.raises(ValueError, match="2 and 3 images"):
        Mask(random_mask(S, 0.5).expand(2, -1, -1, -1)) @ Mask(random_mask(S, 0.5).expand(3, -1, -1, -1))
    with pytest.raises(TypeError):
        Blur(K, S) @ 3


class TestStack:
    def test_join_and_split(self) -> None:
        parts: list[LinearOperator] = [Grayscale(S), AreaDownscale(S, 5), Mask(random_mask(S, 0.5))]
        stack, x = Stack(parts), random(2, *S)
        assert stack.out_shape == (1, 1, 12 * 18 + 3 * 3 * 4 + 3 * 12 * 18)
        y = stack.A(x)
        for operator, part in zip(parts, stack.split(y), strict=True):
            assert torch.equal(part, operator.A(x))
        assert torch.equal(stack.join(stack.split(y)), y)

    def test_gray_and_small_colour_give_more_than_either(self) -> None:
        gray, small, x = Grayscale(S), AreaDownscale(S, 2), random(1, *S)
        stack = Stack([gray, small])
        met = stack.A_dagger(stack.A(x))
        torch.testing.assert_close(gray.A(met), gray.A(x), rtol=0, atol=1e-10)
        torch.testing.assert_close(small.A(met), small.A(x), rtol=0, atol=1e-10)
        assert (met - x).norm() < min((operator.project(x) - x).norm() for operator in (gray, small))

    def test_burst_with_one_mask_for_each_image(self) -> None:
        keep = torch.cat([random_mask(S, 0.5, seed) for seed in range(2)])
        stack, x = Stack([Mask(keep), AreaDownscale(S, 2)]), random(2, *S)
        assert stack.batch == 2
        torch.testing.assert_close(stack.A(stack.A_dagger(stack.A(x))), stack.A(x), rtol=0, atol=1e-9)
        assert stack.norm() > 1

    def test_composes(self) -> None:
        stack = Stack([Grayscale(S), AreaDownscale(S, 2)]) @ Blur(G, S)
        x = random(1, *S)
        torch.testing.assert_close(stack.A(x), stack.outer.A(stack.inner.A(x)))
        torch.testing.assert_close(stack.A(stack.A_dagger(stack.A(x))), stack.A(x), rtol=0, atol=1e-8)

    def test_errors(self) -> None:
        for operators in ([], [3], [Grayscale(S), Grayscale((3, 5, 5))]):
            with pytest.raises(ValueError, match="operators"):
                Stack(operators)
        stack = Stack([Grayscale(S), AreaDownscale(S, 2)])
        with pytest.raises(ValueError, match="parts: got 1, expected 2"):
            stack.join([random(1, 1, 12, 18)])
        with pytest.raises(ValueError, match="parts: got shape"):
            stack.join([random(1, 1, 12, 18), random(1, 3, 6, 8)])
        with pytest.raises(ValueError, match="y: got shape"):
            stack.split(random(1, 1, 1, 7))


def test_select_takes_the_operator_of_one_image() -> None:
    masks = Mask(torch.cat([random_mask(S, 0.5, seed=seed) for seed in range(3)]))
    operators = [masks, Blur(gaussian_kernel(1.0), S) @ masks, Stack([masks, Grayscale(S) @ masks]), Identity(S)]
    x = torch.randn(3, *S, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for operator in operators:
        together = operator.A(x)
        for i in range(3):
            one = operator.select(i)
            assert one.batch == 1
            torch.testing.assert_close(one.A(x[i : i + 1]), together[i : i + 1], rtol=0, atol=1e-14)
