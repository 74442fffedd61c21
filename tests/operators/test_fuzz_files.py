"""Damaged and hostile files: an operator that works or a clear error, within a bound of memory, and no file touched but the one named."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.damaged_files import bounded_memory, damaged, good_files

import operators
from operators import LinearOperator, Measurement
from operators.io import load_measurement, load_operator

USED = 2**20  # values of a picture; larger operators are not applied


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return good_files(operators, tmp_path_factory.mktemp("files") / "file")


def use(found: LinearOperator | Measurement) -> None:
    """Whatever was read is as good as any other."""
    if isinstance(found, Measurement):
        assert math.isfinite(found.sigma)
        found = found.operator
    if found.batch * max(math.prod(found.in_shape), math.prod(found.out_shape)) <= USED:
        y = found.A(torch.ones(found.batch, *found.in_shape))
        assert y.shape == (found.batch, *found.out_shape)
        assert found.A_adjoint(y).shape == (found.batch, *found.in_shape)


def test_damaged_files(
    originals: list[bytes], tmp_path: Path, count: Callable[[int, int], int], ran: Callable[[int], None]
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
            use(found)
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
        assert path.read_bytes() == data

    with bounded_memory():
        run()
    ran(seen["refused"] + seen["read"])
    assert seen["refused"] > seen["read"] > 0, seen  # bits of a tensor may change without harm


@pytest.mark.parametrize("exhaust", [lambda **_: torch.empty(2**45), lambda **_: bytearray(2**45)])
def test_used_up_memory_is_not_taken_for_a_refusal(
    exhaust: Callable[..., object], originals: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the bound of memory could not be seen to be broken."""
    path = tmp_path / "file.safetensors"
    path.write_bytes(originals[-2])  # a Crop
    record = operators.records.CLASSES["Crop"]
    monkeypatch.setitem(operators.records.CLASSES, "Crop", operators.records.Record(record.arguments, exhaust))
    with bounded_memory(), pytest.raises((MemoryError, RuntimeError)):
        load_operator(path)


def test_a_value_nested_too_deep_to_print_is_named_by_its_type() -> None:
    value: list = []
    for _ in range(10_000):
        value = [value]
    assert operators.records.short(value) == "list"
