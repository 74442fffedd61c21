"""Save and load operators and measurements: one .safetensors file with the tensors and a JSON description.

    metadata   format      "posterior.operator" or "posterior.measurement"
               version     "1"
               operator    {"class": "Blur", "arguments": {"kernel": {"tensor": "operator.kernel"}, "in_shape": [3, 64, 64], ...}}
               sigma       measurements only, [-1, 1] units
    tensors    by the names that the description uses; "y" for a measurement

An operator inside another (a composition, a stack) is described inside its argument. A file is data: it names one of the
classes in records.py and arguments of the kinds there, and everything else in it is an error.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .base import LinearOperator
from .checks import Shape
from .measurement import Measurement
from .records import (
    CLASSES,
    MAX_SIDE,
    MAX_VALUES,
    OPERATOR,
    OPERATORS,
    RECORDS,
    Array,
    Budget,
    Check,
    number,
    short,
    text,
)

VERSION = "1"
MAX_RATIO = 64  # of a larger batch's full pictures to what the file holds: eight times as wide and high

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
    _save(path, "operator", tensors, operator=json.dumps(_describe(operator, "operator", tensors, Budget())))


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
    description = json.dumps(_describe(measurement.operator, "operator", tensors, Budget()))
    _save(path, "measurement", tensors, operator=description, sigma=json.dumps(float(measurement.sigma)))


def load_measurement(path: StrPath) -> Measurement:
    """Read a measurement, on the CPU. Errors as for `load_operator`."""
    with _Reader(path, "measurement") as file:
        operator = file.operator()
        y = file.tensor("y", "y", (torch.float16, torch.bfloat16, torch.float32, torch.float64), 4)
        sigma = number("sigma", file.json("sigma"))
        file.finish()
        measurement = file.build("measurement", lambda: Measurement(y, operator, sigma))
        file.build("measurement", lambda: (check_full_size("operator", operator.in_shape), _check_batch(measurement)))
        return measurement


# Writing --------------------------------------------------------------------------------------------------------------


def _describe(operator: LinearOperator, name: str, tensors: dict[str, Tensor], budget: Budget) -> dict[str, object]:
    """The description of an operator; its tensors are added to `tensors` under names that start with `name`.

    What could not be loaded is refused, by the checks of loading.
    """
    record = RECORDS.get(type(operator))
    if record is None:
        raise ValueError(
            f"operator: {type(operator).__name__} cannot be saved, only {', '.join(CLASSES)} and what is made of them"
        )
    budget.open()
    arguments: dict[str, object] = {}
    values = {key: record.read[key](operator) if key in record.read else getattr(operator, key) for key in record.arguments}
    for key, kind in record.arguments.items():
        value, path = values[key], f"{name}.{key}"
        if isinstance(kind, Array):
            tensors[path] = value.to(kind.dtype)
            arguments[key] = {"tensor": path}
        elif kind is OPERATOR:
            arguments[key] = _describe(value, path, tensors, budget)
        elif kind is OPERATORS:
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
        self._budget = Budget()

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
            raise self._error(f"its format is {short(got)}, expected 'posterior.{self._kind}'{known.get(got, '')}")
        if self._metadata.get("version") != VERSION:
            version = short(self._metadata.get("version"))
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
            raise self._error(f"{name}: has no tensor {short(key)}")
        if key in self._used:  # or a small file could fill the memory with copies
            raise self._error(f"{name}: its tensor {short(key)} is that of another argument")
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
            raise self._error(f"has tensors that its description does not use: {short(unused)}")

    def _operator(self, name: str, description: object) -> LinearOperator:
        self._budget.open()
        if not isinstance(description, dict) or set(description) != {"class", "arguments"}:
            raise self._error(f'{name}: got {short(description)}, expected {{"class": ..., "arguments": ...}}')
        cls, given = description["class"], description["arguments"]
        record = CLASSES.get(cls) if isinstance(cls, str) else None
        if record is None:
            raise self._error(f"{name}: its class is {short(cls)}, expected one of {', '.join(CLASSES)}")
        if not isinstance(given, dict) or set(given) != set(record.arguments):
            got = sorted(given) if isinstance(given, dict) else given
            raise self._error(f"{name}: {cls} has the arguments {short(got)}, expected {sorted(record.arguments)}")
        arguments = {key: self._argument(f"{name}.{key}", kind, given[key]) for key, kind in record.arguments.items()}
        self._budget.spend(f"{name} ({cls})", record.size(**arguments))
        return self.build(f"{name} ({cls})", lambda: record.build(**arguments))

    def _argument(self, name: str, kind: "Check | Array | str", value: object) -> object:
        if isinstance(kind, Array):
            if not isinstance(value, dict) or set(value) != {"tensor"}:
                raise self._error(f'{name}: got {short(value)}, expected {{"tensor": its name}}')
            return self.tensor(name, text(name, value["tensor"]), (kind.dtype,), kind.ndim)
        if kind is OPERATOR:
            return self._operator(name, value)
        if kind is OPERATORS:
            if not isinstance(value, list):
                raise self._error(f"{name}: got {short(value)}, expected a list of operators")
            return [self._operator(f"{name}.{i}", item) for i, item in enumerate(value)]
        return kind(name, value)

    def _error(self, message: str) -> ValueError:
        return ValueError(f"{self._path}: {message}")
