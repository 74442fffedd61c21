"""The interface every operator shares, and the spectral calculus that follows from three methods.

With A = U S V^T, every function of A^T A that is needed here is carried by one identity (A linear, f any scalar function):

    f(A^T A) = f(0) I + A^T h(A A^T) A,    h(l) = (f(l) - f(0)) / l

so a concrete operator defines `_forward`, `_adjoint` and `gram`, that is h(A A^T) on the small side, and everything else
(pseudo-inverse, projector, prox, spectral functions) is written once, below.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

Shape = tuple[int, int, int]
Spectral = Callable[[Tensor], Tensor]


def as_shape(name: str, shape: tuple[int, ...]) -> Shape:
    """Check a (C, H, W) given by a caller and return it as a tuple of ints."""
    shape = tuple(shape)
    if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"{name}: got {shape}, expected three positive integers (channels, height, width)")
    return shape


class LinearOperator:
    """A linear map A from images `in_shape` to measurements `out_shape`, both (C, H, W), applied to batches (B, C, H, W).

    Attributes:
        in_shape, out_shape: shapes without the batch.
        exact: True when `A_dagger`, `gram` and everything built on them are closed forms (no iteration).

    Immutable: attributes are set once, tensors are copied in, and no method writes to its input. float16 and bfloat16 inputs
    are computed in float32 and returned in their own dtype; float64 stays float64. Autograd flows through every method.

    Raises:
        ValueError: from every method, when an input is not a floating-point batch of the right (C, H, W).
    """

    in_shape: Shape
    out_shape: Shape
    exact: bool = True
    eigenvalue_tol: float = 1e-12  # relative to the largest eigenvalue of A A^T; at or below it is a null direction

    def __setattr__(self, name: str, value: object) -> None:
        if name in self.__dict__:
            raise AttributeError(f"{type(self).__name__}.{name}: operators are immutable; make a new one")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'x'.join(map(str, self.in_shape))} -> {'x'.join(map(str, self.out_shape))})"

    # What a concrete operator defines -----------------------------------------------------------------------------

    def _forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _adjoint(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def _gram(self, y: Tensor, h: Spectral) -> Tensor:
        raise NotImplementedError

    def norm(self) -> float:
        """Largest singular value of A."""
        raise NotImplementedError

    # What follows -------------------------------------------------------------------------------------------------

    def A(self, x: Tensor) -> Tensor:
        """A x. x: (B, *in_shape) -> (B, *out_shape)."""
        return self._apply("x", x, self.in_shape, self._forward)

    def A_adjoint(self, y: Tensor) -> Tensor:
        """A^T y, the true adjoint: <A x, y> = <x, A^T y>. y: (B, *out_shape) -> (B, *in_shape)."""
        return self._apply("y", y, self.out_shape, self._adjoint)

    def gram(self, y: Tensor, h: Spectral) -> Tensor:
        """h(A A^T) y, where `h` maps a tensor of eigenvalues (>= 0) elementwise. y: (B, *out_shape) -> same."""
        return self._apply("y", y, self.out_shape, lambda v: self._gram(v, h))

    def A_dagger(self, y: Tensor) -> Tensor:
        """Moore-Penrose pseudo-inverse A^+ y = A^T h(A A^T) y, h(l) = 1/l on the range and 0 elsewhere."""
        return self._apply("y", y, self.out_shape, lambda v: self._adjoint(self._gram(v, self._inverse)))

    def project(self, x: Tensor) -> Tensor:
        """A^+ A x: the part of x that the measurement sees. x: (B, *in_shape) -> same."""
        return self._apply("x", x, self.in_shape, lambda v: self._adjoint(self._gram(self._forward(v), self._inverse)))

    def project_range(self, y: Tensor) -> Tensor:
        """A A^+ y: the part of y that some image can explain. y: (B, *out_shape) -> same."""
        return self.gram(y, lambda values: self._seen(values).to(values.dtype))

    def spectral(self, x: Tensor, f: Spectral) -> Tensor:
        """f(A^T A) x, where `f` maps a tensor of eigenvalues (>= 0) elementwise. x: (B, *in_shape) -> same."""

        def run(v: Tensor) -> Tensor:
            f0 = f(v.new_zeros(()))

            def h(values: Tensor) -> Tensor:
                seen = self._seen(values)
                return torch.where(seen, (f(values) - f0) / torch.where(seen, values, 1.0), 0.0)

            return f0 * v + self._adjoint(self._gram(self._forward(v), h))

        return self._apply("x", x, self.in_shape, run)

    def prox_l2(self, z: Tensor, y: Tensor, gamma: float) -> Tensor:
        """argmin_x gamma/2 ||A x - y||^2 + 1/2 ||x - z||^2 = z + A^T (I/gamma + A A^T)^-1 (y - A z).

        z: (B, *in_shape), y: (B, *out_shape), gamma >= 0 (infinity gives the projection onto A x = y, as far as y can be met).
        """
        if not gamma >= 0:
            raise ValueError(f"gamma: got {gamma}, expected a number >= 0")
        if gamma == float("inf"):
            return z + self.A_dagger(y - self.A(z))
        return z + self.A_adjoint(self.gram(y - self.A(z), lambda values: gamma / (1 + gamma * values)))

    def to(self, *args: object, **kwargs: object) -> "LinearOperator":
        """A copy with its tensors moved, as `torch.Tensor.to` does (device, dtype, copy=...), but never below float32."""
        moved = copy.copy(self)
        for name, value in self.__dict__.items():
            if isinstance(value, Tensor | LinearOperator):
                value = value.to(*args, **kwargs)
                half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
                moved.__dict__[name] = self.__dict__[name].to(value.device, torch.float32) if half else value
        return moved

    def _seen(self, values: Tensor) -> Tensor:
        return values > self.eigenvalue_tol * self.norm() ** 2

    def _inverse(self, values: Tensor) -> Tensor:
        seen = self._seen(values)
        return torch.where(seen, 1 / torch.where(seen, values, 1.0), 0.0)

    def _apply(self, name: str, v: Tensor, shape: Shape, run: Callable[[Tensor], Tensor]) -> Tensor:
        """Check an input, compute in float32 or float64, return in the input's dtype."""
        if not isinstance(v, Tensor) or not v.is_floating_point():
            kind = v.dtype if isinstance(v, Tensor) else type(v).__name__
            raise ValueError(f"{name}: got {kind}, expected a floating-point tensor")
        if v.ndim != 4 or tuple(v.shape[1:]) != shape:
            raise ValueError(f"{name}: got shape {tuple(v.shape)}, expected (batch, {', '.join(map(str, shape))}) for {self!r}")
        return run(v if v.dtype == torch.float64 else v.float()).to(v.dtype)


class PixelwiseGram(LinearOperator):
    """An operator whose A A^T is diagonal in pixels, so that `gram` is a multiplication.

    Attributes:
        eigenvalues: diagonal of A A^T, broadcastable to (B, *out_shape).
    """

    eigenvalues: Tensor

    def _gram(self, y: Tensor, h: Spectral) -> Tensor:
        return h(self.eigenvalues.to(y.dtype)) * y

    def norm(self) -> float:
        return float(self.eigenvalues.max()) ** 0.5
