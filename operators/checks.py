"""What every constructor refuses: one place, so that all of them say the same."""

from operator import index

import torch
from torch import Tensor

Shape = tuple[int, int, int]


def as_shape(name: str, shape: tuple[int, ...]) -> Shape:
    """Check a (C, H, W) given by a caller and return it as a tuple of ints."""
    if not isinstance(shape, tuple | list) or len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"{name}: got {shape!r}, expected three positive integers (channels, height, width)")
    return tuple(shape)


def as_pair(name: str, pair: tuple[int, int]) -> tuple[int, int]:
    """Check two whole numbers given by a caller, of rows and columns."""
    try:
        first, second = (index(n) for n in pair)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: got {pair!r}, expected two integers (of rows, of columns)") from None
    return first, second


def as_finite(name: str, value: object) -> Tensor:
    """Check numbers given by a caller (tensor or nested sequence; real and finite) and return them in float64."""
    try:
        tensor = value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: got {type(value).__name__}, expected real numbers") from error
    if tensor.is_complex():
        raise ValueError(f"{name}: got {tensor.dtype}, expected real numbers")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name}: got NaN or infinite values, expected finite ones")
    return tensor.cpu().double()
