"""Wrong inputs: a ValueError that names the argument, what it got and what it expected."""

import math
import subprocess
import sys
from pathlib import Path
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
    Mask,
    Measurement,
    Scale,
    Stack,
    box_mask,
    from_deepinv,
    random_mask,
)

S = (3, 8, 9)
ONES = torch.ones(3, 3)


@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 0), (3, -8, 9), (3, 8.0, 9), 8, None, "abc"])
def test_shapes(shape: Any) -> None:
    for make in (Identity, Grayscale, lambda s: Scale(s, 2), lambda s: AreaDownscale(s, 2), lambda s: Blur(ONES, s)):
        with pytest.raises(ValueError, match="in_shape: got"):
            make(shape)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AreaDownscale(S, 0), "factor: got 0"),
        (lambda: AreaDownscale(S, -2), "factor: got -2"),
        (lambda: AreaDownscale(S, 1.5), "factor: got 1.5"),
        (lambda: AreaDownscale(S, 10), "factor: got 10, expected at most"),
        (lambda: BicubicDownscale(S, 0.99), "factor: got 0.99"),
        (lambda: BicubicDownscale(S, math.nan), "factor: got nan"),
        (lambda: BicubicDownscale(S, math.inf), "factor: got inf"),
        (lambda: BicubicDownscale(S, "2"), "factor: got '2'"),
        (lambda: BicubicDownscale(S), "factor, out_size: got None and None"),
        (lambda: BicubicDownscale(S, 2, (4, 4)), "factor, out_size"),
        (lambda: BicubicDownscale(S, out_size=(9, 9)), r"out_size: got \(9, 9\), expected at most"),
        (lambda: BicubicDownscale(S, out_size=(0, 9)), "out_size: got"),
        (lambda: BicubicDownscale(S, out_size=8), "out_size: got 8, expected two integers"),
        (lambda: Crop(S, 8), "size: got 8, expected two integers"),
        (lambda: Crop(S, (4, 4), (1.9, 2.2)), "corner: got"),
        (lambda: Crop(S, (4, 4), (1, 2, 3)), "corner: got"),
        (lambda: box_mask(S, 4, (0,)), "corner: got"),
        (lambda: Stack([]), "operators: got"),
        (lambda: Stack(Identity(S)), "operators: got Identity"),
        (lambda: BicubicDownscale(S, 2, boundary="zero"), "boundary: got 'zero'"),
        (lambda: Blur(ONES, S, "mirror"), "boundary: got 'mirror'"),
        (lambda: Blur(torch.zeros(3, 3), S), "kernel: its sum is 0"),
        (lambda: Blur(torch.tensor([[1.0, -1.0]]), S), "kernel: its sum is 0"),
        (lambda: Blur(torch.zeros(3, 3), S, normalize=False), "kernel: its sum is 0"),
        (lambda: Blur(torch.zeros(0, 3), S), "kernel: got shape"),
        (lambda: Blur(torch.ones(3), S), "kernel: got shape"),
        (lambda: Blur(torch.ones(2, 3, 3), S), "kernel: got shape"),
        (lambda: Blur(torch.ones(9, 3), S), r"kernel: got \(9, 3\), expected no larger"),
        (lambda: Blur(torch.ones(3, 10), S, "zero"), r"kernel: got \(3, 10\)"),
        (lambda: Blur(torch.tensor([[1.0, math.nan]]), S), "kernel: got NaN"),
        (lambda: Blur(torch.tensor([[1.0, math.inf]]), S), "kernel: got NaN or infinite"),
        (lambda: Blur(ONES.to(torch.complex64), S), "kernel: got torch.complex64"),
        (lambda: Blur("gauss", S), "kernel: got str"),
        (lambda: Mask(torch.zeros(1, 1, 8, 9)), "keep: a mask is 0 everywhere"),
        (lambda: Mask(torch.cat([torch.ones(1, 1, 8, 9), torch.zeros(1, 1, 8, 9)])), "keep: a mask is 0 everywhere"),
        (lambda: Mask(torch.full((1, 1, 8, 9), 0.5)), "keep: got values other"),
        (lambda: Mask(torch.full((1, 1, 8, 9), math.nan)), "keep: got NaN"),
        (lambda: Mask(torch.ones(8, 9)), "keep: got shape"),
        (lambda: Mask(torch.ones(0, 1, 8, 9)), "keep: got shape"),
        (lambda: Mask(torch.ones(1, 4, 8, 9), channels=3), "keep: got 4 channels"),
        (lambda: Mask(torch.ones(1, 1, 8, 9), channels=0), "in_shape: got"),
        (lambda: Grayscale(S, "rec709"), "weights: got 'rec709'"),
        (lambda: Grayscale(S, (0.5, 0.5)), "weights: got shape"),
        (lambda: Grayscale((4, 8, 9)), "weights: got shape"),
        (lambda: Grayscale(S, (0, 0, 0)), "weights: all are 0"),
        (lambda: Grayscale(S, (1, math.nan, 0)), "weights: got NaN"),
        (lambda: Scale(S, 0), "gain: got 0"),
        (lambda: Scale(S, math.inf), "gain: got NaN or infinite"),
        (lambda: Dense(torch.ones(3, 5), (1, 2, 2), (1, 1, 3)), r"matrix: got shape \(3, 5\), expected \(3, 4\)"),
        (lambda: Dense(torch.full((1, 4), math.nan), (1, 2, 2), (1, 1, 1)), "matrix: got NaN"),
        (lambda: Dense(torch.ones(1, 4), (1, 2, 2), (1, 1)), "out_shape: got"),
    ],
)
def test_constructors(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(1, 4, 8, 9),
        torch.zeros(1, 3, 9, 8),
        torch.zeros(3, 8, 9),
        torch.zeros(0, 3, 8, 9),
        torch.zeros(1, 3, 8, 9, dtype=torch.uint8),
        torch.zeros(1, 3, 8, 9, dtype=torch.complex64),
        [[1.0]],
        None,
    ],
)
def test_inputs(value: Any) -> None:
    operator, good = Blur(ONES, S), torch.zeros(1, *S)
    for name, call in (
        ("x", lambda: operator.A(value)),
        ("y", lambda: operator.A_adjoint(value)),
        ("y", lambda: operator.A_dagger(value)),
        ("x", lambda: operator.project(value)),
        ("y", lambda: operator.project_range(value)),
        ("y", lambda: operator.gram(value, torch.sqrt)),
        ("x", lambda: operator.spectral(value, torch.sqrt)),
        ("z", lambda: operator.prox_l2(value, good, 1.0)),
        ("y", lambda: operator.prox_l2(good, value, 1.0)),
        ("y", lambda: Measurement(value, operator)),
    ):
        with pytest.raises(ValueError, match=f"{name}: got .*expected"):
            call()


@pytest.mark.parametrize("gamma", [-1.0, math.nan])
def test_gamma(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma: got"):
        Identity(S).prox_l2(torch.zeros(1, *S), torch.zeros(1, *S), gamma)


@pytest.mark.parametrize("sigma", [-0.1, math.nan, math.inf, None])
def test_measurement_sigma(sigma: Any) -> None:
    with pytest.raises(ValueError, match="sigma: got"):
        Measurement(torch.zeros(1, *S), Identity(S), sigma)


def test_measurement() -> None:
    operator, x = Mask(random_mask(S, 0.5)), torch.rand(2, *S)
    measurement = Measurement(operator.A(x), operator, 0.1)
    assert measurement.residual_norm(x).shape == (2,)
    assert measurement.residual_norm(x).abs().max() == 0
    assert measurement.to(torch.float64).y.dtype == torch.float64
    with pytest.raises(ValueError, match="NaN or infinite"):
        Measurement(torch.full((1, *S), math.nan), operator)


class TestFromDeepinv:
    class Box:
        def A(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.avg_pool2d(x, 2)

        def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.interpolate(y, scale_factor=2) / 4

    def test_measures_the_shape_and_solves(self) -> None:
        operator = from_deepinv(self.Box(), (3, 40, 42))
        assert operator.out_shape == (3, 20, 21)
        y = torch.rand(2, 3, 20, 21)
        torch.testing.assert_close(operator.A_dagger(y), AreaDownscale((3, 40, 42), 2).A_dagger(y), rtol=0, atol=1e-5)
        assert operator.A(torch.rand(1, 3, 40, 42, dtype=torch.float64)).dtype == torch.float64
        assert abs(operator.norm() - 0.5) < 1e-6

    def test_refuses_what_is_not_an_adjoint(self) -> None:
        class Wrong(self.Box):
            def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
                return torch.nn.functional.interpolate(y, scale_factor=2)

        class Unmasked:
            """Inpainting that forgets the mask on the way back: right on the range of A only."""

            keep = random_mask((1, 8, 10), 0.5)

            def A(self, x: torch.Tensor) -> torch.Tensor:
                return self.keep * x

            def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
                return y

        class Shifted(self.Box):
            def A(self, x: torch.Tensor) -> torch.Tensor:
                return super().A(x) + 1e-3

        class Other(self.Box):
            def A(self, x: torch.Tensor) -> torch.Tensor:
                return [x]

        class Cropped(self.Box):
            def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
                return y

        with pytest.raises(ValueError, match="not an adjoint pair"):
            from_deepinv(Wrong(), (3, 8, 10))
        with pytest.raises(ValueError, match="not an adjoint pair"):
            from_deepinv(Unmasked(), (3, 8, 10))
        with pytest.raises(ValueError, match="its A of 0 is not 0"):
            from_deepinv(Shifted(), (3, 8, 10))
        with pytest.raises(ValueError, match="its A gives list"):
            from_deepinv(Other(), S)
        with pytest.raises(ValueError, match="its A_adjoint gives"):
            from_deepinv(Cropped(), (3, 8, 10))


def test_imports_torch_only() -> None:
    root = Path(__file__).resolve().parents[2]
    code = "import sys, torch; before = set(sys.modules); import operators; print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout.split()
    assert set(out) - set(sys.stdlib_module_names) <= {"operators", "torch", "numpy"}
