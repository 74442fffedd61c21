"""Several measurements of one picture, as one operator."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .base import LinearOperator, least_precise
from .iterative import IterativeOperator


class Stack(IterativeOperator):
    """A x = (A_1 x, A_2 x, ...): a burst of photos, or a grayscale photo and a small colour one.

    The parts may differ in size, so that they are flattened and joined: out_shape is (1, 1, N), N the number of values in all
    parts. `join` makes y from photos, `split` takes it apart. Where the photos differ in noise, bring each to a common sigma:
    Scale(operator.out_shape, sigma / sigma_i) @ operator, and the same factor on its photo.

    Args:
        operators: one or more, all of the same in_shape.
    """

    def __init__(self, operators: Sequence[LinearOperator]) -> None:
        parts = tuple(operators) if isinstance(operators, Iterable) else ()
        if not parts or not all(isinstance(operator, LinearOperator) for operator in parts):
            raise ValueError(f"operators: got {operators!r}, expected a list of one or more operators")
        operators = parts
        shapes = [operator.in_shape for operator in operators]
        if len(set(shapes)) > 1:
            raise ValueError(f"operators: got in_shapes {shapes}, expected the same for all")
        batches = {operator.batch for operator in operators} - {1}
        if len(batches) > 1:
            raise ValueError(f"operators: made for batches of {sorted(batches)} images, expected the same number")
        self.operators = operators
        self.batch = max(batches, default=1)
        self.precision = least_precise(*operators)
        self.in_shape = shapes[0]
        self.out_shape = (1, 1, sum(torch.Size(operator.out_shape).numel() for operator in operators))

    def select(self, i: int) -> "Stack":
        """The stack for image i."""
        return self if self.batch == 1 else Stack([operator.select(i) for operator in self.operators])

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Measurements (B, *operator.out_shape), in the order of the operators -> y, (B, 1, 1, N)."""
        if len(parts) != len(self.operators):
            raise ValueError(f"parts: got {len(parts)}, expected {len(self.operators)}, one for each operator")
        for operator, part in zip(self.operators, parts, strict=True):
            operator._check("parts", part, operator.out_shape)
        return torch.cat([part.flatten(1) for part in parts], 1)[:, None, None]

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        """y, (B, 1, 1, N) -> the measurements (B, *operator.out_shape)."""
        self._check("y", y, self.out_shape)
        shapes = [operator.out_shape for operator in self.operators]
        parts = y.flatten(1).split([torch.Size(shape).numel() for shape in shapes], 1)
        return tuple(part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True))

    def _forward(self, x: Tensor) -> Tensor:
        return self.join([operator._forward(x) for operator in self.operators])

    def _adjoint(self, y: Tensor) -> Tensor:
        return sum(operator._adjoint(part) for operator, part in zip(self.operators, self.split(y), strict=True))
