"""Any matrix as an operator, for tests and small experiments."""

import functools

import torch
from torch import Tensor

from .base import LinearOperator, Spectral, Table
from .checks import Shape, as_finite, as_shape


class Dense(LinearOperator):
    """A x = M vec(x), exact by one SVD of the matrix.

    Args:
        matrix: M, (prod(out_shape), prod(in_shape)), finite; pixels in the order of `Tensor.flatten`.
        in_shape: (C, H, W) of the picture.
        out_shape: (c, h, w) of the measurement.
    """

    def __init__(self, matrix: Tensor, in_shape: Shape, out_shape: Shape) -> None:
        self.in_shape, self.out_shape = as_shape("in_shape", in_shape), as_shape("out_shape", out_shape)
        values = as_finite("matrix", matrix)
        expected = tuple(torch.Size(shape).numel() for shape in (self.out_shape, self.in_shape))
        if values.shape != expected:
            raise ValueError(f"matrix: got shape {tuple(values.shape)}, expected {expected} for {in_shape} -> {out_shape}")
        self._matrix = Table(values)

    @property
    def matrix(self) -> Tensor:
        """M, float64."""
        return self._matrix.value.clone()

    @functools.cached_property
    def _svd(self) -> tuple[Table, Table, Table]:
        """U (square: gram acts on the null space, too), singular values, V, with singular vectors in columns."""
        rows, columns = self._matrix.value.shape
        u, s, vt = torch.linalg.svd(self._matrix.value, full_matrices=rows > columns)
        return Table(u), Table(s), Table(vt.T)

    def _forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self._matrix.like(x).T).unflatten(1, self.out_shape)

    def _adjoint(self, y: Tensor) -> Tensor:
        return (y.flatten(1) @ self._matrix.like(y)).unflatten(1, self.in_shape)

    def _gram(self, y: Tensor, h: Spectral) -> Tensor:
        u, s, _ = (table.like(y) for table in self._svd)
        values = torch.nn.functional.pad(s.square(), (0, len(u) - len(s)))
        return (y.flatten(1) @ u * h(values) @ u.T).unflatten(1, self.out_shape)

    def _back(self, y: Tensor, h: Spectral) -> Tensor:
        u, s, v = (table.like(y) for table in self._svd)
        return ((y.flatten(1) @ u[:, : len(s)]) * (s * h(s.square())) @ v.T).unflatten(1, self.in_shape)

    def _spectral(self, x: Tensor, f: Spectral) -> Tensor:
        _, s, v = (table.like(x) for table in self._svd)
        f0 = f(x.new_zeros(()))
        return f0 * x + (x.flatten(1) @ v * (f(s.square()) - f0) @ v.T).unflatten(1, self.in_shape)

    def norm(self) -> float:
        """Largest singular value of A."""
        return self._norm

    @functools.cached_property
    def _norm(self) -> float:
        return float(self._svd[1].value.max())
