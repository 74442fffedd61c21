"""The noise levels of Restore, beside those of ComfyUI's own schedulers."""

from collections.abc import Callable

import pytest
import torch
from support.host_runs import Host


@pytest.mark.parametrize("steps", [1, 5, 10])
@pytest.mark.parametrize("arch", ["sd15", "sd21v", "sd3", "zsnr"])
def test_midpoints_are_every_other_level_of_a_finer_schedule(arch: str, steps: int, hosts: Callable[..., Host]) -> None:
    """ComfyUI's "normal" has both ends and equal parts in between."""
    import comfy.samplers
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    h = hosts("sd15" if arch == "zsnr" else arch)
    with torch.inference_mode():
        model = ModelSamplingDiscrete().patch(h.model, "v_prediction", True)[0] if arch == "zsnr" else h.model
        sigmas = h.pack.nodes.host.sigmas_of(model, steps, "midpoints")
        finer = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 2 * steps + 1)
    torch.testing.assert_close(sigmas[:-1], finer[1:-1:2], rtol=1e-4, atol=0)
    assert sigmas[-1] == 0
    assert bool((sigmas.diff() < 0).all())


@pytest.mark.parametrize("arch", ["sd15", "sd21v", "sd3", "zsnr"])
def test_midpoints_begin_below_the_level_that_the_filled_photo_needs(arch: str, hosts: Callable[..., Host]) -> None:
    """A level of the k-state, which a flow's own is s / (1 - s) of; more than the model's highest is all of its time."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    h = hosts("sd15" if arch == "zsnr" else arch)
    with torch.inference_mode():
        model = ModelSamplingDiscrete().patch(h.model, "v_prediction", True)[0] if arch == "zsnr" else h.model
        levels = h.pack.nodes.host.sigmas_of
        sampling = model.get_model_object("model_sampling")
        host_level = 2.4 / 3.4 if arch == "sd3" else 2.4
        four = levels(model, 4, "midpoints", 2.4)
        # Equal parts of the model's time, the level at the top of the first of them.
        times = torch.linspace(
            float(sampling.timestep(sampling.sigma_min)), float(sampling.timestep(sampling.sigma_max)), 20001
        )
        course = torch.stack([sampling.sigma(t) for t in times])
        found = [float(times[(course - level).abs().argmin()]) for level in [host_level, *four[:-1].tolist()]]
        whole, beyond = levels(model, 4, "midpoints"), levels(model, 4, "midpoints", 1e9)
    part = (found[0] - float(times[0])) / 4
    assert found[1:] == pytest.approx([float(times[0]) + part * (i + 0.5) for i in (3, 2, 1, 0)], rel=2e-3)
    assert float(four[0]) < host_level < float(whole[0])
    assert bool((four.diff() < 0).all())
    assert torch.equal(whole, beyond)


def test_a_scheduler_that_is_not_there(hosts: Callable[..., Host]) -> None:
    h = hosts("sd15")
    with pytest.raises(ValueError, match="scheduler: 'unheard of' makes no 5 steps"):
        h.pack.nodes.host.sigmas_of(h.model, 5, "unheard of")
