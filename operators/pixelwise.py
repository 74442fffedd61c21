"""Operators that act on each pixel alone: identity (denoising), scale, masks (inpainting, destriping) and grayscale."""

import torch
from torch import Tensor

from .base import PixelwiseGram, Table
from .checks import Shape, as_finite, as_shape
from .separable import Separable


class Identity(PixelwiseGram):
    """A = I: the measurement is the picture plus noise (denoising).

    Args:
        in_shape: (C, H, W) of the picture.
    """

    def __init__(self, in_shape: Shape) -> None:
        self.in_shape = self.out_shape = as_shape("in_shape", in_shape)
        self.eigenvalues = Table(torch.ones((1, 1, 1, 1), dtype=torch.float64))

    def _forward(self, x: Tensor) -> Tensor:
        return x.clone()

    _adjoint = _forward


class Scale(PixelwiseGram):
    """A x = gain * x: brings measurements of one picture to one noise level, for `Stack`, or changes units.

    Args:
        in_shape: (C, H, W) of the picture.
        gain: finite and not 0.
    """

    def __init__(self, in_shape: Shape, gain: float) -> None:
        self.in_shape = self.out_shape = as_shape("in_shape", in_shape)
        value = as_finite("gain", gain)
        if value.ndim != 0 or value == 0:
            raise ValueError(f"gain: got {gain}, expected one number other than 0")
        self.gain = float(value)
        self.eigenvalues = Table(value.square().reshape(1, 1, 1, 1))

    def _forward(self, x: Tensor) -> Tensor:
        return self.gain * x

    _adjoint = _forward


class Mask(PixelwiseGram):
    """A x = keep * x: pixels with keep = 1 are observed, the others are lost and read 0.

    Args:
        keep: (1 or B, 1 or C, H, W), exactly 0 or 1 (bool, integer or float); one mask per image when the first size is B,
            one per colour channel when the second is C. `box_mask`, `random_mask` and `stripe_mask` make some.
        channels: C of the picture; needed only when `keep` has one channel and the picture has not three.

    Raises:
        ValueError: a value other than 0 and 1, the wrong number of dimensions, or a mask that loses every pixel.
    """

    def __init__(self, keep: Tensor, channels: int | None = None) -> None:
        keep = as_finite("keep", keep)
        if keep.ndim != 4 or keep.numel() == 0:
            raise ValueError(f"keep: got shape {tuple(keep.shape)}, expected (1 or batch, 1 or channels, height, width)")
        if not bool(((keep == 0) | (keep == 1)).all()):
            raise ValueError("keep: got values other than 0 and 1; threshold a soft mask first, for example keep = mask < 0.5")
        if not bool((keep == 1).flatten(1).any(1).all()):
            raise ValueError("keep: a mask is 0 everywhere; at least one pixel of each image must be observed")
        in_channels = (3 if keep.shape[1] == 1 else keep.shape[1]) if channels is None else channels
        if keep.shape[1] not in (1, in_channels):
            raise ValueError(f"keep: got {keep.shape[1]} channels, expected 1 or channels={in_channels}")
        self.in_shape = self.out_shape = as_shape("in_shape", (in_channels, *keep.shape[2:]))
        self.batch = len(keep)
        self.eigenvalues = Table(keep)  # a projector is its own A A^T

    @property
    def keep(self) -> Tensor:
        """The mask, float32, 1 = observed."""
        return self.eigenvalues.value.to(torch.float32, copy=True)

    def select(self, i: int) -> "Mask":
        """The mask of image i."""
        return self if self.batch == 1 else Mask(self.eigenvalues.value[i : i + 1], channels=self.in_shape[0])

    def as_separable(self) -> Separable | None:
        """Stripes and frames keep whole rows times whole columns."""
        keep = self.eigenvalues.value
        if keep.shape[:2] != (1, 1):
            return None
        rows, columns = keep[0, 0].amax(1), keep[0, 0].amax(0)
        if not torch.equal(torch.outer(rows, columns), keep[0, 0]):
            return None
        return Separable(torch.diag(rows), torch.diag(columns), self.in_shape[0])

    def _forward(self, x: Tensor) -> Tensor:
        return x * self.eigenvalues.like(x)

    _adjoint = _pinv = _project = _project_range = _forward


LUMA_WEIGHTS = {"709": (0.2126, 0.7152, 0.0722), "601": (0.299, 0.587, 0.114), "equal": (1 / 3, 1 / 3, 1 / 3)}


class Grayscale(PixelwiseGram):
    """A x = sum_c w_c x_c at each pixel: a black-and-white photo of a colour picture (colourisation).

    A A^T = ||w||^2 I.

    Args:
        in_shape: (C, H, W) of the picture.
        weights: "709" (ITU-R BT.709 luma), "601" (BT.601), "equal" (the mean of three channels), or C numbers, used as given.
    """

    def __init__(self, in_shape: Shape, weights: str | Tensor | tuple[float, ...] = "709") -> None:
        c, h, w = as_shape("in_shape", in_shape)
        if isinstance(weights, str) and weights not in LUMA_WEIGHTS:
            raise ValueError(f"weights: got {weights!r}, expected one of {sorted(LUMA_WEIGHTS)} or {c} numbers")
        values = as_finite("weights", LUMA_WEIGHTS[weights] if isinstance(weights, str) else weights)
        if values.shape != (c,):
            raise ValueError(f"weights: got shape {tuple(values.shape)}, expected ({c},), one for each channel of {in_shape}")
        if not bool(values.any()):
            raise ValueError("weights: all are 0, expected at least one other number")
        self.in_shape, self.out_shape = (c, h, w), (1, h, w)
        self.weights = tuple(values.tolist())
        self.eigenvalues = Table(values.square().sum().reshape(1, 1, 1, 1))
        self._row = Table(values[None, None])
        self._column = Table(values[:, None, None])
        self._pinv_column = Table((values / values.square().sum())[:, None, None])

    def _forward(self, x: Tensor) -> Tensor:
        # One row times each picture's (C, H W); `@` would copy the batch to make one product of it.
        return torch.bmm(self._row.like(x).expand(len(x), -1, -1), x.flatten(2)).view(-1, *self.out_shape)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._column.like(y) * y

    def _pinv(self, y: Tensor) -> Tensor:
        return self._pinv_column.like(y) * y
