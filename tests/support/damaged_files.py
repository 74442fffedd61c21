"""Files as they arrive after an accident or from an enemy: good ones, cut, with bits turned, with other tensors or descriptions."""

import contextlib
import copy
import json
import resource
import struct
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import torch
from hypothesis import strategies as st

SHAPE = (3, 6, 7)
ROOM = (
    6 * 2**30
)  # bytes beside what the process has: an operator of a file may take 2 GiB, and the first picture made with it 4
LEAVES = (
    None,
    True,
    -1,
    0,
    1,
    3,
    4096,
    5461,
    16384,
    2**27,
    2**31,
    2**63,
    10**30,
    1e308,
    "",
    "x",
    "../../x",
    "operator.keep",
    [],
    {},
    [3, 6, 7],
    [3, 16384, 5461],
    [1, 16384, 16384],
    [[]],
    {"a": 1},
)


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def good_files(ops: ModuleType, path: Path) -> list[bytes]:
    """With tensors and without, nested, an operator and a measurement; `path` is written to."""
    found = []
    for operator in (
        ops.Mask((rand(1, 1, 6, 7) < 0.6).float()) @ ops.Blur(rand(3, 3), SHAPE, "reflect"),
        ops.Stack([ops.Grayscale(SHAPE), ops.Scale(SHAPE, 0.5), ops.BicubicDownscale(SHAPE, 1.5)]),
        ops.Dense(rand(6, 24), (2, 3, 4), (1, 2, 3)),
        ops.Crop(SHAPE, (1, 1)),
    ):
        ops.save_operator(path, operator)
        found.append(path.read_bytes())
        ops.save_measurement(path, ops.Measurement(rand(2, *operator.out_shape), operator, 0.1))
        found.append(path.read_bytes())
    return found


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """A limit to the memory that the process may take: beyond it there is an error that no refusal looks like."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


def packed(header: dict[str, Any], rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a nest of dicts and lists."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
    return [place for key in keys for place in ((tree, key), *places(tree[key]))]


@st.composite
def damaged(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """One of the good files, spoilt."""
    data = draw(st.sampled_from(originals))
    kind = draw(st.sampled_from(["truncate", "bits", "bits in the header", "tensors", "tensors", "description", "description"]))
    if kind == "truncate":
        return data[: draw(st.integers(0, len(data) - 1))]
    if kind.startswith("bits"):
        end = 8 + struct.unpack("<Q", data[:8])[0] if kind.endswith("header") else len(data)
        spoilt = bytearray(data)
        for at in draw(st.lists(st.integers(0, 8 * end - 1), min_size=1, max_size=8)):
            spoilt[at // 8] ^= 1 << at % 8
        return bytes(spoilt)
    header, rest = header_of(data)
    if kind == "tensors":
        entry = header[draw(st.sampled_from(sorted(header.keys() - {"__metadata__"}) or ["__metadata__"]))]
        entry["dtype"] = draw(st.sampled_from(["F64", "F32", "U8", "I64", "BOOL", "F8_E4M3", "C64", "?"]))
        entry["shape"] = draw(st.lists(st.sampled_from([0, 1, 3, 7, 2**16, 2**33, 2**62, -1]), max_size=5))
        entry["data_offsets"] = draw(st.sampled_from([entry.get("data_offsets"), [0, 2**60], [8, 0], [-1, 4], [0, len(rest)]]))
        return packed(header, rest)
    description = json.loads(header["__metadata__"]["operator"])
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(places(description) or [(description, "class")]))
        container[key] = copy.deepcopy(draw(st.sampled_from(LEAVES)))
    header["__metadata__"]["operator"] = json.dumps(description)
    return packed(header, rest)
