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


def test_a_scheduler_that_is_not_there(hosts: Callable[..., Host]) -> None:
    h = hosts("sd15")
    with pytest.raises(ValueError, match="scheduler: 'unheard of' makes no 5 steps"):
        h.pack.nodes.host.sigmas_of(h.model, 5, "unheard of")
