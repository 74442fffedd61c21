"""Downscaling operators (super-resolution): block means, and the anti-aliased bicubic and Lanczos of image programs."""

import math
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn.functional import pad

from .base import PixelwiseGram, Table
from .checks import Shape, as_pair, as_shape
from .fourier import Fourier
from .separable import Separable, band_matrix


class AreaDownscale(PixelwiseGram):
    """Mean over factor x factor blocks, for any image size: a block cut by the right or bottom border averages what it has.

    The blocks do not overlap, so A A^T is diagonal with 1/area of each block, and A^+ repeats each value over its block.

    Args:
        in_shape: (C, H, W) of the full-size picture.
        factor: integer >= 1. The measurement is ceil(H / factor) x ceil(W / factor).
    """

    def __init__(self, in_shape: Shape, factor: int) -> None:
        c, h, w = as_shape("in_shape", in_shape)
        if not isinstance(factor, int) or factor < 1:
            raise ValueError(f"factor: got {factor!r}, expected an integer >= 1")
        if factor > max(h, w):
            raise ValueError(f"factor: got {factor}, expected at most the picture's longer side, {max(h, w)}")
        self.in_shape = (c, h, w)
        self.out_shape = (c, -(-h // factor), -(-w // factor))
        self.factor = factor
        self.eigenvalues = Table(1 / torch.outer(_block_sizes(h, factor), _block_sizes(w, factor))[None, None])

    def as_fourier(self) -> Fourier | None:
        """Without partial blocks no border is seen."""
        c, h, w = self.in_shape
        if h % self.factor or w % self.factor:
            return None
        return _as_fourier(_block_matrix(h, self.factor), _block_matrix(w, self.factor), c)

    def as_separable(self) -> Separable:
        """The mean over a block is the mean over columns of means over rows."""
        c, h, w = self.in_shape
        return Separable(_block_matrix(h, self.factor), _block_matrix(w, self.factor), c)

    def _forward(self, x: Tensor) -> Tensor:
        (_, h, w), (_, rows, columns), k = self.in_shape, self.out_shape, self.factor
        if h % k or w % k:
            x = pad(x, (0, columns * k - w, 0, rows * k - h))
        # Whole rows are added first: that runs at the speed of memory, and leaves little for the strided columns.
        x = x.unflatten(-2, (rows, k)).sum(-2)
        x = x.unflatten(-1, (columns, k)).sum(-1) if k > 4 else sum((x[..., j::k] for j in range(1, k)), start=x[..., ::k])
        return x * self.eigenvalues.like(x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._pinv(y * self.eigenvalues.like(y))

    def _pinv(self, y: Tensor) -> Tensor:
        _, h, w = self.in_shape
        return y.repeat_interleave(self.factor, -1).repeat_interleave(self.factor, -2)[..., :h, :w]


class AntialiasedDownscale(Separable):
    """Resampling with a kernel stretched by the factor: y[i] is the mean of the pixels x[j], weighed by kernel((j + 1/2 - (i + 1/2) s) / s), s = n / m.

    Pixel i of m covers the pixels i s .. (i + 1) s of n. This is what Pillow's `Image.resize` does, except at the border,
    where Pillow renormalises what is left of the weights and this reads the mirrored (or wrapped) picture.

    Args:
        in_shape: (C, H, W) of the full-size picture.
        factor: number >= 1 (int, float or Fraction). The measurement is ceil(H / factor) x ceil(W / factor), and the scale s
            of each axis follows from the two sizes, so that both pictures show the same field.
        out_size: (h, w) of the measurement, in place of `factor`.
        boundary: "reflect" or "circular".
    """

    _radius: float  # half the kernel's width, in output pixels

    @staticmethod
    def _kernel(t: Tensor) -> Tensor:
        raise NotImplementedError

    def __init__(
        self,
        in_shape: Shape,
        factor: float | Fraction | None = None,
        out_size: tuple[int, int] | None = None,
        boundary: str = "reflect",
    ) -> None:
        c, h, w = as_shape("in_shape", in_shape)
        if (factor is None) == (out_size is None):
            raise ValueError(f"factor, out_size: got {factor} and {out_size}, expected exactly one of the two")
        if boundary not in ("reflect", "circular"):
            raise ValueError(f'boundary: got {boundary!r}, expected "reflect" or "circular"')
        if out_size is None:
            out_size = _ceil_divide(h, factor), _ceil_divide(w, factor)
        _, *out_size = as_shape("out_size", (c, *as_pair("out_size", out_size)))
        if out_size[0] > h or out_size[1] > w:
            raise ValueError(f"out_size: got {tuple(out_size)}, expected at most the picture's {(h, w)}")
        self.out_size = tuple(out_size)
        self.boundary = boundary
        super().__init__(self._resampling(h, out_size[0]), self._resampling(w, out_size[1]), c)

    def as_fourier(self) -> Fourier | None:
        """With a circular boundary and whole factors every output pixel sees the same weights."""
        (c, h, w), (rows, columns) = self.in_shape, self.out_size
        if self.boundary != "circular" or h % rows or w % columns:
            return None
        return _as_fourier(self.rows.value, self.columns.value, c)

    def _resampling(self, n: int, m: int) -> Tensor:
        """The (m, n) matrix of one axis."""
        scale = n / m
        centre = (torch.arange(m, dtype=torch.float64) + 0.5) * scale
        first = (centre - self._radius * scale).floor().long()
        taps = torch.arange(2 * math.ceil(self._radius * scale) + 2)
        weights = self._kernel((first[:, None] + taps + 0.5 - centre[:, None]) / scale)
        return band_matrix(weights / weights.sum(1, keepdim=True), first, n, self.boundary)


class BicubicDownscale(AntialiasedDownscale):
    """Downscaling with Keys' cubic kernel, a = -1/2; arguments and borders as for `AntialiasedDownscale`."""

    _radius = 2.0

    @staticmethod
    def _kernel(t: Tensor) -> Tensor:
        t = t.abs()
        inner = (1.5 * t - 2.5) * t**2 + 1
        outer = ((-0.5 * t + 2.5) * t - 4) * t + 2
        return torch.where(t < 1, inner, torch.where(t < 2, outer, 0.0))


class LanczosDownscale(AntialiasedDownscale):
    """Downscaling with the Lanczos-3 kernel sinc(t) sinc(t / 3); arguments and borders as for `AntialiasedDownscale`."""

    _radius = 3.0

    @staticmethod
    def _kernel(t: Tensor) -> Tensor:
        return torch.where(t.abs() < 3, torch.sinc(t) * torch.sinc(t / 3), 0.0)


def _ceil_divide(n: int, factor: float | Fraction) -> int:
    if not isinstance(factor, int | float | Fraction) or not 1 <= factor < float("inf"):
        raise ValueError(f"factor: got {factor!r}, expected a finite number >= 1")
    # 11 / 1.1 must be 10: a float stands for the simple fraction nearest to it.
    return math.ceil(n / Fraction(factor).limit_denominator(10_000))


def _block_sizes(n: int, factor: int) -> Tensor:
    """Pixels in each block of one axis, the last one perhaps cut."""
    return (n - factor * torch.arange(-(-n // factor), dtype=torch.float64)).clamp(max=factor)


def _block_matrix(n: int, factor: int) -> Tensor:
    """The (m, n) matrix of means over blocks of one axis."""
    blocks = torch.arange(n) // factor == torch.arange(-(-n // factor))[:, None]
    return blocks / _block_sizes(n, factor)[:, None]


def _as_fourier(rows: Tensor, columns: Tensor, channels: int) -> Fourier:
    """Two shift-invariant resampling matrices as one convolution: row 0 of each, reversed, is the point spread function."""
    psf = torch.outer(*(matrix[0].flip(0).roll(1) for matrix in (rows, columns)))
    step = (rows.shape[1] // rows.shape[0], columns.shape[1] // columns.shape[0])
    return Fourier(psf, (channels, rows.shape[1], columns.shape[1]), step)
