"""4K pictures at the nodes that take one: right, and of the same size. Only `--full` makes all of them that large."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.host_runs import Host
from support.pictures import picture

pytestmark = pytest.mark.timeout(3600)  # with --full


class Large:
    """A picture of 3840 x 2160, or smaller in the same shape; a hole in it; and the nodes, by the names of their classes."""

    def __init__(self, pack: ModuleType, height: int) -> None:
        self.nodes = {node.__name__: node for node in pack.nodes.NODES}
        self.size = height, height // 9 * 16
        self.truth = picture(*self.size)
        self.hole = torch.zeros(1, *self.size)
        self.hole[:, height // 5 : height // 2, height // 4 : height] = 1

    def __call__(self, name: str, *given: Any, **named: Any) -> tuple[Any, ...]:
        with torch.inference_mode():
            return self.nodes[name].execute(*given, **named).args

    def measure(self, kind: str = "hole", sigma: float = 0.0) -> Any:
        return self("MeasureSimulate", self.truth, self.recipe(kind), {"noise": "Gaussian", "sigma": sigma}, 0)[0]

    def recipe(self, kind: str) -> Any:
        if kind == "hole":
            return self("MissingPixels", {"pattern": "mask", "mask": self.hole, "threshold": 0.5})[0]
        return self("Downscale", {"method": "area", "factor": 4})[0]


@pytest.fixture
def large(pack: ModuleType, count: Callable[[int, int], int]) -> Large:
    return Large(pack, count(288, 2160))


def test_finish(pack: ModuleType, count: Callable[[int, int], int]) -> None:
    """3840 x 2160, or 1280 x 720, with a hole in it, kept to the bit; and made smaller by 4 and met again."""
    ops, finish = pack.operators, pack.nodes.finish.Finish.execute
    height = count(720, 2160)
    size = height, height // 9 * 16
    truth = torch.rand((1, *size, 3), generator=torch.Generator().manual_seed(0))
    x = 2 * truth.movedim(-1, 1).double() - 1
    hole = ops.Mask(ops.box_mask((3, *size), (height // 4, height // 3), (height // 3, height // 2)))
    small = ops.AreaDownscale((3, *size), 4)
    for operator in (hole, small):
        measurement = ops.Measurement(operator.A(x), operator)
        result, residual = finish(torch.full_like(truth, 0.5), measurement, 0.05, 0.0).args
        assert result.shape == truth.shape
        assert residual <= 1e-4
        if operator is hole:
            kept = hole.keep[0, 0] > 0
            assert torch.equal(result[0][kept], truth[0][kept])


def test_measured_and_lost_pixels(large: Large) -> None:
    measurement, degraded, lost = large(
        "MeasureSimulate", large.truth, large.recipe("hole"), {"noise": "Gaussian", "sigma": 0.0}, 0
    )
    assert torch.equal(lost, large.hole)
    kept = large.hole == 0
    assert torch.equal(degraded[kept], large.truth[kept])
    assert measurement.y.shape == (1, 3, *large.size)


def test_photo_as_measurement(large: Large) -> None:
    given = {"noise": "entered", "sigma": 0.0}
    measurement, degraded, lost = large("MeasurementFromPhoto", large.truth, large.recipe("hole"), given)
    assert degraded.shape == large.truth.shape
    assert torch.equal(lost, large.hole)
    assert measurement.operator.in_shape == (3, *large.size)


def test_saved_and_loaded(large: Large) -> None:
    import folder_paths

    measurement = large.measure()
    folder = Path(folder_paths.get_output_directory()) / "large"
    before = set(folder.glob("*"))
    large("SaveMeasurement", measurement, "large/picture")
    (path,) = set(folder.glob("*")) - before
    again = large("LoadMeasurement", f"large/{path.name} [output]")[0]
    path.unlink()
    assert torch.equal(again.y, measurement.y)
    assert torch.equal(again.operator.keep, measurement.operator.keep)


def test_consistency_of_combined_photos(large: Large) -> None:
    parts = [large.measure("hole", 0.02), large.measure("area", 0.05)]
    both = large("CombineMeasurements", *parts)[0]
    shown, relative, sigmas, agrees = large("Consistency", large.truth, both, 10.0)
    assert agrees
    assert sigmas == pytest.approx(1, abs=0.02)
    assert 0 < relative < 0.2
    assert shown.shape[2] == 3 * large.size[1] + 8
    assert not large("Consistency", (large.truth + 0.1), both, 10.0)[3]


def test_compared(large: Large) -> None:
    shown, psnr, ssim = large("Compare", large.truth + 0.05, large.truth, 0.2)
    assert shown.shape == (1, large.size[0], 3 * large.size[1] + 8, 3)
    assert psnr == pytest.approx(26.02, abs=0.01)
    assert 0.9 < ssim < 1


def test_uncertainty(large: Large) -> None:
    mean, shown, deviation = large("Uncertainty", torch.cat([large.truth, large.truth + 0.1]), 0, 0.2)
    assert mean.shape == shown.shape == large.truth.shape
    assert torch.allclose(mean, large.truth + 0.05, atol=1e-6)
    assert torch.allclose(deviation, torch.full_like(deviation, 0.1 / 2**0.5 / 0.2), atol=1e-4)


def test_read_from_the_photo(large: Large) -> None:
    noise = torch.randn(large.truth.shape, generator=torch.Generator().manual_seed(1))
    sigma, low, high = large("EstimateNoise", large.truth + 0.05 * noise)
    assert low <= sigma <= high
    assert sigma == pytest.approx(0.05, rel=0.05)
    striped = large.truth.clone()
    striped[:, 7::24] = 0
    (lost,) = large("EstimateStripes", striped)
    assert torch.equal(lost[0].amax(1), lost[0].amin(1))
    assert torch.equal(lost[0, :, 0].nonzero().flatten(), torch.arange(7, large.size[0], 24))


def test_blur_read_from_the_photo(large: Large) -> None:
    """Of an edge as large as the photo in seconds; a point is looked for in a crop only."""
    columns, rows = torch.arange(large.size[1])[None], torch.arange(large.size[0])[:, None]
    edge = 0.5 + 0.3 * torch.erf((columns - large.size[1] / 2 + 0.05 * rows) / 3 / 2**0.5)
    noise = 0.005 * torch.randn(1, *large.size, 3, generator=torch.Generator().manual_seed(2))
    _, sigma = large("EstimateBlur", edge[None, ..., None] + noise, "edge")
    assert sigma == pytest.approx(3, rel=0.02)
    if max(large.size) > 1024:
        with pytest.raises(
            ValueError, match="photo: got 2160 x 3840, expected at most as many pixels as 1024 x 1024; crop the point"
        ):
            large("EstimateBlur", large.truth, "point")


def test_sizes_for_the_samplers(large: Large, hosts: Callable[..., Host]) -> None:
    """Nothing is sampled: a 4K run takes a GPU. What it needs is estimated."""
    h, measurement = hosts("sd15"), large.measure("area", 0.01)
    (latent,) = large("StartLatent", measurement, h.vae, "noise")
    assert latent["samples"].shape == (1, 4, large.size[0] // 8, large.size[1] // 8)
    needed = [large("MemoryEstimate", h.model, 0, True, h.vae, m)[0] for m in (measurement, h.measurement())]
    assert needed[0] > 2 * needed[1]
    for name, choice in (("SamplerPSLD", {"rule": {"rule": "line search"}}), ("SamplerCPiGDM", {"weight": {"weight": "dual"}})):
        steps = {} if name == "SamplerPSLD" else {"consistency": "decoder", "inner_steps": 1, "last_steps": 1}
        assert large(name, measurement, **choice, **steps, vae=h.vae)
