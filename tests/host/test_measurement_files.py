"""Save and Load Measurement: bit for bit, in ComfyUI's two folders only, and no damaged file does harm."""

import re
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from support.damaged_files import bounded_memory, damaged, good_files, header_of, packed
from support.measured import combine, gaussian, simulate, textured, three


def output_folder() -> Path:
    import folder_paths

    return Path(folder_paths.get_output_directory())


def saved_as(out: Any) -> str:
    """How Load Measurement names what Save Measurement wrote."""
    (entry,) = out.ui["measurements"]
    assert entry["type"] == "output"
    return f"{entry['subfolder']}/{entry['filename']} [output]"


@pytest.mark.parametrize("count", [1, 3])
def test_saved_measurement_comes_back_bit_identical(nodes: ModuleType, pack: ModuleType, count: int) -> None:
    """One photo, and three in one measurement with more values than a picture may have rows."""
    image = torch.cat([textured(128, seed) for seed in range(2)])
    measurement = combine(nodes, *three(nodes, pack, image)[:count])
    out = nodes.storage.SaveMeasurement.execute(measurement, "measurements/test")
    file = saved_as(out)
    assert f"saved as {file}\n" in out.ui["text"][0]  # to be copied from there
    assert file in nodes.storage.LoadMeasurement.define_schema().inputs[0].options
    with torch.inference_mode():
        loaded, degraded, lost = nodes.storage.LoadMeasurement.execute(file).args
    assert torch.equal(loaded.y, measurement.y)
    assert loaded.sigma == measurement.sigma
    x = nodes.types.to_signal("image", image)
    assert torch.equal(loaded.operator.A(x), measurement.operator.A(x))
    assert degraded.shape[0] == 2
    assert degraded.shape[-1] == 3
    assert lost.shape == (2, 128, 128)


def test_sums_of_a_whole_picture_are_no_damage(nodes: ModuleType, pack: ModuleType) -> None:
    """A camera of one pixel: each value is the sum over half of the picture."""
    rows = (torch.rand((50, 3072), generator=torch.Generator().manual_seed(0)) < 0.5).double()
    operator = pack.operators.Dense(rows, (3, 32, 32), (1, 1, 50))
    measurement = pack.operators.Measurement(operator.A(torch.full((1, 3, 32, 32), 0.5, dtype=torch.float64)), operator)
    file = saved_as(nodes.storage.SaveMeasurement.execute(measurement, "measurements/sums"))
    assert torch.equal(nodes.storage.LoadMeasurement.execute(file).args[0].y, measurement.y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_lost_pixels_of_a_file_in_any_precision(dtype: torch.dtype, nodes: ModuleType, pack: ModuleType) -> None:
    """A blur before the hole is left: what its transform rounds is no measurement."""
    ops = pack.operators
    blur, hole = (
        ops.Blur(ops.disk_kernel(2.0), (3, 64, 64), "circular"),
        ops.Mask(ops.box_mask((3, 64, 64), (40, 40), (10, 10))),
    )
    path = output_folder() / "precision.safetensors"
    ops.save_measurement(path, ops.Measurement(torch.zeros(1, 3, 64, 64, dtype=dtype), hole @ blur))
    lost = nodes.storage.LoadMeasurement.execute(f"{path.name} [output]").args[2]
    path.unlink()
    assert float(lost.sum()) == 36**2


def test_a_full_disk_is_said(nodes: ModuleType, pack: ModuleType) -> None:
    measurement = three(nodes, pack, textured(128))[0]
    limit, (soft, hard) = 4096, resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(ValueError, match=r"^filename_prefix: .* cannot be written \(.*File too large.*make room"):
            nodes.storage.SaveMeasurement.execute(measurement, "measurements/full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not list((output_folder() / "measurements").glob("full*"))


def test_values_of_another_scale_are_refused(nodes: ModuleType, pack: ModuleType) -> None:
    white = 1e10
    with pytest.raises(ValueError, match=r"^image: has values of up to .*pictures are 0 to 1 in ComfyUI"):
        simulate(nodes, white * textured(32), pack.operators.Identity, gaussian(0.0))
    path = output_folder() / "scale.safetensors"
    pack.operators.save_measurement(
        path, pack.operators.Measurement(torch.full((1, 3, 8, 8), white), pack.operators.Identity((3, 8, 8)))
    )
    with pytest.raises(ValueError, match=r"^file: .* holds values of up to"):
        nodes.storage.LoadMeasurement.execute(f"{path.name} [output]")
    path.unlink()


def test_a_file_of_the_input_folder_is_found_and_a_changed_one_noticed(nodes: ModuleType, pack: ModuleType) -> None:
    import folder_paths

    one, two, _ = three(nodes, pack, textured(32))
    storage = nodes.storage
    path = Path(folder_paths.get_input_directory()) / "from a colleague.safetensors"
    path.parent.mkdir(exist_ok=True)
    pack.operators.save_measurement(path, one)
    assert path.name in storage.LoadMeasurement.define_schema().inputs[0].options
    before = storage.LoadMeasurement.fingerprint_inputs(path.name)
    assert storage.LoadMeasurement.fingerprint_inputs(path.name) == before
    pack.operators.save_measurement(path, two)
    assert storage.LoadMeasurement.fingerprint_inputs(path.name) != before
    assert storage.LoadMeasurement.execute(path.name).args[0].operator.out_shape == two.operator.out_shape


def test_nothing_outside_the_two_folders_is_read(nodes: ModuleType, pack: ModuleType, tmp_path: Path) -> None:
    secret = tmp_path / "secret.safetensors"
    pack.operators.save_measurement(secret, three(nodes, pack, textured(32))[0])
    inside = output_folder() / "measurements"
    inside.mkdir(parents=True, exist_ok=True)
    link, folder = inside / "link.safetensors", inside / "elsewhere"
    link.symlink_to(secret)
    folder.symlink_to(tmp_path, target_is_directory=True)
    climb = "../" * 40
    tricks = [
        str(secret),
        f"{secret} [output]",
        f"{climb}{str(secret)[1:]}",
        f"{climb}{str(secret)[1:]} [output]",
        "measurements/link.safetensors [output]",
        "measurements/elsewhere/secret.safetensors [output]",
        "secret.safetensors [temp]",
        "..",
        "",
        "a\0b.safetensors",
    ]
    try:
        for trick in tricks:
            with pytest.raises(ValueError, match=r"^file: .* is outside ComfyUI's input and output folders; choose"):
                nodes.storage.LoadMeasurement.execute(trick)
            with pytest.raises(ValueError, match=r"^file: .* is outside"):
                nodes.storage.LoadMeasurement.fingerprint_inputs(trick)
        listed = nodes.storage.LoadMeasurement.define_schema().inputs[0].options
        assert not [name for name in listed if "link" in name or "secret" in name]
    finally:
        link.unlink()
        folder.unlink()


@pytest.mark.parametrize("name", ["nothing.safetensors", "measurements [output]", "picture.png"])
def test_a_file_that_is_not_there_is_said_to_be_missing(nodes: ModuleType, name: str) -> None:
    with pytest.raises(ValueError, match=r"^file: there is no file .* of kind \.safetensors .*choose one from the list"):
        nodes.storage.LoadMeasurement.execute(name)


@pytest.mark.parametrize("prefix", ["", "  ", ".", "..", "../up", "a/../../up", "/tmp/posterior", "a\0b"])
def test_nothing_is_written_outside_the_output_folder(nodes: ModuleType, pack: ModuleType, prefix: str) -> None:
    measurement = three(nodes, pack, textured(32))[0]
    with pytest.raises(ValueError, match=r"^filename_prefix: got .*expected a name within ComfyUI's output folder"):
        nodes.storage.SaveMeasurement.execute(measurement, prefix)


def test_a_linked_folder_leads_nowhere(nodes: ModuleType, pack: ModuleType, tmp_path: Path) -> None:
    link = output_folder() / "elsewhere"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(tmp_path, target_is_directory=True)
    try:
        for prefix in ("elsewhere/x", "elsewhere/deeper/x", "numbers/../elsewhere/x"):
            with pytest.raises(ValueError, match=r"^filename_prefix: got .*expected a name within ComfyUI's output folder"):
                nodes.storage.SaveMeasurement.execute(three(nodes, pack, textured(32))[0], prefix)
    finally:
        link.unlink()
    assert list(tmp_path.iterdir()) == []


def test_a_small_file_cannot_fill_the_memory(nodes: ModuleType, pack: ModuleType) -> None:
    """A thousand photos of one pixel, each of a picture of 89 million."""
    path = output_folder() / "tiny.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    ops = pack.operators
    ops.save_measurement(path, ops.Measurement(torch.zeros(1, 3, 1, 1), ops.Crop((3, 16384, 5461), (1, 1))))
    header, _ = header_of(path.read_bytes())
    header["y"] = {"dtype": "F32", "shape": [1000, 3, 1, 1], "data_offsets": [0, 12000]}
    path.write_bytes(packed(header, bytes(12000)))
    with bounded_memory(), pytest.raises(ValueError, match=r"^file: .*a batch of 1000 photos .* Choose another file"):
        nodes.storage.LoadMeasurement.execute("tiny.safetensors [output]")
    path.unlink()


def test_damaged_files_are_refused_by_the_node_or_usable(
    nodes: ModuleType, pack: ModuleType, count: Callable[[int, int], int], ran: Callable[[int], None]
) -> None:
    path = output_folder() / "damaged.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    originals = [data for data in good_files(pack.operators, path) if b"posterior.measurement" in data]
    seen = {"refused": 0, "read": 0}

    @settings(
        max_examples=count(40, 1000), derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(damaged(originals))
    def run(data: bytes) -> None:
        path.write_bytes(data)
        refusal = ""
        try:
            with torch.inference_mode():
                measurement, degraded, lost = nodes.storage.LoadMeasurement.execute("damaged.safetensors [output]").args
        except ValueError as error:
            refusal = str(error)
        if refusal:
            seen["refused"] += 1
            assert re.search(r"^file: .*(Choose another file|the nodes restore those in colour)", refusal)
            return
        seen["read"] += 1
        assert lost.shape == (len(measurement.y), *measurement.operator.in_shape[1:])
        assert degraded.shape[-1] == 3

    with bounded_memory():
        run()
    path.unlink()
    ran(sum(seen.values()))
    assert min(seen.values()) > 0, seen


def test_saved_files_are_numbered_on(nodes: ModuleType, pack: ModuleType) -> None:
    measurement = three(nodes, pack, textured(32))[0]
    names = [saved_as(nodes.storage.SaveMeasurement.execute(measurement, "numbers/%year%")) for _ in range(3)]
    assert [re.sub(r"^numbers/20\d\d", "", name) for name in names] == [f"_0000{i}_.safetensors [output]" for i in (1, 2, 3)]
