"""Operators of other libraries. Nothing is imported from them: an object with the right methods will do."""

from typing import Protocol

import torch
from torch import Tensor

from .checks import Shape, as_shape
from .iterative import IterativeOperator


class Physics(Protocol):
    """What is used of deepinv's `LinearPhysics`: batched maps, differentiable."""

    def A(self, x: Tensor) -> Tensor: ...

    def A_adjoint(self, y: Tensor) -> Tensor: ...


class DeepinvOperator(IterativeOperator):
    """A deepinv physics as an operator, with our solvers in place of its own.

    The physics computes in float32, as its constants do, and on the device where they are; so A is good to 1e-7 here.

    Args:
        physics: with `A` and `A_adjoint`, linear, without noise.
        in_shape: (C, H, W) of the picture.
        device: of the physics.

    Raises:
        ValueError: a measurement that is not one (B, c, h, w) tensor, an `A` that does not take 0 to 0, or an `A_adjoint` that is
            not the adjoint of `A` (as one random pair shows).
    """

    precision = torch.float32

    def __init__(self, physics: Physics, in_shape: Shape, device: str | torch.device = "cpu") -> None:
        self.in_shape = as_shape("in_shape", in_shape)
        self.physics = physics
        self._device = torch.device(device)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn((1, *self.in_shape), generator=generator).to(self._device)
        with torch.no_grad():
            y = physics.A(x)
            if not isinstance(y, Tensor) or y.ndim != 4:
                raise ValueError(f"physics: its A gives {_kind(y)}, expected a tensor (batch, channels, height, width)")
            self.out_shape = tuple(y.shape[1:])
            # Not A x alone: on the range of A the adjoint of another map may be right.
            v = y + y.square().mean().sqrt() * torch.randn(y.shape, generator=generator).to(y)
            back, of_zero = physics.A_adjoint(v), physics.A(torch.zeros_like(x))
        if back.shape != x.shape:
            raise ValueError(f"physics: its A_adjoint gives {tuple(back.shape[1:])}, expected {self.in_shape}")
        if bool(of_zero.any()):
            raise ValueError("physics: its A of 0 is not 0, so that it is not linear; without noise and offset it may be")
        forward, backward = float((y.double() * v.double()).sum()), float((x.double() * back.double()).sum())
        if not abs(forward - backward) <= 1e-4 * float(y.double().norm() * v.double().norm()):
            raise ValueError(f"physics: <A x, y> = {forward:.6g} but <x, A_adjoint y> = {backward:.6g}; not an adjoint pair")

    def _forward(self, x: Tensor) -> Tensor:
        return self.physics.A(x.to(self._device, torch.float32)).to(x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.physics.A_adjoint(y.to(self._device, torch.float32)).to(y)


def from_deepinv(physics: Physics, in_shape: Shape, device: str | torch.device = "cpu") -> DeepinvOperator:
    """A deepinv physics as an operator; see `DeepinvOperator`."""
    return DeepinvOperator(physics, in_shape, device)


def _kind(y: object) -> str:
    return f"a tensor of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
