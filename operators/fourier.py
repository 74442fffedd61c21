"""Circular convolution followed by regular subsampling: everything is diagonal in the DFT of the small grid."""

import functools

import torch
from torch import Tensor
from torch.fft import fft2, irfft2, rfft2

from .base import InverseTable, LinearOperator, Spectral, Table
from .checks import Shape


class Fourier(LinearOperator):
    """A x = (p * x)[::step_rows, ::step_columns] for each channel, * the circular convolution.

    The DFT of the subsampled picture is the mean over the aliases of each small-grid frequency, hence the eigenvalues of
    A A^T are the means over the aliases of |p^|^2.

    Args:
        psf: p, (H, W) float64, with its centre at pixel (0, 0).
        in_shape: (C, H, W) of the picture.
        step: (rows, columns) between kept pixels, divisors of H and W.
    """

    def __init__(self, psf: Tensor, in_shape: Shape, step: tuple[int, int] = (1, 1)) -> None:
        c, h, w = in_shape
        self.in_shape: Shape = in_shape
        self.out_shape: Shape = (c, h // step[0], w // step[1])
        self.step = step
        self._transfer = Table(rfft2(psf))
        power = fft2(psf).abs().square().reshape(step[0], self.out_shape[1], step[1], self.out_shape[2]).mean((0, 2))
        self._eigenvalues = Table(power[:, : self.out_shape[2] // 2 + 1])

    @property
    def psf(self) -> Tensor:
        """The point spread function, (H, W) float64, centred at pixel (0, 0)."""
        return irfft2(self._transfer.value, s=self.in_shape[1:])

    def as_fourier(self) -> "Fourier":
        """Itself."""
        return self

    def with_channels(self, channels: int) -> "Fourier":
        """The same map of pictures with another number of channels."""
        return Fourier(self.psf, (channels, *self.in_shape[1:]), self.step)

    def after(self, inner: "Fourier") -> "Fourier":
        """self @ inner: the transfer function of the coarser grid repeats over the frequencies of the finer one."""
        coarse = fft2(self.psf).tile(inner.step)
        fine = fft2(inner.psf)
        step = (self.step[0] * inner.step[0], self.step[1] * inner.step[1])
        return Fourier(torch.fft.ifft2(coarse * fine).real, inner.in_shape, step)

    def _filter(self, v: Tensor, transfer: Tensor) -> Tensor:
        return irfft2(rfft2(v).mul_(transfer), s=v.shape[-2:])

    def _forward(self, x: Tensor) -> Tensor:
        full = self._filter(x, self._transfer.like(x))
        return full if self.step == (1, 1) else full[..., :: self.step[0], :: self.step[1]].clone()

    def _adjoint(self, y: Tensor) -> Tensor:
        if self.step == (1, 1):
            return self._filter(y, self._conjugate.like(y))
        # Filling up with zeros repeats the spectrum.
        spectrum = fft2(y).tile(self.step)[..., : self.in_shape[2] // 2 + 1]
        return irfft2(spectrum * self._conjugate.like(y), s=self.in_shape[1:])

    @functools.cached_property
    def _conjugate(self) -> Table:
        return Table(self._transfer.value.conj().resolve_conj())

    def _gram(self, y: Tensor, h: Spectral) -> Tensor:
        return self._filter(y, h(self._eigenvalues.like(y)))

    def _back(self, y: Tensor, h: Spectral) -> Tensor:
        if self.step != (1, 1):
            return super()._back(y, h)
        return self._filter(y, self._conjugate.like(y) * h(self._eigenvalues.like(y)))

    def _pinv(self, y: Tensor) -> Tensor:
        return self._filter(y, self._inverse_transfer.like(y)) if self.step == (1, 1) else super()._pinv(y)

    @functools.cached_property
    def _inverse_transfer(self) -> Table:
        return InverseTable(self._eigenvalues.value, self._conjugate.value)

    def _spectral(self, x: Tensor, f: Spectral) -> Tensor:
        return self._filter(x, f(self._eigenvalues.like(x))) if self.step == (1, 1) else super()._spectral(x, f)

    def norm(self) -> float:
        """Largest singular value of A."""
        return self._norm

    @functools.cached_property
    def _norm(self) -> float:
        return float(self._eigenvalues.value.max()) ** 0.5
