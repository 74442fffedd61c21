"""Damaged and hostile files: an operator or a clear error, within a bound of memory, and no file touched but the one named."""

import copy
import json
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from operators import BicubicDownscale, Blur, Dense, Grayscale, LinearOperator, Mask, Measurement, Scale, Stack
from operators.io import load_measurement, load_operator, save_measurement, save_operator

SHAPE = (3, 6, 7)
ROOM = 4 * 2**30  # bytes beside what the process has: four times what the largest operator of a file may take
LEAVES = (
    None,
    True,
    -1,
    0,
    1,
    3,
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
    [[]],
    {"a": 1},
)


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Good files: with tensors and without, nested, an operator and a measurement."""
    path = tmp_path_factory.mktemp("files") / "file"
    blur = Blur(rand(3, 3), SHAPE, "reflect")
    found = []
    for operator in (
        Mask((rand(1, 1, 6, 7) < 0.6).float()) @ blur,
        Stack([Grayscale(SHAPE), Scale(SHAPE, 0.5), BicubicDownscale(SHAPE, 1.5)]),
        Dense(rand(6, 24), (2, 3, 4), (1, 2, 3)),
    ):
        save_operator(path, operator)
        found.append(path.read_bytes())
        save_measurement(path, Measurement(rand(2, *operator.out_shape), operator, 0.1))
        found.append(path.read_bytes())
    return found


@pytest.fixture
def bounded() -> Iterator[None]:
    """A limit to the memory that the process may take: beyond it there is an error that no refusal looks like."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + ROOM, before[1]))
    yield
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


def test_damaged_files(
    originals: list[bytes], tmp_path: Path, bounded: None, count: Callable[[int, int], int], ran: Callable[[int], None]
) -> None:
    path = tmp_path / "file.safetensors"
    seen = {"refused": 0, "read": 0}

    @settings(
        max_examples=count(150, 3000),
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged(originals), st.booleans())
    def run(data: bytes, measurement: bool) -> None:
        path.write_bytes(data)
        try:
            found = load_measurement(path) if measurement else load_operator(path)
        except ValueError as refusal:
            found = str(refusal)
        seen["refused" if isinstance(found, str) else "read"] += 1
        if isinstance(found, str):
            assert found.startswith(str(path))
            assert len(found) < 700
        else:
            assert isinstance(found, Measurement if measurement else LinearOperator)
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
        assert path.read_bytes() == data

    run()
    ran(seen["refused"] + seen["read"])
    assert seen["refused"] > seen["read"] > 0, seen  # bits of a tensor may change without harm
