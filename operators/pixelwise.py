"""Operators that act on each pixel alone: identity (denoising) and masks (inpainting, destriping, missing pixels)."""

import torch
from torch import Tensor

from .base import PixelwiseGram, Shape, as_shape


class Identity(PixelwiseGram):
    """A = I: the measurement is the picture plus noise (denoising).

    Args:
        in_shape: (C, H, W) of the picture.
    """

    def __init__(self, in_shape: Shape) -> None:
        self.in_shape = self.out_shape = as_shape("in_shape", in_shape)
        self.eigenvalues = torch.ones((1, 1, 1, 1))

    def _forward(self, x: Tensor) -> Tensor:
        return x.clone()

    _adjoint = _forward


class Mask(PixelwiseGram):
    """A x = keep * x: pixels with keep = 1 are observed, the others are lost and read 0.

    Args:
        keep: (1 or B, 1 or C, H, W), exactly 0 or 1 (bool, integer or float); one mask per image when the first size is B,
            one per colour channel when the second is C.
        channels: C of the picture; needed only when `keep` has one channel and the picture has not three.

    Raises:
        ValueError: a value other than 0 and 1, the wrong number of dimensions, or a mask that loses every pixel.
    """

    def __init__(self, keep: Tensor, channels: int | None = None) -> None:
        if keep.ndim != 4:
            raise ValueError(f"keep: got shape {tuple(keep.shape)}, expected (1 or batch, 1 or channels, height, width)")
        if not bool(((keep == 0) | (keep == 1)).all()):
            raise ValueError("keep: got values other than 0 and 1; threshold a soft mask first, for example keep = mask < 0.5")
        if not bool((keep == 1).flatten(1).any(1).all()):
            raise ValueError("keep: a mask is 0 everywhere; at least one pixel of each image must be observed")
        in_channels = channels or (3 if keep.shape[1] == 1 else keep.shape[1])
        if keep.shape[1] not in (1, in_channels):
            raise ValueError(f"keep: got {keep.shape[1]} channels, expected 1 or channels={in_channels}")
        self.in_shape = self.out_shape = as_shape("in_shape", (in_channels, *keep.shape[2:]))
        self.eigenvalues = keep.to(torch.float32, copy=True)

    @property
    def keep(self) -> Tensor:
        """The mask, float, 1 = observed. A projector is its own A A^T, hence one tensor for both."""
        return self.eigenvalues

    def _forward(self, x: Tensor) -> Tensor:
        if len(self.keep) not in (1, len(x)):
            raise ValueError(f"x: got a batch of {len(x)}, expected {len(self.keep)}, one image for each mask")
        # where() and not a product: what stands in a hole may be NaN or infinite and must not leak.
        return torch.where(self.keep.bool(), x, x.new_zeros(()))

    _adjoint = _forward
