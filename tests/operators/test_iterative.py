"""The iterations themselves, against dense matrices, and their promise: the tolerance, or an error."""

import pytest
import torch

from operators import AreaDownscale, Blur, ConvergenceError, Grayscale, Mask, Stack, gaussian_kernel, iterative, random_mask
from operators.blur import _smooth_size
from operators.iterative import IterativeOperator, Krylov

S = (2, 7, 9)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kernel(h: int, w: int, peak: float) -> torch.Tensor:
    taps = torch.rand(h, w, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    taps[h // 2, w // 2] += peak
    return taps


OPERATORS = {
    "blur": lambda: Blur(kernel(3, 5, 6.0), S, "reflect").form,
    "mask @ blur": lambda: (Mask(random_mask(S, 0.4), channels=2) @ Blur(kernel(3, 5, 6.0), S)).form,
    "blur @ mask": lambda: (Blur(kernel(3, 5, 6.0), S) @ Mask(random_mask(S, 0.4), channels=2)).form,
    "stack": lambda: Stack([Grayscale(S, (0.6, 0.4)), AreaDownscale(S, 2), AreaDownscale(S, 2)]),
    "nothing but zeros beside one": lambda: (AreaDownscale(S, 9) @ Blur(kernel(3, 5, 6.0), S)).form,
}


@pytest.fixture(params=OPERATORS)
def operator(request: pytest.FixtureRequest) -> IterativeOperator:
    return OPERATORS[request.param]()


@pytest.fixture
def krylov(operator: IterativeOperator) -> Krylov:
    return Krylov(operator)


def test_small_pictures_are_solved_directly(operator: IterativeOperator) -> None:
    assert not operator.exact
    assert operator.form.exact


def test_large_pictures_are_iterated() -> None:
    assert isinstance(Blur(kernel(3, 5, 6.0), (3, 40, 40), "reflect").form.form, Krylov)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_iterations_equal_the_matrix(operator: IterativeOperator, krylov: Krylov, dtype: torch.dtype) -> None:
    x, y = random(3, *krylov.in_shape).to(dtype), random(3, *krylov.out_shape, seed=1).to(dtype)
    dense, tolerance = operator.form, 1e-9 if dtype == torch.float64 else 1e-4

    def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max() + 1))

    close(krylov.A_dagger(y), dense.A_dagger(y))
    close(krylov.project(x), dense.project(x))
    close(krylov.project_range(y), dense.project_range(y))
    for f in (torch.ones_like, torch.sqrt, lambda v: torch.exp(-2 * v), lambda v: v / (v + 1e-2), lambda v: (v > 1e-9) * 1.0):
        close(krylov.spectral(x, f), dense.spectral(x, f))
    for h in (torch.ones_like, lambda v: 1 / (v + 0.1)):
        close(krylov.gram(y, h), dense.gram(y, h))
    for gamma in (0.0, 1.0, 1e3):
        close(krylov.prox_l2(x, y, gamma), dense.prox_l2(x, y, gamma))
    assert abs(krylov.norm() - dense.norm()) < 1e-7 * dense.norm()


def test_batch_equals_singles(krylov: Krylov) -> None:
    """Images of one batch converge at different times; each keeps its own result."""
    y = torch.cat([random(1, *krylov.out_shape), krylov.A(random(1, *krylov.in_shape)), torch.zeros(1, *krylov.out_shape)])
    for apply in (
        krylov.A_dagger,
        lambda v: krylov.gram(v, torch.sqrt),
        lambda v: krylov.prox_l2(krylov.A_adjoint(v), v, 50.0),
    ):
        singles = torch.cat([apply(v[None]) for v in y])
        torch.testing.assert_close(apply(y), singles, rtol=0, atol=1e-10)
        assert torch.equal(apply(y)[2], torch.zeros_like(singles[2]))


def test_gradients(krylov: Krylov) -> None:
    x, y = random(1, *krylov.in_shape).requires_grad_(), random(1, *krylov.out_shape).requires_grad_()
    for apply, inputs in (
        (krylov.A_dagger, (y,)),
        (krylov.project, (x,)),
        (lambda v: krylov.gram(v, lambda values: 1 / (0.1 + values)), (y,)),
        (lambda v: krylov.spectral(v, torch.sqrt), (x,)),
        (lambda z, v: krylov.prox_l2(z, v, 3.0), (x, y)),
    ):
        assert torch.autograd.gradcheck(apply, inputs, fast_mode=True)


def test_the_tolerance_is_reached_on_a_picture() -> None:
    x = torch.rand(2, 1, 48, 44, generator=torch.Generator().manual_seed(0))
    operator = Blur(kernel(5, 5, 3.0), (1, 48, 44), "replicate")
    y = operator.A(x)
    residual = (operator.A(operator.A_dagger(y)).double() - y.double()).flatten(1).norm(dim=1) / y.double().flatten(1).norm(
        dim=1
    )
    assert (residual <= 2e-6).all()
    z = operator.prox_l2(x, y + 0.1, 100.0).double()
    wide = operator.A_adjoint(operator.A(z) - y.double() - 0.1) * 100 + z - x
    assert wide.norm() <= 1e-4 * z.norm()


def test_an_error_where_the_tolerance_is_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iterative, "MAX_ITERATIONS", 5)
    monkeypatch.setattr(iterative, "CHECKPOINTS", (4, 5))
    operator = Blur(kernel(9, 9, 0.0), (3, 40, 40), "reflect")
    y = random(1, 3, 40, 40)
    with pytest.raises(ConvergenceError, match=r"A_dagger: relative residual .* after 5 iterations"):
        operator.A_dagger(y)
    with pytest.raises(ConvergenceError, match="prox_l2: relative residual"):
        operator.prox_l2(y, y, 1e5)
    with pytest.raises(ConvergenceError, match="not smooth enough"):
        operator.spectral(y, torch.sqrt)
    with pytest.raises(ConvergenceError, match="norm of Padded"):
        operator.norm()


def test_separable_kernels_need_no_iterations() -> None:
    for boundary in ("circular", "zero", "reflect", "replicate"):
        assert Blur(gaussian_kernel((2.0, 1.0), 9), (3, 40, 40), boundary).exact
        assert Blur(gaussian_kernel((2.0, 1.0), 9, angle=90), (3, 40, 40), boundary).exact
        assert Blur(gaussian_kernel((2.0, 1.0), 9, angle=30), (3, 40, 40), boundary).exact is (boundary == "circular")


def test_smooth_sizes() -> None:
    assert [_smooth_size(n) for n in (1, 7, 8, 11, 13, 17, 121, 257, 511, 572)] == [1, 8, 8, 12, 15, 18, 125, 270, 512, 576]
