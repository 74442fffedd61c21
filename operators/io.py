"""Save and load operators and measurements: one .safetensors file with the tensors and a JSON description.

    metadata   format      "posterior.operator" or "posterior.measurement"
               version     "1"
               operator    {"class": "Blur", "arguments": {"kernel": {"tensor": "operator.kernel"}, "in_shape": [3, 64, 64], ...}}
               sigma       measurements only, [-1, 1] units
    tensors    by the names that the description uses; "y" for a measurement

An operator inside another (a composition, a stack) is described inside its argument. A file is data: it names one of the
classes below and arguments of the kinds below, and everything else in it is an error.
"""

import functools
import itertools
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .base import LinearOperator, PixelwiseGram, Shape
from .blur import Blur
from .compose import Product, factors
from .crop import Crop
from .dense import Dense
from .downscale import AreaDownscale, BicubicDownscale, LanczosDownscale
from .measurement import Measurement
from .pixelwise import Grayscale, Identity, Mask, Scale
from .stack import Stack

VERSION = "1"
MAX_SIDE = 16384  # of a picture
MAX_VALUES = 2**28  # of a full picture; 2 GiB in float64
MAX_RATIO = 64  # of a larger batch's full pictures to what the file holds: eight times as wide and high
MAX_OPERATORS = 64
MAX_BUILT = 2**28  # numbers of 8 bytes that a file may ask for: a few hundred bytes can declare matrices of gigabytes

StrPath = str | os.PathLike[str]


def check_full_size(name: str, in_shape: Shape) -> None:
    """Refuse huge full pictures: a photo that is in memory says nothing about memory for one 64 times as wide.

    Args:
        name: what to call them in the message.
        in_shape: (C, H, W) of a full picture.

    Raises:
        ValueError: a side of more than 16384, or more than 2^28 values.
    """
    c, h, w = in_shape
    if max(h, w) > MAX_SIDE or c * h * w > MAX_VALUES:
        raise ValueError(
            f"{name}: asks for a full picture of {w} x {h}, expected at most {MAX_SIDE} pixels a side and {MAX_VALUES // c / 1e6:.0f} "
            "million in all"
        )


def _check_batch(measurement: Measurement) -> None:
    """Refuse full pictures out of all proportion to their photos: a small file could declare a thousand huge ones."""
    (c, h, w), count, values = measurement.operator.in_shape, len(measurement.y), measurement.y.numel()
    if count * c * h * w > max(MAX_VALUES, MAX_RATIO * values):
        raise ValueError(
            f"y: a batch of {count} photos of {values // count} values each, with full pictures of {w} x {h}, is more than a file may "
            "ask for; use a file for each photo"
        )


def save_operator(path: StrPath, operator: LinearOperator) -> None:
    """Write an operator. Its loaded copy gives bit-identical results on the same machine.

    Raises:
        ValueError: an operator made outside this package (a deepinv adapter, a class of your own), one made of such, or one that
            is larger than `load_operator` takes.
    """
    tensors: dict[str, Tensor] = {}
    _save(path, "operator", tensors, operator=json.dumps(_describe(operator, "operator", tensors, _Budget())))


def load_operator(path: StrPath) -> LinearOperator:
    """Read an operator, on the CPU. Nothing in the file is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not an operator file of a known version, truncated or corrupt, or with arguments that do not fit.
    """
    with _Reader(path, "operator") as file:
        operator = file.operator()
        file.finish()
    return operator


def save_measurement(path: StrPath, measurement: Measurement) -> None:
    """Write a measurement: y in its own dtype, operator and sigma ([-1, 1] units). Errors as for `save_operator`."""
    check_full_size("operator", measurement.operator.in_shape)
    _check_batch(measurement)
    tensors = {"y": measurement.y}
    description = json.dumps(_describe(measurement.operator, "operator", tensors, _Budget()))
    _save(path, "measurement", tensors, operator=description, sigma=json.dumps(float(measurement.sigma)))


def load_measurement(path: StrPath) -> Measurement:
    """Read a measurement, on the CPU. Errors as for `load_operator`."""
    with _Reader(path, "measurement") as file:
        operator = file.operator()
        y = file.tensor("y", "y", (torch.float16, torch.bfloat16, torch.float32, torch.float64), 4)
        sigma = _number("sigma", file.json("sigma"))
        file.finish()
        measurement = file.build("measurement", lambda: Measurement(y, operator, sigma))
        file.build("measurement", lambda: (check_full_size("operator", operator.in_shape), _check_batch(measurement)))
        return measurement


# What is written for each class ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Array:
    """An argument that is a tensor."""

    dtype: torch.dtype
    ndim: int


_Check = Callable[[str, object], object]  # (name, value from JSON) -> the argument, or ValueError
_OPERATOR, _OPERATORS = "an operator", "operators"


def _integer(name: str, value: object, lowest: int = 1, highest: int = MAX_SIDE) -> int:
    if type(value) is not int or not lowest <= value <= highest:
        raise ValueError(f"{name}: got {_short(value)}, expected an integer from {lowest} to {highest}")
    return value


def _number(name: str, value: object) -> float:
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name}: got {_short(value)}, expected a finite number")
    return float(value)


def _numbers(name: str, value: object) -> tuple[float, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{name}: got {_short(value)}, expected a list of numbers")
    return tuple(_number(name, item) for item in value)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: got {_short(value)}, expected a string")
    return value


def _sizes(count: int, lowest: int = 1, highest: int = MAX_SIDE) -> _Check:
    def check(name: str, value: object) -> tuple[int, ...]:
        if not isinstance(value, list) or len(value) != count:
            raise ValueError(f"{name}: got {_short(value)}, expected {count} integers of {lowest} or more")
        sizes = tuple(_integer(name, item, lowest, highest) for item in value)
        if math.prod(sizes) > MAX_VALUES:
            raise ValueError(f"{name}: got {list(sizes)}, expected at most {MAX_VALUES} values")
        return sizes

    return check


@dataclass(frozen=True)
class _Record:
    """How an operator is written down: the arguments that build it again.

    Attributes:
        arguments: name -> what it is.
        read: name -> where to read it, for an argument that is not an attribute of the same name.
        build: the class, or what calls it.
        size: at most how many numbers building it makes beside those in the file, from the same arguments.
    """

    arguments: dict[str, "_Check | _Array | str"]
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
class _Budget:
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
_RESAMPLING = {"in_shape": _SHAPE, "out_size": _sizes(2), "boundary": _text}

# A new operator is one line here.
_RECORDS: dict[type[LinearOperator], _Record] = {
    Identity: _Record({"in_shape": _FLAT}, Identity),
    Scale: _Record({"in_shape": _FLAT, "gain": _number}, Scale),
    Mask: _Record({"keep": _Array(torch.uint8, 4), "channels": _integer}, Mask, {"channels": lambda mask: mask.in_shape[0]}),
    Crop: _Record({"in_shape": _SHAPE, "size": _sizes(2), "corner": _sizes(2, 0)}, Crop),
    Grayscale: _Record({"in_shape": _SHAPE, "weights": _numbers}, Grayscale),
    AreaDownscale: _Record({"in_shape": _SHAPE, "factor": _integer}, AreaDownscale, size=_area_size),
    BicubicDownscale: _Record(_RESAMPLING, BicubicDownscale, size=_resampling_size),
    LanczosDownscale: _Record(_RESAMPLING, LanczosDownscale, size=_resampling_size),
    # The kernel in use is saved, which is normalised if it shall be.
    Blur: _Record(
        {"kernel": _Array(torch.float64, 2), "in_shape": _SHAPE, "boundary": _text},
        functools.partial(Blur, normalize=False),
        size=_blur_size,
    ),
    Dense: _Record({"matrix": _Array(torch.float64, 2), "in_shape": _SHAPE, "out_shape": _SHAPE}, Dense),
    Product: _Record({"outer": _OPERATOR, "inner": _OPERATOR}, _build_product, size=_product_size),
    Stack: _Record({"operators": _OPERATORS}, Stack),
}
_CLASSES = {cls.__name__: record for cls, record in _RECORDS.items()}


# Writing --------------------------------------------------------------------------------------------------------------


def _describe(operator: LinearOperator, name: str, tensors: dict[str, Tensor], budget: _Budget) -> dict[str, object]:
    """The description of an operator; its tensors are added to `tensors` under names that start with `name`.

    What could not be loaded is refused, by the checks of loading.
    """
    record = _RECORDS.get(type(operator))
    if record is None:
        raise ValueError(
            f"operator: {type(operator).__name__} cannot be saved, only {', '.join(_CLASSES)} and what is made of them"
        )
    budget.open()
    arguments: dict[str, object] = {}
    values = {key: record.read[key](operator) if key in record.read else getattr(operator, key) for key in record.arguments}
    for key, kind in record.arguments.items():
        value, path = values[key], f"{name}.{key}"
        if isinstance(kind, _Array):
            tensors[path] = value.to(kind.dtype)
            arguments[key] = {"tensor": path}
        elif kind is _OPERATOR:
            arguments[key] = _describe(value, path, tensors, budget)
        elif kind is _OPERATORS:
            arguments[key] = [_describe(item, f"{path}.{i}", tensors, budget) for i, item in enumerate(value)]
        else:
            arguments[key] = value
            kind(path, list(value) if isinstance(value, tuple) else value)
    budget.spend(f"{name} ({type(operator).__name__})", record.size(**values))
    return {"class": type(operator).__name__, "arguments": arguments}


def _save(path: StrPath, kind: str, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Write beside the target and move into place, so that a stop half way leaves no broken file under its name."""
    copies = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_file(copies, partial, metadata={"format": f"posterior.{kind}", "version": VERSION, **metadata})
        os.replace(partial, path)
    except SafetensorError as error:  # in which the library wraps what the system says
        raise OSError(str(error)) from error
    finally:
        partial.unlink(missing_ok=True)


# Reading --------------------------------------------------------------------------------------------------------------


class _Reader:
    """An open file; every problem with it is a ValueError that starts with its path."""

    def __init__(self, path: StrPath, kind: str) -> None:
        self._path, self._kind = os.fspath(path), kind
        self._used: set[str] = set()
        self._budget = _Budget()

    def __enter__(self) -> "_Reader":
        if not os.path.isfile(self._path):
            raise FileNotFoundError(f"{self._path}: no such file")
        try:
            self._file = safe_open(self._path, framework="pt", device="cpu").__enter__()
        except (SafetensorError, OSError, ValueError) as error:
            raise self._error(f"truncated, corrupt, or no safetensors file ({error})") from error
        self._metadata = self._file.metadata() or {}
        self._names = set(self._file.keys())
        got = self._metadata.get("format")
        if got != f"posterior.{self._kind}":
            known = {"posterior.operator": "; use load_operator", "posterior.measurement": "; use load_measurement"}
            raise self._error(f"its format is {_short(got)}, expected 'posterior.{self._kind}'{known.get(got, '')}")
        if self._metadata.get("version") != VERSION:
            version = _short(self._metadata.get("version"))
            raise self._error(f"its version is {version}, and this program reads {VERSION!r}; update the node pack")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        self._file.__exit__(None, None, None)
        if isinstance(error, ValueError) and not str(error).startswith(self._path):
            raise self._error(str(error)) from error

    def json(self, key: str) -> object:
        """A metadata entry."""
        if key not in self._metadata:
            raise self._error(f"has no metadata entry {key!r}")
        try:
            return json.loads(self._metadata[key])
        except (ValueError, RecursionError) as error:
            raise self._error(f"its metadata entry {key!r} is not JSON ({error})") from error

    def operator(self) -> LinearOperator:
        """The operator that the file describes."""
        return self._operator("operator", self.json("operator"))

    def tensor(self, name: str, key: str, dtypes: tuple[torch.dtype, ...], ndim: int) -> Tensor:
        """The tensor stored under `key`, for the argument `name`."""
        if key not in self._names:
            raise self._error(f"{name}: has no tensor {_short(key)}")
        if key in self._used:  # or a small file could fill the memory with copies
            raise self._error(f"{name}: its tensor {_short(key)} is that of another argument")
        try:
            tensor = self._file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise self._error(f"{name}: its tensor cannot be read ({error})") from error
        if tensor.dtype not in dtypes or tensor.ndim != ndim:
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            got = f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
            raise self._error(f"{name}: its tensor is {got}, expected {expected} with {ndim} dimensions")
        self._used.add(key)
        return tensor.clone()  # not a view of the file, which may be written again

    def build(self, name: str, make: Callable[[], object]) -> object:
        """What `make` makes. Only what it refuses is the file's fault: not that the memory is used up."""
        try:
            return make()
        except ValueError as error:
            raise self._error(f"{name}: {error}") from error

    def finish(self) -> None:
        """Refuse what nobody asked for."""
        if unused := sorted(self._names - self._used):
            raise self._error(f"has tensors that its description does not use: {_short(unused)}")

    def _operator(self, name: str, description: object) -> LinearOperator:
        self._budget.open()
        if not isinstance(description, dict) or set(description) != {"class", "arguments"}:
            raise self._error(f'{name}: got {_short(description)}, expected {{"class": ..., "arguments": ...}}')
        cls, given = description["class"], description["arguments"]
        record = _CLASSES.get(cls) if isinstance(cls, str) else None
        if record is None:
            raise self._error(f"{name}: its class is {_short(cls)}, expected one of {', '.join(_CLASSES)}")
        if not isinstance(given, dict) or set(given) != set(record.arguments):
            got = sorted(given) if isinstance(given, dict) else given
            raise self._error(f"{name}: {cls} has the arguments {_short(got)}, expected {sorted(record.arguments)}")
        arguments = {key: self._argument(f"{name}.{key}", kind, given[key]) for key, kind in record.arguments.items()}
        self._budget.spend(f"{name} ({cls})", record.size(**arguments))
        return self.build(f"{name} ({cls})", lambda: record.build(**arguments))

    def _argument(self, name: str, kind: "_Check | _Array | str", value: object) -> object:
        if isinstance(kind, _Array):
            if not isinstance(value, dict) or set(value) != {"tensor"}:
                raise self._error(f'{name}: got {_short(value)}, expected {{"tensor": its name}}')
            return self.tensor(name, _text(name, value["tensor"]), (kind.dtype,), kind.ndim)
        if kind is _OPERATOR:
            return self._operator(name, value)
        if kind is _OPERATORS:
            if not isinstance(value, list):
                raise self._error(f"{name}: got {_short(value)}, expected a list of operators")
            return [self._operator(f"{name}.{i}", item) for i, item in enumerate(value)]
        return kind(name, value)

    def _error(self, message: str) -> ValueError:
        return ValueError(f"{self._path}: {message}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
