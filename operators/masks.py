"""Mask makers. Each returns keep, (1, 1 or C, H, W) float32 on the CPU, 1 = observed and 0 = lost, for `Mask`.

`shape` is the picture's (C, H, W). Random masks are drawn on the CPU: one seed gives one mask on every machine.
"""

import math

import torch
from torch import Tensor

from .checks import Shape, as_pair, as_shape


def box_mask(shape: Shape, size: int | tuple[int, int], corner: tuple[int, int] | None = None, invert: bool = False) -> Tensor:
    """A lost rectangle (inpainting), or with `invert` a kept one (outpainting).

    Args:
        shape: (C, H, W) of the picture.
        size: (height, width) of the rectangle in pixels, or the side of a square.
        corner: (top, left) pixel; None centres the rectangle.
        invert: keep the rectangle and lose the rest.

    Raises:
        ValueError: the rectangle is empty, or not inside the picture.
    """
    _, h, w = as_shape("shape", shape)
    _, height, width = as_shape("size", (1, *(as_pair("size", size) if isinstance(size, tuple | list) else (size, size))))
    top, left = ((h - height) // 2, (w - width) // 2) if corner is None else as_pair("corner", corner)
    if not (0 <= top <= h - height and 0 <= left <= w - width):
        raise ValueError(f"size, corner: got {height} x {width} pixels at {(top, left)}, expected a box inside {h} x {w}")
    inside = torch.zeros(1, 1, h, w)
    inside[..., top : top + height, left : left + width] = 1
    return _checked("size", inside if invert else 1 - inside)


def random_mask(shape: Shape, fraction: float, seed: int = 0, per_channel: bool = False) -> Tensor:
    """Pixels lost at random, exactly round(fraction * count) of them.

    Args:
        shape: (C, H, W) of the picture.
        fraction: how much is lost, 0 <= fraction < 1.
        seed: of the draw.
        per_channel: lose each colour sample on its own, keep (1, C, H, W); otherwise whole pixels, (1, 1, H, W).
    """
    c, h, w = as_shape("shape", shape)
    channels = c if per_channel else 1
    lost = _lost_at_random(channels * h * w, fraction, seed)
    return _checked("fraction", (~lost).float().reshape(1, channels, h, w))


def stripe_mask(
    shape: Shape,
    period: int | None,
    width: int = 1,
    offset: int = 0,
    direction: str = "horizontal",
    fraction: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Lost lines (destriping): periodic stripes, lines missing at random, or both together.

    Line i is lost when (i - offset) mod period < width, or when it is among the `fraction` of lines drawn at random.

    Args:
        shape: (C, H, W) of the picture.
        period: lines from one stripe to the next; None for no periodic stripes.
        width: lines lost in each period, 1 <= width < period.
        offset: first lost line; any integer.
        direction: "horizontal" loses rows, "vertical" columns, "both" rows and columns.
        fraction: how many of the lines are lost at random, 0 <= fraction < 1.
        seed: of the draw.
    """
    _, h, w = as_shape("shape", shape)
    if direction not in ("horizontal", "vertical", "both"):
        raise ValueError(f'direction: got {direction!r}, expected "horizontal", "vertical" or "both"')
    if period is None and not fraction:
        raise ValueError("period, fraction: got None and 0, expected at least one of the two")
    if period is not None and not (isinstance(period, int) and isinstance(width, int) and 1 <= width < period):
        raise ValueError(f"period, width: got {period} and {width}, expected integers with 1 <= width < period")

    def kept(n: int, seed: int) -> Tensor:
        lost = _lost_at_random(n, fraction, seed)
        if period is not None:
            lost = lost | ((torch.arange(n) - offset) % period < width)
        return (~lost).float()

    rows = torch.ones(h) if direction == "vertical" else kept(h, seed)
    # Another seed for the columns, or a square picture would lose the same lines both ways.
    columns = torch.ones(w) if direction == "horizontal" else kept(w, seed + (direction == "both"))
    return _checked("period, width, fraction", torch.outer(rows, columns)[None, None])


def _lost_at_random(count: int, fraction: float, seed: int) -> Tensor:
    """(count,) bool, round(fraction * count) of them True."""
    if not (math.isfinite(fraction) and 0 <= fraction < 1):
        raise ValueError(f"fraction: got {fraction}, expected a number with 0 <= fraction < 1, the part that is lost")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    lost = torch.zeros(count, dtype=torch.bool)
    lost[order[: round(fraction * count)]] = True
    return lost


def _checked(names: str, keep: Tensor) -> Tensor:
    if not bool(keep.any()):
        raise ValueError(f"{names}: every pixel would be lost; at least one must be observed")
    return keep
