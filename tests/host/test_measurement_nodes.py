"""What the measurement nodes hand on: noise of either kind, its estimate, combined photos, and files."""

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
from torch import Tensor

PEAK = 40.0


def recipe(nodes: ModuleType, bind: Any) -> Any:
    return nodes.types.OperatorRecipe("test", bind)


def simulate(nodes: ModuleType, image: Tensor, bind: Any, noise: dict[str, Any], seed: int = 0) -> Any:
    with torch.inference_mode():
        return nodes.measurement.MeasureSimulate.execute(image, recipe(nodes, bind), noise, seed)


def gaussian(sigma: float) -> dict[str, Any]:
    return {"noise": "Gaussian", "sigma": sigma}


def poisson(peak: float = PEAK) -> dict[str, Any]:
    return {"noise": "Poisson", "peak": peak}


def from_photo(nodes: ModuleType, photo: Tensor, bind: Any, **noise: Any) -> Any:
    given = noise or {"noise": "estimated"}
    with torch.inference_mode():
        return nodes.measurement.MeasurementFromPhoto.execute(photo, recipe(nodes, bind), given)


def textured(size: int, seed: int = 0) -> Tensor:
    """A picture with slow waves, so that its flattest parts show the noise: (1, size, size, 3)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((1, 3, 5, 5), generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)
    return fine.clamp(0.1, 0.9).movedim(1, -1)


def test_poisson_noise_counts_photons(nodes: ModuleType, pack: ModuleType) -> None:
    """Whole counts, whose mean and variance are both the expected count, at every brightness."""
    levels = torch.tensor([0.1, 0.4, 0.9])
    image = levels.repeat_interleave(60)[None, :, None, None].expand(1, 180, 240, 3)
    measurement = simulate(nodes, image, pack.operators.Identity, poisson()).args[0]
    counts = (measurement.y + 1) / 2 * PEAK
    assert float((counts - counts.round()).abs().max()) < 1e-9
    for level, rows in zip(levels.tolist(), counts.split(60, 2), strict=True):
        n = rows.numel()
        assert abs(float(rows.mean()) - level * PEAK) < 4 * (level * PEAK / n) ** 0.5
        assert abs(float(rows.var()) / (level * PEAK) - 1) < 4 * (2 / n) ** 0.5 + 0.02


def test_poisson_sigma_makes_the_expected_residual_exact(nodes: ModuleType, pack: ModuleType) -> None:
    """sigma^2 is the mean variance, so that ||A x - y||^2 is N sigma^2 on average: for masks and black and white, too."""
    image = textured(96)
    for bind, values in (
        (pack.operators.Identity, image),
        (lambda shape: pack.operators.Grayscale(shape, "equal"), image.mean(-1)),
    ):
        measurement = simulate(nodes, image, bind, poisson()).args[0]
        expected = float((values.double().mean() / PEAK).sqrt())
        assert measurement.sigma / 2 == pytest.approx(expected, rel=1e-6)
        x = nodes.types.to_signal("image", image)
        found = float(measurement.residual_norm(x)) / 2 / measurement.y.numel() ** 0.5
        assert found == pytest.approx(expected, rel=5 / measurement.y.numel() ** 0.5)


def test_poisson_noise_leaves_lost_pixels_alone(nodes: ModuleType, pack: ModuleType) -> None:
    """They count neither photons nor in the sigma, bright as they may be."""
    image = torch.full((1, 32, 32, 3), 0.2)
    image[:, :16] = 1.0
    keep = pack.operators.box_mask((3, 32, 32), (16, 32), (0, 0))
    out = simulate(nodes, image, lambda _: pack.operators.Mask(keep), poisson())
    assert bool((out.args[0].y[:, :, :16] == 0).all())
    assert out.args[0].sigma / 2 == pytest.approx((0.2 / PEAK) ** 0.5, rel=1e-6)
    assert re.fullmatch(r"noise 0\.0707, root mean square; sqrt\(v / 40\) for a value v", out.ui["text"][0])


@pytest.mark.parametrize("noise", [gaussian(0.1), poisson()])
def test_a_batch_is_noised_as_single_pictures_are(nodes: ModuleType, pack: ModuleType, noise: dict[str, Any]) -> None:
    image = torch.cat([textured(32, seed) for seed in range(3)])
    batch = simulate(nodes, image, pack.operators.Identity, noise, seed=7).args[0].y
    for i in range(3):
        single = simulate(nodes, image[i : i + 1], pack.operators.Identity, noise, seed=7 + i).args[0].y
        assert torch.equal(batch[i : i + 1], single)


@pytest.mark.parametrize("sigma", [0.01, 0.05, 0.1])
def test_noise_is_estimated_and_said(nodes: ModuleType, pack: ModuleType, sigma: float) -> None:
    photo = simulate(nodes, textured(160), pack.operators.Identity, gaussian(sigma)).args[1]
    out = from_photo(nodes, photo, pack.operators.Identity)
    found = out.args[0].sigma / 2
    value, low, high = map(float, re.fullmatch(r"noise (\S+) \((\S+) to (\S+)\), estimated", out.ui["text"][0]).groups())
    assert found == pytest.approx(sigma, rel=0.15)
    assert value == pytest.approx(found, abs=1e-4)
    assert low <= sigma <= high


def test_the_noise_of_a_black_and_white_photo_is_estimated(nodes: ModuleType, pack: ModuleType) -> None:
    bind = lambda shape: pack.operators.Grayscale(shape, "709")  # noqa: E731
    photo = simulate(nodes, textured(160), bind, gaussian(0.04)).args[1]
    assert from_photo(nodes, photo, bind).args[0].sigma / 2 == pytest.approx(0.04, rel=0.15)


def test_no_noise_is_estimated_as_none(nodes: ModuleType, pack: ModuleType) -> None:
    """The flattest parts of a drawn picture have what rounding leaves, 1e-17, which is no sigma to divide by."""
    photo = torch.rand((1, 128, 128, 3), generator=torch.Generator().manual_seed(0))
    photo[:, :, :48] = torch.linspace(0.2, 0.8, 48)[:, None]
    assert from_photo(nodes, photo, pack.operators.Identity).args[0].sigma == 0


def test_a_photo_that_only_a_wild_picture_would_meet_is_refused(nodes: ModuleType, pack: ModuleType) -> None:
    photo = torch.rand((1, 64, 64, 3), generator=torch.Generator().manual_seed(0))
    bind = lambda shape: pack.operators.Blur(pack.operators.gaussian_kernel(3.0), shape, "circular")  # noqa: E731
    measurement = from_photo(nodes, photo, bind, noise="entered", sigma=1e-5).args[0]
    with pytest.raises(ValueError, match=r"^measurement: .*values of up to .*larger sigma"):
        nodes.finish.finish(nodes.types.to_signal("photo", photo), measurement)


def test_an_estimate_that_cannot_be_had_is_refused(nodes: ModuleType, pack: ModuleType) -> None:
    photo = simulate(nodes, textured(160), pack.operators.Identity, gaussian(0.05)).args[1]
    with pytest.raises(ValueError, match=r"photo: .*exactly constant.*set noise to entered and give sigma"):
        from_photo(nodes, torch.full((1, 96, 96, 3), 0.5), pack.operators.Identity)
    lost = lambda shape: pack.operators.Mask(pack.operators.random_mask(shape, 0.2, seed=0))  # noqa: E731
    with pytest.raises(ValueError, match=r"noise: cannot be estimated, lost pixels are in 100% of the photo's blocks"):
        from_photo(nodes, photo, lost)
    other = simulate(nodes, textured(160), pack.operators.Identity, gaussian(0.15)).args[1]
    with pytest.raises(ValueError, match=r"photo: the photos of the batch differ in noise \(0\.0\d+ to 0\.1\d+\)"):
        from_photo(nodes, torch.cat([photo, other]), pack.operators.Identity)
    grain = torch.rand((1, 3, 80, 80), generator=torch.Generator().manual_seed(0))
    coloured = torch.nn.functional.interpolate(grain, scale_factor=2, mode="bilinear") * 0.6 + 0.2
    with pytest.raises(ValueError, match=r"photo: its noise is between \S+ and \S+ and cannot be told from its texture"):
        from_photo(nodes, coloured.movedim(1, -1), pack.operators.Identity)


def test_a_small_hole_does_not_hinder_the_estimate(nodes: ModuleType, pack: ModuleType) -> None:
    hole = lambda shape: pack.operators.Mask(pack.operators.box_mask(shape, (40, 40), (60, 60)))  # noqa: E731
    photo = simulate(nodes, textured(160), hole, gaussian(0.05)).args[1]
    assert from_photo(nodes, photo, hole).args[0].sigma / 2 == pytest.approx(0.05, rel=0.15)


def three(nodes: ModuleType, pack: ModuleType, image: Tensor) -> list[Any]:
    ops = pack.operators
    kinds = (
        (lambda shape: ops.AreaDownscale(shape, 4), 0.02),
        (lambda shape: ops.Grayscale(shape, "709"), 0.05),
        (ops.Identity, 0.1),
    )
    return [simulate(nodes, image, bind, gaussian(sigma)).args[0] for bind, sigma in kinds]


def combine(nodes: ModuleType, *parts: Any) -> Any:
    together, *others = parts
    with torch.inference_mode():
        for part in others:
            together = nodes.measurement.CombineMeasurements.execute(together, part).args[0]
    return together


@pytest.mark.parametrize("order", [(0, 1), (2, 0), (0, 1, 2), (2, 2, 1, 0)])
def test_combined_measurements_come_apart_again(nodes: ModuleType, pack: ModuleType, order: tuple[int, ...]) -> None:
    image = torch.cat([textured(32, seed) for seed in range(2)])
    parts = [three(nodes, pack, image)[i] for i in order]
    found = nodes.measurement.single(combine(nodes, *parts))
    assert len(found) == len(parts)
    x = nodes.types.to_signal("image", image)
    for got, part in zip(found, parts, strict=True):
        assert torch.allclose(got.y, part.y, rtol=0, atol=1e-14)
        assert torch.allclose(got.operator.A(x), part.operator.A(x), rtol=0, atol=1e-14)
        assert got.sigma == pytest.approx(part.sigma, rel=1e-14)


def test_finish_reads_combined_photos_each_in_its_own_units(nodes: ModuleType, pack: ModuleType) -> None:
    image = textured(32)
    parts = three(nodes, pack, image)[:2]
    with torch.inference_mode():
        finished, residual, text = nodes.finish.finish(nodes.types.to_signal("image", image), combine(nodes, *parts))
    x = [nodes.types.to_signal("image", v) for v in (image, finished)]
    rms = [[float((part.operator.A(v) - part.y).square().mean().sqrt()) / 2 for v in x] for part in parts]
    noise = (0.02, 0.05)
    expected = [f"photo {k + 1}: |A x - y| {rms[k][0]:.1e} -> {rms[k][1]:.1e} (noise {noise[k]:.3g})" for k in (0, 1)]
    assert text.split("\n") == expected
    assert residual == pytest.approx(max(after for _, after in rms), rel=1e-9)


@pytest.mark.parametrize("sigma", [0.0, 0.01])
def test_photos_of_two_pictures_cannot_both_be_met(nodes: ModuleType, pack: ModuleType, sigma: float) -> None:
    """Each alone can be; a small photo of the same picture, but with the light turned up, contradicts the large one."""
    image, brighter = textured(32), (textured(32) + 0.1).clamp(0, 1)
    small = simulate(nodes, brighter, lambda shape: pack.operators.AreaDownscale(shape, 4), gaussian(sigma)).args[0]
    whole = simulate(nodes, image, pack.operators.Identity, gaussian(sigma)).args[0]
    with torch.inference_mode():
        consistency = nodes.readouts.Consistency.execute
        alone, both = consistency(image, small, 10.0), consistency(image, combine(nodes, whole, small), 10.0)
    assert "It can be met" in alone.ui["text"][0]
    first, second = both.ui["text"][0].split("\n")
    assert "photo 1" in first
    assert "agrees" in first
    assert "The best compromise between the photos leaves" in second
    assert not both.args[3]


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
    file = saved_as(nodes.storage.SaveMeasurement.execute(measurement, "measurements/test"))
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
    limit, (_, hard) = 4096, resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(ValueError, match=r"^filename_prefix: .* cannot be written \(.*File too large.*make room"):
            nodes.storage.SaveMeasurement.execute(measurement, "measurements/full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not list((output_folder() / "measurements").glob("full*"))


@pytest.mark.parametrize("white", [255.0, 1e10])
def test_values_of_another_scale_are_refused(white: float, nodes: ModuleType, pack: ModuleType) -> None:
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


@pytest.mark.parametrize(
    ("side", "method"), [(512, {"method": "area", "factor": 64}), (1024, {"method": "bicubic", "factor": 16.0})]
)
def test_a_factor_too_large_for_the_photo_is_refused(nodes: ModuleType, side: int, method: dict[str, Any]) -> None:
    operator = nodes.operators.downscale.Downscale.execute(method).args[0]
    full = side * int(method["factor"])
    message = f"^operator: asks for a full picture of {full} x {full}, expected .*; lower the factor .*{side} x {side}"
    with bounded_memory(), torch.inference_mode(), pytest.raises(ValueError, match=message):
        nodes.measurement.MeasurementFromPhoto.execute(
            torch.zeros(1, side, side, 3), operator, {"noise": "entered", "sigma": 0.0}
        )


def test_a_picture_too_long_for_any_operator_is_refused(nodes: ModuleType, pack: ModuleType) -> None:
    with bounded_memory(), pytest.raises(ValueError, match=r"^operator: asks for .* 100000 x 1, .*; use a smaller image"):
        simulate(nodes, torch.zeros(1, 1, 100_000, 3), lambda shape: pack.operators.BicubicDownscale(shape, 1.0), gaussian(0.0))


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
