"""Where a part of the picture is held, as a latent noise mask does it."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

SHARE = 0.1  # of a value's size, which the free part must make up for it to count


def held_back(free: Tensor | None) -> Tensor | None:
    """A noise mask, or None where it holds nothing."""
    return free if free is not None and bool((free < 1).any()) else None


def reachable(measurement: Any, free: Tensor | None) -> Any:
    """The measurement, without the values that the free part does not reach. free: above 0 where the state may move; None: everywhere."""
    return measurement if free is None else Reachable(measurement, free > 0)


class Reachable:
    """A measurement without the values that the free part of the picture does not reach: no step there changes them.

    Otherwise their residual, whatever it is, would decide how near to y the others may come. It is its own operator, of which
    only A is there.

    Args:
        measurement: `y`, `operator`, `sigma`.
        free: (1 or B, c, h, w), True where the state may move; of latents, whose pixels are squares of the picture's.
    """

    def __init__(self, measurement: Any, free: Tensor) -> None:
        self.whole, self.sigma, self.operator = measurement.operator, measurement.sigma, self
        self.in_shape = self.whole.in_shape
        y = measurement.y
        where = interpolate(free.any(1, keepdim=True).to(y), size=self.in_shape[1:], mode="nearest").expand(len(y), -1, -1, -1)
        draws = torch.randn(4, *self.in_shape, generator=torch.Generator().manual_seed(0)).to(y)
        sizes = [sum(self.whole.A(part * draw).abs() for draw in draws) for part in (torch.ones_like(where), where)]
        self.rows = (sizes[1] > SHARE * sizes[0]).to(y)
        self.y = self.rows * y

    def A(self, x: Tensor) -> Tensor:
        return self.rows * self.whole.A(x)

    def residual_norm(self, x: Tensor) -> Tensor:
        """||A x - y|| over the values that count, (B,)."""
        return torch.linalg.vector_norm((self.A(x) - self.y).flatten(1), dim=1)
