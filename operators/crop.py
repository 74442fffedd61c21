"""A window of a larger picture."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .base import PixelwiseGram, Table
from .checks import Shape, as_pair, as_shape


class Crop(PixelwiseGram):
    """A x = x[..., top : top + h, left : left + w]: only a window of the picture is seen. A A^T = I.

    `operator @ Crop(...)` lets a model that wants other sizes work on a picture of any size: what lies outside the window is
    free, so that there is no border to see, and is cropped away afterwards.

    Args:
        in_shape: (C, H, W) of the picture.
        size: (h, w) of the window.
        corner: (top, left), its first pixel.

    Raises:
        ValueError: a window that does not lie inside the picture.
    """

    def __init__(self, in_shape: Shape, size: tuple[int, int], corner: tuple[int, int] = (0, 0)) -> None:
        channels, height, width = self.in_shape = as_shape("in_shape", in_shape)
        self.size, self.corner = as_pair("size", size), as_pair("corner", corner)
        self.out_shape = as_shape("size", (channels, *self.size))
        spare = (height - self.size[0], width - self.size[1])
        if not all(0 <= first <= rest for first, rest in zip(self.corner, spare, strict=True)):
            raise ValueError(f"size, corner: got a window {self.size} at {self.corner}, expected one inside {(height, width)}")
        self._margins = (self.corner[1], spare[1] - self.corner[1], self.corner[0], spare[0] - self.corner[0])
        self.eigenvalues = Table(torch.ones((1, 1, 1, 1), dtype=torch.float64))

    def _forward(self, x: Tensor) -> Tensor:
        (top, left), (height, width) = self.corner, self.size
        return x[..., top : top + height, left : left + width].clone()

    def _adjoint(self, y: Tensor) -> Tensor:
        return pad(y, self._margins)

    _pinv = _adjoint
