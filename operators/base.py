"""The interface every operator shares, and the spectral calculus that follows from three methods.

With A = U S V^T, every function of A^T A that is needed here is carried by one identity (A linear, f any scalar function):

    f(A^T A) = f(0) I + A^T h(A A^T) A,    h(l) = (f(l) - f(0)) / l

so a concrete operator defines `_forward`, `_adjoint`, `_gram`, that is h(A A^T) on the small side, and `norm`; everything
else (pseudo-inverse, projector, prox, spectral functions) is written once, below. `_back` and `_spectral` are overridden
where the singular vectors are at hand and one transform serves for two.
"""

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .checks import Shape

Spectral = Callable[[Tensor], Tensor]

COMPUTED = (torch.float32, torch.float64)  # what the work is done in


class Table:
    """A constant of an operator: built and kept in float64 on the CPU, handed out as the tensor that it meets needs it.

    A cast is made once for each precision and device. Every copy is an ordinary tensor even when the operator is made or
    first used under `torch.inference_mode`, whose tensors autograd refuses to save.
    """

    def __init__(self, value: Tensor) -> None:
        with torch.inference_mode(False):
            self.value = value.detach().cpu().clone()
        self._casts: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def like(self, v: Tensor) -> Tensor:
        """The constant in the precision (complex where it is complex) and on the device of `v`."""
        key = v.dtype, v.device
        cast = self._casts.get(key)
        if cast is None:
            with torch.inference_mode(False):
                cast = self._casts[key] = self._cast(v.dtype).to(v.device)
        return cast

    def fresh(self) -> "Table":
        """The same constant without its casts, whose memory then goes with the copy that made them."""
        table = copy.copy(self)
        table._casts = {}
        return table

    def _cast(self, dtype: torch.dtype) -> Tensor:
        return self.value.to(dtype.to_complex() if self.value.is_complex() else dtype)


# Relative to the largest eigenvalue of A A^T; at or below it a direction is null. A singular value s of the largest is lost
# when dropped (A A^+ A misses A by s) and spoils when kept (rounding comes back 1 / s times as large), so float64 is cut where
# both weigh the same, at s = sqrt(eps) = 1.5e-8. float32 is cut at s = 1e-6, the smallest that it resolves (to some 6 %).
EIGENVALUE_CUT = {torch.float64: torch.finfo(torch.float64).eps, torch.float32: 1e-12}


class InverseTable(Table):
    """gain / eigenvalue where the precision in use resolves the eigenvalue, 0 on null directions.

    Args:
        values: eigenvalues of A A^T, float64, the largest among them.
        gain: broadcastable to them, real or complex.
    """

    def __init__(self, values: Tensor, gain: Tensor | float = 1.0) -> None:
        super().__init__(values)
        self._gain = gain

    def _cast(self, dtype: torch.dtype) -> Tensor:
        seen = self.value > EIGENVALUE_CUT[dtype] * self.value.max()
        inverse = torch.where(seen, self._gain / torch.where(seen, self.value, 1.0), 0.0)
        return inverse.to(dtype.to_complex() if inverse.is_complex() else dtype)


class LinearOperator:
    """A linear map A from images `in_shape` to measurements `out_shape`, both (C, H, W), applied to batches (B, C, H, W).

    Attributes:
        in_shape, out_shape: shapes without the batch.
        exact: True when `A_dagger`, `gram` and everything built on them are closed forms (no iteration).
        batch: number of images the operator is bound to (one mask for each, say); 1 means any number.
        precision: in which A itself is known: float64, or float32 for a map that computes in it whatever the input.

    Immutable: attributes are set once, tensors are copied in, and no method writes to its input. Constants are built in
    float64. float16 and bfloat16 inputs are computed in float32 and returned in their own dtype; float64 stays float64.
    Autograd flows through every method.

    Directions whose singular value is at most 1.5e-8 of the largest (float32: 1e-6) count as null; see `EIGENVALUE_CUT`. So the
    four Moore-Penrose identities hold to 1e-9 of the matrices' largest entries unless singular values crowd around that cut,
    as those of a wide Gaussian blur do: then to 3e-9, which is what float64 allows.

    Raises:
        ValueError: from every method, when an input is not a floating-point batch of the right (C, H, W).
    """

    in_shape: Shape
    out_shape: Shape
    exact: bool = True
    batch: int = 1
    precision: torch.dtype = torch.float64

    def __setattr__(self, name: str, value: object) -> None:
        if name in self.__dict__:
            raise AttributeError(f"{type(self).__name__}.{name}: operators are immutable; make a new one")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__}.{name}: operators are immutable; make a new one")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'x'.join(map(str, self.in_shape))} -> {'x'.join(map(str, self.out_shape))})"

    def __matmul__(self, inner: "LinearOperator") -> "LinearOperator":
        """The composition x -> self.A(inner.A(x)), in the best closed form known; see `compose`."""
        from .compose import compose  # it imports this module

        return compose(self, inner) if isinstance(inner, LinearOperator) else NotImplemented

    # What a concrete operator defines: v is float32 or float64 and of the right shape -------------------------------

    def _forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _adjoint(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def _gram(self, y: Tensor, h: Spectral) -> Tensor:
        raise NotImplementedError

    def select(self, i: int) -> "LinearOperator":
        """The operator of image i of a batch, itself where it is the same for all. Operators that can have a batch override this."""
        assert self.batch == 1, f"{type(self).__name__} has a batch and no select"
        return self

    def norm(self) -> float:
        """Largest singular value of A."""
        raise NotImplementedError

    # What it may define better ------------------------------------------------------------------------------------

    def _back(self, y: Tensor, h: Spectral) -> Tensor:
        """A^T h(A A^T) y."""
        return self._adjoint(self._gram(y, h))

    def _spectral(self, x: Tensor, f: Spectral) -> Tensor:
        f0 = f(x.new_zeros(()))

        def h(values: Tensor) -> Tensor:
            # Below it f(l) - f(0) is rounding, and so is what A lets through; their product must not be divided by l.
            resolved = values > (8 * torch.finfo(values.dtype).eps * self.norm()) ** 2
            return torch.where(resolved, (f(values) - f0) / torch.where(resolved, values, 1.0), 0.0)

        return f0 * x + self._back(self._forward(x), h)

    def _pinv(self, y: Tensor) -> Tensor:
        return self._back(y, self._inverse)

    def _project(self, x: Tensor) -> Tensor:
        return self._spectral(x, lambda values: self._seen(values).to(values.dtype))

    def _project_range(self, y: Tensor) -> Tensor:
        return self._gram(y, lambda values: self._seen(values).to(values.dtype))

    def _prox(self, z: Tensor, y: Tensor, gamma: float) -> Tensor:
        return z + self._back(y - self._forward(z), lambda values: 1 / (1 / gamma + values) if gamma else 0 * values)

    def as_fourier(self) -> "LinearOperator | None":
        """The same map as a `Fourier` operator, where it is a circular convolution and regular subsampling, else None."""
        return None

    def as_separable(self) -> "LinearOperator | None":
        """The same map as a `Separable` operator, where it acts on rows and columns independently, else None."""
        return None

    # What everybody calls -----------------------------------------------------------------------------------------

    def A(self, x: Tensor) -> Tensor:
        """A x. x: (B, *in_shape) -> (B, *out_shape)."""
        return self._apply("x", x, self.in_shape, self._forward)

    def A_adjoint(self, y: Tensor) -> Tensor:
        """A^T y, the true adjoint: <A x, y> = <x, A^T y>. y: (B, *out_shape) -> (B, *in_shape)."""
        return self._apply("y", y, self.out_shape, self._adjoint)

    def gram(self, y: Tensor, h: Spectral) -> Tensor:
        """h(A A^T) y, where `h` maps a tensor of eigenvalues (>= 0) elementwise. y: (B, *out_shape) -> same."""
        return self._apply("y", y, self.out_shape, lambda v: self._gram(v, _in_precision(h)))

    def A_dagger(self, y: Tensor) -> Tensor:
        """Moore-Penrose pseudo-inverse A^+ y = A^T h(A A^T) y, h(l) = 1/l on the range and 0 elsewhere."""
        return self._apply("y", y, self.out_shape, self._pinv)

    def project(self, x: Tensor) -> Tensor:
        """A^+ A x: the part of x that the measurement sees. x: (B, *in_shape) -> same."""
        return self._apply("x", x, self.in_shape, self._project)

    def project_range(self, y: Tensor) -> Tensor:
        """A A^+ y: the part of y that some image can explain. y: (B, *out_shape) -> same."""
        return self._apply("y", y, self.out_shape, self._project_range)

    def spectral(self, x: Tensor, f: Spectral) -> Tensor:
        """f(A^T A) x, where `f` maps a tensor of eigenvalues (>= 0) elementwise. x: (B, *in_shape) -> same."""
        return self._apply("x", x, self.in_shape, lambda v: self._spectral(v, _in_precision(f)))

    def prox_l2(self, z: Tensor, y: Tensor, gamma: float) -> Tensor:
        """argmin_x gamma/2 ||A x - y||^2 + 1/2 ||x - z||^2 = z + A^T (I/gamma + A A^T)^-1 (y - A z).

        z: (B, *in_shape), y: (B, *out_shape), gamma >= 0 (infinity gives the projection onto A x = y, as far as y can be met).
        """
        if not (isinstance(gamma, int | float) and gamma >= 0):
            raise ValueError(f"gamma: got {gamma!r}, expected a number >= 0")
        self._check("y", y, self.out_shape)
        self._check("z", z, self.in_shape)
        if len(y) != len(z):
            raise ValueError(f"y: got a batch of {len(y)}, expected {len(z)}, the images of z")

        def run(v: Tensor) -> Tensor:
            target = y.to(v.dtype)
            return v + self._pinv(target - self._forward(v)) if gamma == float("inf") else self._prox(v, target, gamma)

        return self._apply("z", z, self.in_shape, run)

    def to(self, *args: object, **kwargs: object) -> "LinearOperator":
        """A copy for another device, by any arguments of `torch.Tensor.to`.

        Constants follow each input in device and precision, so that the arguments change nothing. What they need on a
        device is freed with the copy.
        """
        torch.empty(0).to(*args, **kwargs)  # arguments that `torch.Tensor.to` refuses are refused
        moved = copy.copy(self)
        for name, value in self.__dict__.items():
            if callable(getattr(type(self), name, None)):
                del moved.__dict__[name]  # a method of this one alone
            else:
                moved.__dict__[name] = _fresh(value)
        return moved

    def _seen(self, values: Tensor) -> Tensor:
        cut = max(EIGENVALUE_CUT[values.dtype], EIGENVALUE_CUT[self.precision])
        return values > cut * self.norm() ** 2

    def _inverse(self, values: Tensor) -> Tensor:
        seen = self._seen(values)
        return torch.where(seen, 1 / torch.where(seen, values, 1.0), 0.0)

    def _check(self, name: str, v: Tensor, shape: Shape) -> None:
        if not isinstance(v, Tensor) or not v.is_floating_point():
            kind = v.dtype if isinstance(v, Tensor) else type(v).__name__
            raise ValueError(f"{name}: got {kind}, expected a floating-point tensor")
        got = tuple(v.shape)
        if len(got) != 4 or got[1:] != shape or got[0] == 0:
            raise ValueError(f"{name}: got shape {got}, expected (batch, {', '.join(map(str, shape))}) for {self!r}")
        if self.batch not in (1, got[0]):
            raise ValueError(f"{name}: got a batch of {got[0]}, expected {self.batch}, the images that {self!r} is made for")

    def _apply(self, name: str, v: Tensor, shape: Shape, run: Callable[[Tensor], Tensor]) -> Tensor:
        """Check an input, compute in float32 or float64 (under autocast, too), return in the input's dtype."""
        self._check(name, v, shape)
        kind = v.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            with torch.amp.autocast(kind, enabled=False):
                return self._apply(name, v, shape, run)
        return run(v if v.dtype in COMPUTED else v.float()).to(v.dtype)


def _in_precision(f: Spectral) -> Spectral:
    """A caller's function, whose values (a number, bool, another precision) become those of the computation."""
    return lambda values: torch.as_tensor(f(values)).to(values).expand_as(values)


def least_precise(*operators: LinearOperator) -> torch.dtype:
    """The precision in which a map made of these is known."""
    return max((operator.precision for operator in operators), key=EIGENVALUE_CUT.__getitem__)


def _fresh(value: object) -> object:
    """An attribute of an operator for its copy."""
    if isinstance(value, Table):
        return value.fresh()
    if isinstance(value, LinearOperator):
        return value.to()
    if isinstance(value, tuple):
        return tuple(_fresh(item) for item in value)
    return value


class PixelwiseGram(LinearOperator):
    """An operator whose rows touch disjoint pixels, so that A A^T is diagonal and `gram` is a multiplication.

    Attributes:
        eigenvalues: diagonal of A A^T, broadcastable to (B, *out_shape).
    """

    eigenvalues: Table

    def _gram(self, y: Tensor, h: Spectral) -> Tensor:
        return h(self.eigenvalues.like(y)) * y

    def _pinv(self, y: Tensor) -> Tensor:
        return self._adjoint(self._inverses.like(y) * y)

    @functools.cached_property
    def _inverses(self) -> Table:
        return InverseTable(self.eigenvalues.value)

    def norm(self) -> float:
        """Largest singular value of A."""
        return self._norm

    @functools.cached_property
    def _norm(self) -> float:
        return float(self.eigenvalues.value.max()) ** 0.5

    @functools.cached_property
    def row_gain(self) -> float | None:
        """c where A A^T = c I, else None."""
        values = self.eigenvalues.value
        return float(values.flatten()[0]) if bool((values == values.flatten()[0]).all()) else None


class Delegate(LinearOperator):
    """An operator that hands all work to another one, chosen for its closed form.

    Attributes:
        form: the operator that computes.
    """

    form: LinearOperator

    @property
    def exact(self) -> bool:
        """Whether the form is closed."""
        return self.form.exact

    def as_fourier(self) -> LinearOperator | None:
        """The form, where it is one."""
        return self.form.as_fourier()

    def as_separable(self) -> LinearOperator | None:
        """The form, where it is one."""
        return self.form.as_separable()

    def _forward(self, x: Tensor) -> Tensor:
        return self.form._forward(x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.form._adjoint(y)

    def _gram(self, y: Tensor, h: Spectral) -> Tensor:
        return self.form._gram(y, h)

    def _back(self, y: Tensor, h: Spectral) -> Tensor:
        return self.form._back(y, h)

    def _spectral(self, x: Tensor, f: Spectral) -> Tensor:
        return self.form._spectral(x, f)

    def _pinv(self, y: Tensor) -> Tensor:
        return self.form._pinv(y)

    def _project(self, x: Tensor) -> Tensor:
        return self.form._project(x)

    def _project_range(self, y: Tensor) -> Tensor:
        return self.form._project_range(y)

    def _prox(self, z: Tensor, y: Tensor, gamma: float) -> Tensor:
        return self.form._prox(z, y, gamma)

    def norm(self) -> float:
        """Largest singular value of A."""
        return self.form.norm()
