"""Operators that act on the rows and on the columns of each channel: Y = R X C^T, with R and C small matrices.

With R = U_R S_R V_R^T and C = U_C S_C V_C^T, the singular vectors of A are the outer products of the 1-D ones, and its
singular values their products: all of the spectral calculus costs a few small matrix products.
"""

import functools

import torch
from torch import Tensor

from .base import InverseTable, LinearOperator, Spectral, Table
from .checks import Shape

BOUNDARIES = ("circular", "zero", "reflect", "replicate")


def fold(index: Tensor, n: int, boundary: str) -> tuple[Tensor, Tensor]:
    """Where pixels outside 0..n-1 are read from, at any distance: (index in 0..n-1, inside or not).

    reflect mirrors about the outermost pixel's centre without repeating it (c b | a b c | b a), as `torch.nn.functional.pad`.
    """
    inside = (index >= 0) & (index < n)
    if boundary == "circular":
        return index % n, torch.ones_like(inside)
    if boundary == "reflect":
        period = max(2 * (n - 1), 1)
        index = index % period
        return torch.minimum(index, period - index) if n > 1 else torch.zeros_like(index), torch.ones_like(inside)
    return index.clamp(0, n - 1), inside if boundary == "zero" else torch.ones_like(inside)


def band_matrix(weights: Tensor, first: Tensor, n: int, boundary: str) -> Tensor:
    """The (m, n) matrix whose row i weighs the pixels first[i], first[i] + 1, ... by weights[i]. weights: (m, taps)."""
    index, used = fold(first[:, None] + torch.arange(weights.shape[1]), n, boundary)
    return torch.zeros(len(first), n, dtype=torch.float64).scatter_add_(1, index, weights * used)


def convolution_matrix(taps: Tensor, n: int, boundary: str) -> Tensor:
    """The (n, n) matrix of y[i] = sum_j taps[j] x[i - j + c], with centre c = len(taps) // 2."""
    size = len(taps)
    first = torch.arange(n) - (size - 1 - size // 2)
    return band_matrix(taps.flip(0).expand(n, size), first, n, boundary)


Bands = tuple[tuple[Table, int, int], ...]
PseudoInverse = tuple[Table, Table, tuple[Table, Table, Table] | None]


def _bands(matrix: Tensor) -> Bands:
    """Blocks of rows, each cut to the columns first..last that it uses: (block, first, last + 1)."""
    rows, columns = matrix.shape
    if matrix.numel() < 2**16:  # found by timing: a single product wins
        return ((Table(matrix), 0, columns),)
    height = max(32, 32 * rows // columns)
    bands = []
    for block in matrix.split(height):
        used = block.any(0).nonzero().flatten().tolist() or [0]
        bands.append((Table(block[:, used[0] : used[-1] + 1]), used[0], used[-1] + 1))
    return tuple(bands)


def _from_left(bands: Bands, x: Tensor) -> Tensor:
    """M x."""
    if len(bands) == 1:
        return bands[0][0].like(x) @ x
    return torch.cat([block.like(x) @ x[..., first:last, :] for block, first, last in bands], -2)


def _from_right(x: Tensor, bands: Bands) -> Tensor:
    """x M^T."""
    if len(bands) == 1:
        return x @ bands[0][0].like(x).mT
    return torch.cat([x[..., first:last] @ block.like(x).mT for block, first, last in bands], -1)


class Separable(LinearOperator):
    """Y = R X C^T for each channel.

    Args:
        rows: R, (h, H) with h <= H, float64.
        columns: C, (w, W) with w <= W, float64.
        channels: number of channels.
    """

    def __init__(self, rows: Tensor, columns: Tensor, channels: int) -> None:
        self.in_shape: Shape = (channels, rows.shape[1], columns.shape[1])
        self.out_shape: Shape = (channels, rows.shape[0], columns.shape[0])
        self.rows, self.columns = Table(rows), Table(columns)

    def as_separable(self) -> "Separable":
        """Itself."""
        return self

    def with_channels(self, channels: int) -> "Separable":
        """The same map of pictures with another number of channels."""
        return Separable(self.rows.value, self.columns.value, channels)

    def after(self, inner: "Separable") -> "Separable":
        """self @ inner."""
        rows, columns = self.rows.value @ inner.rows.value, self.columns.value @ inner.columns.value
        return Separable(rows, columns, inner.in_shape[0])

    @functools.cached_property
    def _svd(self) -> tuple[Table, Table, Table, Table, Table]:
        """U_R, V_R, U_C, V_C with singular vectors in columns, and the (h, w) singular values of A."""
        u_r, s_r, vt_r = torch.linalg.svd(self.rows.value, full_matrices=False)
        same = self.rows.value.shape == self.columns.value.shape and torch.equal(self.rows.value, self.columns.value)
        u_c, s_c, vt_c = (u_r, s_r, vt_r) if same else torch.linalg.svd(self.columns.value, full_matrices=False)
        return Table(u_r), Table(vt_r.mT), Table(u_c), Table(vt_c.mT), Table(torch.outer(s_r, s_c))

    def _forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return self.rows.like(x) @ x @ self.columns.like(x).mT
        rows, columns, _, _ = self._bands
        return _from_right(_from_left(rows, x), columns)

    def _adjoint(self, y: Tensor) -> Tensor:
        if y.device.type != "cpu":
            return self.rows.like(y).mT @ (y @ self.columns.like(y))
        _, _, rows, columns = self._bands
        return _from_left(rows, _from_right(y, columns))

    @functools.cached_property
    def _bands(self) -> tuple[Bands, Bands, Bands, Bands]:
        """R, C, R^T and C^T without most of their zeros: two to four times faster on a CPU, where no launches count."""
        r, c = self.rows.value, self.columns.value
        return _bands(r), _bands(c), _bands(r.T), _bands(c.T)

    def _gram(self, y: Tensor, h: Spectral) -> Tensor:
        u_r, _, u_c, _, s = (table.like(y) for table in self._svd)
        return u_r @ (h(s.square()) * (u_r.mT @ y @ u_c)) @ u_c.mT

    def _back(self, y: Tensor, h: Spectral) -> Tensor:
        u_r, v_r, u_c, v_c, s = (table.like(y) for table in self._svd)
        return v_r @ (s * h(s.square()) * (u_r.mT @ y @ u_c) @ v_c.mT)

    def _pinv(self, y: Tensor) -> Tensor:
        left, right, inner = self._inverse_double if y.dtype == torch.float64 else self._inverse_single
        if inner is None:
            return left.like(y) @ y @ right.like(y).mT
        inverse, u_r, u_c = inner
        return left.like(y) @ (inverse.like(y) * (u_r.like(y).mT @ y @ u_c.like(y)) @ right.like(y).mT)

    @functools.cached_property
    def _inverse_single(self) -> PseudoInverse:
        return self._inverse_for(torch.float32)

    @functools.cached_property
    def _inverse_double(self) -> PseudoInverse:
        return self._inverse_for(torch.float64)

    def _inverse_for(self, dtype: torch.dtype) -> PseudoInverse:
        """(R^+, C^+, None) where no direction is null, else (V_R, V_C, (1 / s, U_R, U_C)) without the null columns.

        The pseudo-inverse of a Kronecker product is that of its factors, but directions are cut by the products of their singular
        values.
        """
        u_r, v_r, u_c, v_c, s = (table.value for table in self._svd)
        inverse = InverseTable(s.square(), s)
        seen = inverse.like(torch.empty(0, dtype=dtype)) != 0
        if bool(seen.all()):
            s_r, s_c = s[:, :1] / s[0, 0].sqrt(), s[:1] / s[0, 0].sqrt()
            return Table(v_r / s_r.mT @ u_r.mT), Table(v_c / s_c @ u_c.mT), None
        i, j = int(seen.any(1).sum()), int(seen.any(0).sum())  # singular values descend
        return (
            Table(v_r[:, :i]),
            Table(v_c[:, :j]),
            (InverseTable(s[:i, :j].square(), s[:i, :j]), Table(u_r[:, :i]), Table(u_c[:, :j])),
        )

    def _spectral(self, x: Tensor, f: Spectral) -> Tensor:
        _, v_r, _, v_c, s = (table.like(x) for table in self._svd)
        f0 = f(x.new_zeros(()))
        return f0 * x + v_r @ ((f(s.square()) - f0) * (v_r.mT @ x @ v_c) @ v_c.mT)

    def norm(self) -> float:
        """Largest singular value of A."""
        return self._norm

    @functools.cached_property
    def _norm(self) -> float:
        return float(self._svd[-1].value.max())
