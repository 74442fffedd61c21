"""Uses that nobody announced: copies, views, function transforms, functions of the wrong type, inputs that are not images."""

import copy
import pickle
from typing import Any

import pytest
import torch

METHODS = {"A": "x", "A_adjoint": "y", "A_dagger": "y", "project": "x", "project_range": "y"}


def scale(v: torch.Tensor) -> float:
    return max(1.0, float(v.abs().max()))


def test_copies_and_pickles(case: Any) -> None:
    x, y = case.x(), case.y()
    case.operator.A_dagger(y)  # tables made
    for other in (copy.deepcopy(case.operator), copy.copy(case.operator), pickle.loads(pickle.dumps(case.operator))):  # noqa: S301
        assert repr(other) == repr(case.operator)
        assert torch.equal(other.A(x), case.operator.A(x))
        assert torch.equal(other.A_dagger(y), case.operator.A_dagger(y))


def test_every_second_pixel_of_a_larger_picture(case: Any) -> None:
    for name, side in METHODS.items():
        v, apply = getattr(case, side)(), getattr(case.operator, name)
        larger = torch.zeros(2, v.shape[1], 2 * v.shape[2], 2 * v.shape[3], dtype=v.dtype)
        larger[..., ::2, ::2] = v
        expected = apply(v)
        assert float((apply(larger[..., ::2, ::2]) - expected).abs().max()) <= 1e-9 * scale(expected), name


def test_function_transforms(case: Any) -> None:
    for name, side in METHODS.items():
        if case.name == "from_deepinv":
            continue  # its physics is another library's
        v, apply = getattr(case, side)(), getattr(case.operator, name)
        expected = apply(v)
        leaf = v.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(apply(leaf), leaf, torch.ones_like(expected))
        (pulled,) = torch.func.vjp(apply, v)[1](torch.ones_like(expected))
        assert torch.allclose(pulled, gradient, rtol=0, atol=1e-9 * scale(gradient)), name
        pushed = torch.func.jvp(apply, (v,), (v,))[1]
        assert torch.allclose(pushed, expected, rtol=0, atol=1e-9 * scale(expected)), name
        mapped = torch.func.vmap(apply)(torch.stack((v, -v)))
        assert torch.allclose(mapped, torch.stack((expected, -expected)), rtol=0, atol=1e-9 * scale(expected)), name


def test_inputs_made_under_inference_mode(case: Any) -> None:
    with torch.inference_mode():
        inputs = {side: getattr(case, side)() for side in ("x", "y")}
    for name, side in METHODS.items():
        apply = getattr(case.operator, name)
        assert torch.equal(apply(inputs[side]), apply(inputs[side].clone())), name


def test_functions_of_another_type(case: Any) -> None:
    x, y, operator = case.x().float(), case.y().float(), case.operator
    for f in (lambda v: 2.0, lambda v: torch.tensor(2.0, dtype=torch.float64), lambda v: 0 * v.double() + 2, lambda v: v > -1):
        gain = 1.0 if f(x) is not None and torch.as_tensor(f(x)).dtype == torch.bool else 2.0
        for v, apply in ((x, operator.spectral), (y, operator.gram)):
            out = apply(v, f)
            assert out.dtype == torch.float32
            torch.testing.assert_close(out, gain * v, rtol=0, atol=1e-4)


def test_autocast_changes_nothing(case: Any) -> None:
    for name, side in METHODS.items():
        v, apply = getattr(case, side)().float(), getattr(case.operator, name)
        with torch.autocast("cpu", torch.bfloat16):
            inside = apply(v)
        assert torch.equal(inside, apply(v)), name


def test_what_is_no_batch_of_images(case: Any) -> None:
    for name, side in METHODS.items():
        v, apply = getattr(case, side)(), getattr(case.operator, name)
        bad = (v[0], v[:0], v[:, :0], v.repeat(1, 2, 1, 1), v.mT if v.shape[-1] != v.shape[-2] else v[..., :0], v[None])
        for wrong in (*bad, v.bool(), v.to(torch.uint8), v.long(), v.to(torch.complex64), v.numpy(), v.tolist(), 1.0, None):
            with pytest.raises(ValueError, match=f"{side}: got .*expected"):
                apply(wrong)
