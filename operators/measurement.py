"""What was observed: y = A x + sigma n."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import LinearOperator


@dataclass(frozen=True, eq=False)
class Measurement:
    """A degraded photo together with the operator that degraded it and the noise it carries.

    Args:
        y: (B, *operator.out_shape), in [-1, 1] units (the autoencoder's range), finite.
        operator: the linear map A.
        sigma: standard deviation of the noise in [-1, 1] units, >= 0; 0 means that the photo is to be met exactly.
    """

    y: Tensor
    operator: LinearOperator
    sigma: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.operator, LinearOperator):
            raise ValueError(f"operator: got {type(self.operator).__name__}, expected a LinearOperator")
        self.operator._check("y", self.y, self.operator.out_shape)
        if not bool(torch.isfinite(self.y).all()):
            raise ValueError("y: has NaN or infinite values; the photo must be finite everywhere")
        try:
            sigma = float(self.sigma)
        except (TypeError, ValueError):
            sigma = math.nan
        if not (math.isfinite(sigma) and sigma >= 0):
            raise ValueError(f"sigma: got {self.sigma!r}, expected a finite number >= 0")
        object.__setattr__(self, "sigma", sigma)

    def residual_norm(self, x: Tensor) -> Tensor:
        """||A x - y|| for each image, in [-1, 1] units. x: (B, *operator.in_shape) -> (B,)."""
        return torch.linalg.vector_norm((self.operator.A(x) - self.y).flatten(1), dim=1)

    def select(self, i: int) -> "Measurement":
        """The measurement of image i alone, a batch of one."""
        return replace(self, y=self.y[i : i + 1], operator=self.operator.select(i))

    def to(self, *args: object, **kwargs: object) -> "Measurement":
        """A copy with its tensors moved, as `torch.Tensor.to` does (device, dtype, copy=...)."""
        return replace(self, y=self.y.to(*args, **kwargs), operator=self.operator.to(*args, **kwargs))
