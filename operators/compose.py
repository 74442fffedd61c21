"""Composition outer @ inner: which products keep a closed form, and the iterative fallback for those that do not.

both diagonal A A^T (masks, area, grayscale, scale)    the product is diagonal again
both circular convolutions, subsampled or not          one transfer function
both separable                                         products of the 1-D matrices
inner with A A^T = c I (scale, grayscale, area)        (O I)(O I)^T = c O O^T: the outer's own calculus
outer grayscale or scale, inner the same per channel   they commute, which leads to the line above
either dense                                           a dense matrix
"""

import functools

import torch
from torch import Tensor

from .base import Delegate, LinearOperator, PixelwiseGram, Spectral, Table, least_precise
from .dense import Dense
from .iterative import IterativeOperator
from .pixelwise import Grayscale, Identity, Mask, Scale


def compose(outer: LinearOperator, inner: LinearOperator) -> LinearOperator:
    """outer @ inner. Identities vanish, masks and scales merge; anything else is a `Product`.

    Raises:
        ValueError: shapes that do not fit, or masks that together lose every pixel.
    """
    if outer.in_shape != inner.out_shape:
        raise ValueError(f"outer @ inner: {outer!r} takes {outer.in_shape}, but {inner!r} gives {inner.out_shape}")
    if outer.batch != inner.batch and 1 not in (outer.batch, inner.batch):
        raise ValueError(f"outer @ inner: made for {outer.batch} and {inner.batch} images, expected the same number")
    if isinstance(outer, Identity):
        return inner
    if isinstance(inner, Identity):
        return outer
    if isinstance(outer, Mask) and isinstance(inner, Mask):
        return Mask(outer.keep * inner.keep, channels=inner.in_shape[0])
    if isinstance(outer, Scale) and isinstance(inner, Scale):
        return Scale(inner.in_shape, outer.gain * inner.gain)
    return Product(outer, inner)


class Product(Delegate):
    """outer @ inner, computed by the best form known.

    Attributes:
        outer, inner: the two operators.
        form: what computes; `exact` says whether it is closed.
    """

    def __init__(self, outer: LinearOperator, inner: LinearOperator) -> None:
        self.outer, self.inner = outer, inner
        self.in_shape, self.out_shape = inner.in_shape, outer.out_shape
        self.batch = max(outer.batch, inner.batch)
        self.precision = least_precise(outer, inner)
        self.form = _best_form(factors(outer) + factors(inner)) or _Chain(outer, inner)

    def __repr__(self) -> str:
        return f"{self.outer!r} @ {self.inner!r}"

    def select(self, i: int) -> LinearOperator:
        """The product for image i."""
        return self if self.batch == 1 else compose(self.outer.select(i), self.inner.select(i))


def factors(operator: LinearOperator) -> tuple[LinearOperator, ...]:
    """The operators of a product, outermost first."""
    if isinstance(operator, Product):
        return factors(operator.outer) + factors(operator.inner)
    return (operator,)


def _best_form(chain: tuple[LinearOperator, ...]) -> LinearOperator | None:
    """A closed form of a product, over all ways to bracket it: (gray @ area) @ blur has none, gray @ (area @ blur) has."""

    @functools.cache  # each part of the chain is looked at once, not once for each bracketing
    def best(first: int, end: int) -> LinearOperator | None:
        if end - first == 1:
            return chain[first] if chain[first].exact else None
        for split in range(first + 1, end):
            outer, inner = best(first, split), best(split, end)
            form = outer and inner and _closed_form(outer, inner)
            if form:
                return form
        return None

    return best(0, len(chain))


def _closed_form(outer: LinearOperator, inner: LinearOperator) -> LinearOperator | None:
    """One operator for the product of two exact ones, or None."""
    if (isinstance(outer, Dense) or isinstance(inner, Dense)) and outer.batch == inner.batch == 1:
        return _dense(outer, inner)
    if isinstance(outer, PixelwiseGram) and isinstance(inner, PixelwiseGram):
        return _DisjointRows(outer, inner)
    if (coarse := outer.as_fourier()) and (fine := inner.as_fourier()):
        return coarse.after(fine)
    if (second := outer.as_separable()) and (first := inner.as_separable()):
        return second.after(first)
    if isinstance(inner, PixelwiseGram) and inner.row_gain is not None:
        return _AfterTightFrame(outer, inner)
    if isinstance(outer, Scale):
        return _AfterTightFrame(inner, Scale(inner.in_shape, outer.gain))
    if isinstance(outer, Grayscale) and (form := inner.as_fourier() or inner.as_separable()):
        return _AfterTightFrame(form.with_channels(1), Grayscale(inner.in_shape, outer.weights))
    if isinstance(inner, _AfterTightFrame) and (form := _closed_form(outer, inner.outer)):
        return _AfterTightFrame(form, inner.inner)  # what commuted before goes on inwards
    return None


def _dense(outer: LinearOperator, inner: LinearOperator) -> Dense:
    """The matrix of a product with a dense factor, through the operator beside it."""
    if isinstance(outer, Dense):
        rows = outer.matrix.reshape(-1, *outer.in_shape)
        return Dense(inner.A_adjoint(rows).flatten(1), inner.in_shape, outer.out_shape)
    columns = inner.matrix.T.reshape(-1, *inner.out_shape)
    return Dense(outer.A(columns).flatten(1).T, inner.in_shape, outer.out_shape)


class _Chained(LinearOperator):
    """A x = outer(inner(x)), applied one after the other."""

    def __init__(self, outer: LinearOperator, inner: LinearOperator) -> None:
        self.outer, self.inner = outer, inner
        self.in_shape, self.out_shape = inner.in_shape, outer.out_shape
        self.batch = max(outer.batch, inner.batch)
        self.precision = least_precise(outer, inner)

    def _forward(self, x: Tensor) -> Tensor:
        return self.outer._forward(self.inner._forward(x))

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.inner._adjoint(self.outer._adjoint(y))


class _Chain(_Chained, IterativeOperator):
    """A product with no closed form."""


class _DisjointRows(_Chained, PixelwiseGram):
    """A product of operators whose rows touch disjoint pixels: its rows do, too.

    O diag(e) O^T is diagonal with entries sum_j O_ij^2 e_j. A pixel j belongs to one row i only, so that O_ij = (O^T 1)_j.
    """

    def __init__(self, outer: PixelwiseGram, inner: PixelwiseGram) -> None:
        super().__init__(outer, inner)
        weights = outer.A_adjoint(torch.ones(outer.batch, *outer.out_shape, dtype=torch.float64))
        values = inner.eigenvalues.value * weights
        self.eigenvalues = Table(outer.A(values.expand(self.batch, *outer.in_shape)))
        if not bool(self.eigenvalues.value.flatten(1).any(1).all()):
            raise ValueError(f"{outer!r} @ {inner!r}: nothing of an image is left; at least one pixel of each must be observed")


class _AfterTightFrame(_Chained):
    """outer @ inner where inner inner^T = c I, so that the eigenvalues are c times the outer's."""

    def __init__(self, outer: LinearOperator, inner: PixelwiseGram) -> None:
        super().__init__(outer, inner)
        self._gain = inner.row_gain

    def _gram(self, y: Tensor, h: Spectral) -> Tensor:
        return self.outer._gram(y, lambda values: h(self._gain * values))

    def _back(self, y: Tensor, h: Spectral) -> Tensor:
        return self.inner._adjoint(self.outer._back(y, lambda values: h(self._gain * values)))

    def norm(self) -> float:
        """Largest singular value of A."""
        return self.outer.norm() * self._gain**0.5
