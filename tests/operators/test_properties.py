"""Every operator against dense linear algebra in float64."""

import math
from typing import Any

import pytest
import torch

import operators

# deepinv's physics computes in float32.
LOOSE = {"from_deepinv": 1e-5}
FUNCTIONS = {
    "identity": lambda v: v,
    "constant": torch.ones_like,
    "root": torch.sqrt,
    "resolvent": lambda v: 1 / (0.1 + v),
    "exponential": lambda v: torch.exp(-3 * v),
    "wiener": lambda v: v / (v + 1e-2),
    "step": lambda v: v > 1e-6,  # a null eigenvalue of deepinv's is 1e-9
}


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, case: Any) -> None:
    gap = float((actual - expected).abs().max())
    assert gap <= LOOSE.get(case.name, tolerance) * max(1.0, float(expected.abs().max())), gap


def test_all_operators_have_cases(request: pytest.FixtureRequest) -> None:
    from_cases = {type(request.getfixturevalue("all_cases")[name].operator) for name in request.getfixturevalue("all_cases")}
    assert set(operators.OPERATORS) <= from_cases


def test_exact_says_what_it_is(case: Any) -> None:
    assert case.operator.exact is case.exact


def test_adjoint(case: Any, as_matrix: Any) -> None:
    close(as_matrix(case.operator.A_adjoint, case.operator.out_shape), case.matrix.T, 1e-12, case)
    x, y = case.x(), case.y()
    left, right = (case.operator.A(x) * y).sum(), (x * case.operator.A_adjoint(y)).sum()
    assert abs(left - right) <= LOOSE.get(case.name, 1e-12) * case.operator.norm() * x.norm() * y.norm()


def test_moore_penrose(case: Any, as_matrix: Any) -> None:
    a, p = case.matrix, as_matrix(case.operator.A_dagger, case.operator.out_shape)
    close(a @ p @ a, a, 1e-9, case)
    close(p @ a @ p, p, 1e-9, case)
    close(a @ p, (a @ p).T, 1e-9, case)
    close(p @ a, (p @ a).T, 1e-9, case)
    close(p, case.pinv, 1e-9, case)


def test_projectors(case: Any) -> None:
    x, y, pinv = case.x(), case.y(), case.pinv
    close(case.operator.project(x).flatten(1), x.flatten(1) @ (pinv @ case.matrix).T, 1e-9, case)
    close(case.operator.project_range(y).flatten(1), y.flatten(1) @ (case.matrix @ pinv).T, 1e-9, case)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_spectral(case: Any, name: str) -> None:
    f, x, (_, _, values, v) = FUNCTIONS[name], case.x(), case.svd
    close(case.operator.spectral(x, f).flatten(1), x.flatten(1) @ v * f(values) @ v.T, 1e-9, case)


@pytest.mark.parametrize("name", ["identity", "constant", "resolvent", "exponential", "wiener"])
def test_gram(case: Any, name: str) -> None:
    f, y, (u, values, _, _) = FUNCTIONS[name], case.y(), case.svd
    close(case.operator.gram(y, f).flatten(1), y.flatten(1) @ u * f(values) @ u.T, 1e-9, case)


@pytest.mark.parametrize("gamma", [0.0, 1e-3, 1.0, 1e4])
def test_prox_is_the_minimiser(case: Any, gamma: float) -> None:
    z, y = case.x(), case.y()
    _, _, values, v = case.svd
    expected = (z.flatten(1) + gamma * y.flatten(1) @ case.matrix) @ v / (1 + gamma * values) @ v.T
    close(case.operator.prox_l2(z, y, gamma).flatten(1), expected, 1e-9, case)


def test_prox_at_infinity_meets_the_measurement(case: Any) -> None:
    z, x = case.x(), case.x(seed=5)
    y = case.operator.A(x)
    met = case.operator.prox_l2(z, y, math.inf)
    close(case.operator.A(met), y, 1e-9, case)
    close(met - z, case.operator.project(x - z), 1e-9, case)


def test_norm(case: Any) -> None:
    largest = float(case.svd[1].max().sqrt())
    assert isinstance(case.operator.norm(), float)
    assert abs(case.operator.norm() - largest) <= LOOSE.get(case.name, 1e-12) * largest


def methods(case: Any, dtype: torch.dtype = torch.float64, batch: int = 2) -> dict[str, tuple[Any, tuple[torch.Tensor, ...]]]:
    operator = case.operator
    x, y = case.x(batch).to(dtype), case.y(batch).to(dtype)
    return {
        "A": (operator.A, (x,)),
        "A_adjoint": (operator.A_adjoint, (y,)),
        "A_dagger": (operator.A_dagger, (y,)),
        "project": (operator.project, (x,)),
        "project_range": (operator.project_range, (y,)),
        "gram": (lambda v: operator.gram(v, FUNCTIONS["resolvent"]), (y,)),
        "spectral": (lambda v: operator.spectral(v, FUNCTIONS["wiener"]), (x,)),
        "prox_l2": (lambda z, v: operator.prox_l2(z, v, 2.5), (x, y)),
    }


def test_gradients(case: Any) -> None:
    # fast_mode compares one random direction: a column at a time would take minutes.
    for apply, inputs in methods(case, batch=1).values():
        if case.name == "from_deepinv":
            continue  # float32 inside: finite differences see its rounding
        inputs = tuple(v.requires_grad_() for v in inputs)
        assert torch.autograd.gradcheck(apply, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(apply, inputs, fast_mode=True)


def test_batch_equals_singles(case: Any) -> None:
    for apply, inputs in methods(case, batch=3).values():
        singles = torch.cat([apply(*(v[i : i + 1] for v in inputs)) for i in range(3)])
        close(apply(*inputs), singles, 1e-11, case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_precision(case: Any, dtype: torch.dtype) -> None:
    wide = methods(case)
    condition = case.operator.norm() / float(case.svd[1][case.svd[1] > 1e-10].min().sqrt())
    for name, (apply, inputs) in methods(case, dtype).items():
        out = apply(*inputs)
        assert out.dtype == dtype, name
        expected = wide[name][0](*(v.double() for v in inputs))
        # Computed in float32 or better, then rounded once.
        allowed = (torch.finfo(dtype).eps + 1e-6 * condition * (dtype != torch.float64)) * expected.abs().max()
        assert (out.double() - expected).abs().max() <= allowed + 1e-300, name


def test_inputs_are_left_alone(case: Any) -> None:
    for name, (apply, inputs) in methods(case).items():
        before = [v.clone() for v in inputs]
        out = apply(*inputs)
        assert all(torch.equal(v, was) for v, was in zip(inputs, before, strict=True)), name
        out += 1
        assert all(torch.equal(v, was) for v, was in zip(inputs, before, strict=True)), f"{name} returns its input"


def test_any_memory_layout(case: Any) -> None:
    for name, (apply, inputs) in methods(case).items():
        expected = apply(*inputs)
        close(apply(*(v.to(memory_format=torch.channels_last) for v in inputs)), expected, 1e-11, case)
        close(apply(*(v.mT.contiguous().mT for v in inputs)), expected, 1e-11, case)
        close(apply(*(v[:1].expand_as(v) for v in inputs)), apply(*(v[:1] for v in inputs)).expand_as(expected), 1e-11, case)
        assert name


def test_immutable(case: Any) -> None:
    for name in ("in_shape", "out_shape", *vars(case.operator)):
        with pytest.raises(AttributeError):
            setattr(case.operator, name, None)


def test_to_keeps_the_precision(case: Any) -> None:
    x, y = case.x(), case.y()
    for moved in (
        case.operator.to(torch.float16),
        case.operator.to("cpu", torch.float32).to(torch.float64),
        case.operator.to(torch.zeros(1)),
        case.operator.to(device="cpu", dtype=torch.bfloat16, copy=True),
    ):
        assert type(moved) is type(case.operator)
        assert moved is not case.operator
        assert torch.equal(moved.A(x), case.operator.A(x))
        close(moved.A_dagger(y), case.operator.A_dagger(y), 1e-12, case)


def test_to_another_device(case: Any) -> None:
    if case.name == "from_deepinv":  # a physics stays where it is
        assert torch.equal(case.operator.to("meta").A(case.x()), case.operator.A(case.x()))
        return
    if not case.exact:
        # Nothing is iterated on a device without values.
        assert case.operator.to("meta").A(case.x().to("meta")).device.type == "meta"
        return
    moved = case.operator.to("meta")
    for name, (apply, inputs) in methods(case).items():
        out = apply(*(v.to("meta") for v in inputs))
        assert (out.device.type, out.shape) == (
            "meta",
            inputs[0].shape if name not in ("A", "A_adjoint", "A_dagger") else out.shape,
        )
    x = case.x().to("meta")
    assert moved.A_dagger(moved.A(x)).shape == x.shape
    assert case.operator.A(case.x()).device.type == "cpu"


if torch.cuda.is_available():  # nothing is collected, and so nothing skipped, on a machine without one

    def test_cuda_equals_cpu(case: Any) -> None:
        for operator in (case.operator.to("cuda"), case.operator):
            x, y = case.x().cuda(), case.y().cuda()
            for ours, theirs in (
                (operator.A(x), case.operator.A(x.cpu())),
                (operator.A_adjoint(y), case.operator.A_adjoint(y.cpu())),
                (operator.A_dagger(y), case.operator.A_dagger(y.cpu())),
                (operator.prox_l2(x, y, 2.0), case.operator.prox_l2(x.cpu(), y.cpu(), 2.0)),
            ):
                assert ours.is_cuda
                close(ours.cpu(), theirs, 1e-9, case)


def test_made_and_used_under_inference_mode(case: Any, rebuild: Any) -> None:
    """ComfyUI runs every node under inference_mode; the sampler then asks for gradients."""
    with torch.inference_mode():
        operator = rebuild(case.name)
        operator.A_dagger(operator.A(case.x().float()))
        operator = operator.to("cpu")
    x = case.x().float().requires_grad_()
    y = operator.A(x)
    total = operator.A_dagger(y).sum() + operator.spectral(x, FUNCTIONS["wiener"]).sum() + operator.prox_l2(x, y, 2.0).sum()
    total.backward()
    assert torch.isfinite(x.grad).all()
