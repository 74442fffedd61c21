"""What of each operator is written to a file, and how much a file may ask for."""

import functools
import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .base import LinearOperator, PixelwiseGram
from .blur import Blur
from .checks import Shape
from .compose import Product, factors
from .crop import Crop
from .dense import Dense
from .downscale import AreaDownscale, BicubicDownscale, LanczosDownscale
from .pixelwise import Grayscale, Identity, Mask, Scale
from .stack import Stack

MAX_SIDE = 16384  # of a picture
MAX_VALUES = 2**28  # of a full picture; 2 GiB in float64
MAX_OPERATORS = 64
MAX_BUILT = 2**28  # numbers of 8 bytes that a file may ask for: a few hundred bytes can declare matrices of gigabytes


@dataclass(frozen=True)
class Array:
    """An argument that is a tensor."""

    dtype: torch.dtype
    ndim: int


Check = Callable[[str, object], object]  # (name, value from JSON) -> the argument, or ValueError
OPERATOR, OPERATORS = "an operator", "operators"


def _integer(name: str, value: object, lowest: int = 1, highest: int = MAX_SIDE) -> int:
    if type(value) is not int or not lowest <= value <= highest:
        raise ValueError(f"{name}: got {short(value)}, expected an integer from {lowest} to {highest}")
    return value


def number(name: str, value: object) -> float:
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name}: got {short(value)}, expected a finite number")
    return float(value)


def _numbers(name: str, value: object) -> tuple[float, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{name}: got {short(value)}, expected a list of numbers")
    return tuple(number(name, item) for item in value)


def text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: got {short(value)}, expected a string")
    return value


def _sizes(count: int, lowest: int = 1, highest: int = MAX_SIDE) -> Check:
    def check(name: str, value: object) -> tuple[int, ...]:
        if not isinstance(value, list) or len(value) != count:
            raise ValueError(f"{name}: got {short(value)}, expected {count} integers of {lowest} or more")
        sizes = tuple(_integer(name, item, lowest, highest) for item in value)
        if math.prod(sizes) > MAX_VALUES:
            raise ValueError(f"{name}: got {list(sizes)}, expected at most {MAX_VALUES} values")
        return sizes

    return check


@dataclass(frozen=True)
class Record:
    """How an operator is written down: the arguments that build it again.

    Attributes:
        arguments: name -> what it is.
        read: name -> where to read it, for an argument that is not an attribute of the same name.
        build: the class, or what calls it.
        size: at most how many numbers building it makes beside those in the file, from the same arguments.
    """

    arguments: dict[str, "Check | Array | str"]
    build: Callable[..., LinearOperator]
    read: dict[str, Callable[[LinearOperator], object]] = field(default_factory=dict)
    size: Callable[..., int] = lambda **arguments: 0


def _build_product(outer: LinearOperator, inner: LinearOperator) -> Product:
    if outer.in_shape != inner.out_shape or (outer.batch != inner.batch and 1 not in (outer.batch, inner.batch)):
        raise ValueError(f"outer and inner do not fit: {outer!r} after {inner!r}")
    return Product(outer, inner)


def _area_size(in_shape: Shape, factor: int) -> int:
    return 2 * math.prod(-(-n // factor) for n in in_shape[1:])


def _resampling_size(in_shape: Shape, out_size: tuple[int, int], boundary: str) -> int:
    return 2 * sum(n * m for n, m in zip(in_shape[1:], out_size, strict=True))


def _blur_size(kernel: Tensor, in_shape: Shape, boundary: str) -> int:
    _, h, w = in_shape
    return 5 * h * w + (0 if boundary == "circular" else h * h + w * w)


def _dense_size(matrix: Tensor, in_shape: Shape, out_shape: Shape) -> int:
    """Its left singular vectors are as many as its rows."""
    return math.prod(out_shape) ** 2


def _product_size(outer: LinearOperator, inner: LinearOperator) -> int:
    """Of the closed forms that may be tried: by rows and columns, pixel by pixel, by frequencies, or the matrix with a dense factor."""
    chain = factors(outer) + factors(inner)
    sizes = [operator.in_shape[1:] for operator in chain]
    size = max((h * h + w * w for h, w in sizes if max(h, w) <= MAX_SIDE), default=0)  # not of a stack's long row
    size += max(_pair_size(*pair) for pair in itertools.pairwise(chain))
    for i, operator in enumerate(chain):
        if isinstance(operator, Dense):
            rows = max(math.prod(left.out_shape) for left in chain[: i + 1])
            size += 2 * rows * max(math.prod(right.in_shape) for right in chain[i:])
    return size


def _pair_size(outer: LinearOperator, inner: LinearOperator) -> int:
    """Of the closed form of two neighbours, but for matrices."""
    if isinstance(outer, PixelwiseGram) and isinstance(inner, PixelwiseGram):
        return 3 * max(outer.batch, inner.batch) * math.prod(outer.in_shape)
    if any(isinstance(part, AreaDownscale) or getattr(part, "boundary", None) == "circular" for part in (outer, inner)):
        return 8 * math.prod(inner.in_shape[1:])
    return 0


@dataclass
class Budget:
    """What one file asks for so far."""

    operators: int = 0
    built: int = 0

    def open(self) -> None:
        """One operator more."""
        self.operators += 1
        if self.operators > MAX_OPERATORS:
            raise ValueError(f"operator: is made of more than {MAX_OPERATORS} operators; use a file for each part")

    def spend(self, name: str, size: int) -> None:
        """Numbers that building takes."""
        self.built += size
        if self.built > MAX_BUILT:
            raise ValueError(
                f"{name}: takes {self.built:.1e} numbers to build, more than the {MAX_BUILT} of 8 bytes that a file may ask for; "
                "use a smaller picture or fewer operators"
            )


_SHAPE = _sizes(3)
_FLAT = _sizes(3, highest=MAX_VALUES)  # also of a stack's measurements, one long row
_RESAMPLING = {"in_shape": _SHAPE, "out_size": _sizes(2), "boundary": text}

# A new operator is one line here.
RECORDS: dict[type[LinearOperator], Record] = {
    Identity: Record({"in_shape": _FLAT}, Identity),
    Scale: Record({"in_shape": _FLAT, "gain": number}, Scale),
    Mask: Record({"keep": Array(torch.uint8, 4), "channels": _integer}, Mask, {"channels": lambda mask: mask.in_shape[0]}),
    Crop: Record({"in_shape": _SHAPE, "size": _sizes(2), "corner": _sizes(2, 0)}, Crop),
    Grayscale: Record({"in_shape": _SHAPE, "weights": _numbers}, Grayscale),
    AreaDownscale: Record({"in_shape": _SHAPE, "factor": _integer}, AreaDownscale, size=_area_size),
    BicubicDownscale: Record(_RESAMPLING, BicubicDownscale, size=_resampling_size),
    LanczosDownscale: Record(_RESAMPLING, LanczosDownscale, size=_resampling_size),
    # The kernel in use is saved, which is normalised if it shall be.
    Blur: Record(
        {"kernel": Array(torch.float64, 2), "in_shape": _SHAPE, "boundary": text},
        functools.partial(Blur, normalize=False),
        size=_blur_size,
    ),
    Dense: Record({"matrix": Array(torch.float64, 2), "in_shape": _SHAPE, "out_shape": _SHAPE}, Dense, size=_dense_size),
    Product: Record({"outer": OPERATOR, "inner": OPERATOR}, _build_product, size=_product_size),
    Stack: Record({"operators": OPERATORS}, Stack),
}
CLASSES = {cls.__name__: record for cls, record in RECORDS.items()}


def short(value: object) -> str:
    try:
        text = repr(value)
    except RecursionError:  # lists in lists that JSON could just read
        text = type(value).__name__
    return text if len(text) <= 120 else f"{text[:117]}..."
