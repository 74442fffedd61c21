"""Blur: convolution with any kernel, under four boundaries."""

import functools

import torch
from torch import Tensor
from torch.fft import irfft2, rfft2

from .base import Delegate, InverseTable, Table
from .checks import Shape, as_finite, as_shape
from .fourier import Fourier
from .iterative import IterativeOperator
from .separable import BOUNDARIES, Separable, band_matrix, convolution_matrix

INVERTIBLE = 1e-7  # smallest share of the largest eigenvalue that is divided by; float64 then keeps nine digits


class Blur(Delegate):
    """y[i] = sum_j k[j] x[i - j + c] for each channel: convolution, not correlation, with the kernel's centre c = h // 2.

    Closed forms: circular (2-D DFT), and separable kernels under every boundary (two 1-D SVDs). A kernel that does not
    separate under another boundary has `exact` False; see `Krylov` for its tolerances.

    Args:
        kernel: (h, w), or with leading sizes 1, no larger than the picture.
        in_shape: (C, H, W) of the picture.
        boundary: what lies outside the picture: "circular", "zero", "reflect" (the mirror image without its first pixel) or
            "replicate", as in `torch.nn.functional.pad`.
        normalize: divide the kernel by its sum, so that a constant picture keeps its value.

    Raises:
        ValueError: a kernel that is empty, not finite, larger than the picture, or whose sum is 0 and cannot be made 1.
    """

    def __init__(self, kernel: Tensor, in_shape: Shape, boundary: str = "circular", normalize: bool = True) -> None:
        c, h, w = as_shape("in_shape", in_shape)
        if boundary not in BOUNDARIES:
            raise ValueError(f"boundary: got {boundary!r}, expected one of {BOUNDARIES}")
        taps = as_finite("kernel", kernel)
        if taps.ndim < 2 or taps.numel() == 0 or taps.shape[:-2].numel() != 1:
            raise ValueError(f"kernel: got shape {tuple(taps.shape)}, expected (height, width)")
        taps = taps.reshape(taps.shape[-2:])
        if taps.shape[0] > h or taps.shape[1] > w:
            raise ValueError(f"kernel: got {tuple(taps.shape)}, expected no larger than the picture, {(h, w)}")
        if abs(taps.sum()) <= 1e-6 * taps.abs().sum() and (normalize or not taps.any()):
            raise ValueError(f"kernel: its sum is {float(taps.sum()):.3g}, expected a kernel that can be scaled to sum 1")
        taps = taps / taps.sum() if normalize else taps
        # A product of two float32 factors is one to float32's rounding only. Where that decides between a closed form and
        # iterations, the kernel in use becomes the product itself.
        single = isinstance(kernel, Tensor) and kernel.dtype == torch.float32 and boundary != "circular"
        self._factors = _factors(taps, 16 * torch.finfo(torch.float32 if single else torch.float64).eps)
        taps = torch.outer(*self._factors) if single and self._factors else taps
        self.in_shape = self.out_shape = (c, h, w)
        self.boundary = boundary
        self._kernel = Table(taps)
        if boundary == "circular":
            centred = torch.nn.functional.pad(taps, (0, w - taps.shape[1], 0, h - taps.shape[0]))
            self.form = Fourier(centred.roll((-(taps.shape[0] // 2), -(taps.shape[1] // 2)), (0, 1)), self.in_shape)
        else:
            self.form = self.as_separable() or PaddedBlur(taps, self.in_shape, boundary)

    @property
    def kernel(self) -> Tensor:
        """The kernel in use, (h, w) float64."""
        return self._kernel.value.clone()

    def as_separable(self) -> Separable | None:
        """For a kernel that is the product of a column and a row."""
        if self._factors is None:
            return None
        (c, h, w), (down, across) = self.in_shape, self._factors
        return Separable(convolution_matrix(down, h, self.boundary), convolution_matrix(across, w, self.boundary), c)


class PaddedBlur(IterativeOperator):
    """Crop o convolve o pad, for kernels that do not separate; the convolution by FFT on 5-smooth sizes.

    A kernel that is its own mirror image both ways (a disk, say) takes pictures that repeat by reflection to such pictures, so
    that under "reflect" A^-1 is a division on the torus of twice the size, where no frequency is lost. That is no singular value
    decomposition (it weighs border pixels unlike inner ones), so functions of A A^T are still iterated.
    """

    def __init__(self, taps: Tensor, in_shape: Shape, boundary: str) -> None:
        _, h, w = self.in_shape = self.out_shape = in_shape
        self._fft_size = [_smooth_size(n + t - 1) for n, t in zip((h, w), taps.shape, strict=True)]
        spread = torch.nn.functional.pad(taps, (0, self._fft_size[1] - taps.shape[1], 0, self._fft_size[0] - taps.shape[0]))
        # The first output that sees no wrapped pixel moves to 0, where the crop starts.
        self._transfer = Table(rfft2(spread.roll([1 - n for n in taps.shape], (0, 1))))
        self._margins = tuple(
            Table(margin) for n, t in zip((h, w), taps.shape, strict=True) for margin in _margin_matrices(n, t, boundary)
        )
        # In float64 it keeps every frequency, in float32 those that it resolves.
        self._inverse_transfer = _reflecting_inverse(taps, (h, w)) if boundary == "reflect" else None

    def _pinv(self, y: Tensor) -> Tensor:
        if self._inverse_transfer is None:
            return super()._pinv(y)
        wide = y.double() if y.device.type != "mps" else y
        rows = torch.cat((wide, wide[..., 1:-1, :].flip(-2)), -2)
        torus = torch.cat((rows, rows[..., 1:-1].flip(-1)), -1)
        inverse = irfft2(rfft2(torus).mul_(self._inverse_transfer.like(y)), s=torus.shape[-2:])
        return inverse[..., : y.shape[-2], : y.shape[-1]].to(y.dtype, copy=True)

    def _project(self, x: Tensor) -> Tensor:
        if self._inverse_transfer is None:
            return super()._project(x)
        return x.clone() if self._keeps_all(x) else self._pinv(self._forward(x))

    def _project_range(self, y: Tensor) -> Tensor:
        if self._inverse_transfer is None:
            return super()._project_range(y)
        return y.clone() if self._keeps_all(y) else self._forward(self._pinv(y))

    @functools.cached_property
    def _norm(self) -> float:
        return self._largest((1, 1, *self.in_shape[1:]))  # each channel has the same

    def _keeps_all(self, v: Tensor) -> bool:
        """Whether no frequency is null in the precision of v."""
        return bool(self._inverse_transfer.like(v).all())

    def _forward(self, x: Tensor) -> Tensor:
        top, bottom, left, right = (table.like(x) for table in self._margins)
        padded = torch.cat((top @ x, x, bottom @ x), -2)
        padded = torch.cat((padded @ left.mT, padded, padded @ right.mT), -1)
        spectrum = rfft2(padded, s=self._fft_size) * self._transfer.like(x)
        return irfft2(spectrum, s=self._fft_size)[..., : x.shape[-2], : x.shape[-1]]

    def _adjoint(self, y: Tensor) -> Tensor:
        top, bottom, left, right = (table.like(y) for table in self._margins)
        spectrum = rfft2(y, s=self._fft_size) * self._transfer.like(y).conj()
        rows = (len(top), y.shape[-2], len(bottom))
        columns = (len(left), y.shape[-1], len(right))
        padded = irfft2(spectrum, s=self._fft_size)[..., : sum(rows), : sum(columns)]
        before, x, after = padded.split(columns, -1)
        before, x, after = (x + before @ left + after @ right).split(rows, -2)
        return x + top.mT @ before + bottom.mT @ after


def _margin_matrices(n: int, taps: int, boundary: str) -> tuple[Tensor, Tensor]:
    """What the padding on either side of n pixels reads: (before, n) and (after, n), at most one 1 in each row."""
    before, after = taps - 1 - taps // 2, taps // 2
    ones = torch.ones(1, 1, dtype=torch.float64)
    outside = torch.cat((torch.arange(-before, 0), torch.arange(n, n + after)))
    return band_matrix(ones.expand(before + after, 1), outside, n, boundary).split((before, after))


def _reflecting_inverse(taps: Tensor, size: tuple[int, int]) -> InverseTable | None:
    """1 / transfer of a mirror-symmetric kernel on the torus of period 2 (n - 1), or None where there is no stable inverse."""
    if not (
        torch.equal(taps, taps.flip(0)) and torch.equal(taps, taps.flip(1)) and taps.shape[0] % 2 == taps.shape[1] % 2 == 1
    ):
        return None
    h, w = (max(2 * n - 2, n) for n in size)
    spread = torch.nn.functional.pad(taps, (0, w - taps.shape[1], 0, h - taps.shape[0]))
    transfer = rfft2(spread.roll([-(n // 2) for n in taps.shape], (0, 1))).real  # symmetric, hence real
    if transfer.abs().min() < INVERTIBLE * transfer.abs().max():
        return None
    return InverseTable(transfer.square(), transfer)


def _smooth_size(n: int) -> int:
    """The smallest m >= n whose only prime factors are 2, 3 and 5: other lengths are up to four times slower."""
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1


def _factors(taps: Tensor, tolerance: float) -> tuple[Tensor, Tensor] | None:
    """(down, across) with taps = outer(down, across), to a tolerance relative to the largest tap, or None."""
    row, column = divmod(int(taps.abs().argmax()), taps.shape[1])
    down, across = taps[:, column], taps[row] / taps[row, column]
    gap = (torch.outer(down, across) - taps).abs().max()
    return (down, across) if gap <= tolerance * taps.abs().max() else None
