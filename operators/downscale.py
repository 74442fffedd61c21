"""Downscaling operators (super-resolution)."""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from .base import PixelwiseGram, Shape, as_shape


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
        rows, columns = -(-h // factor), -(-w // factor)
        self.in_shape = (c, h, w)
        self.out_shape = (c, rows, columns)
        self.factor = factor
        heights = torch.full((rows,), float(factor))
        widths = torch.full((columns,), float(factor))
        heights[-1], widths[-1] = h - (rows - 1) * factor, w - (columns - 1) * factor
        self.eigenvalues = (1 / torch.outer(heights, widths).double())[None, None]

    def _forward(self, x: Tensor) -> Tensor:
        # ceil_mode without padding divides each window by the number of pixels it really covers.
        return avg_pool2d(x, self.factor, ceil_mode=True)

    def _adjoint(self, y: Tensor) -> Tensor:
        _, h, w = self.in_shape
        y = y * self.eigenvalues.to(y.dtype)
        return y.repeat_interleave(self.factor, -2).repeat_interleave(self.factor, -1)[..., :h, :w]
