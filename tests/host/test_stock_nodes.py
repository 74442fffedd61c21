"""Our SAMPLERs in graphs of stock nodes: what these keep of a run, and that a whole one lands where it must."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.host_runs import Host
from support.host_versions import nodes_custom_sampler
from support.tiny_checkpoints import conditioning

# Stock nodes around it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [True, False])
def test_sampler_custom_and_its_advanced_form_agree(noise: bool, hosts: Callable[..., Host]) -> None:
    """The one with a guider and a noise node, the other without; both with noise and without, from a latent."""
    extras, h = nodes_custom_sampler(), hosts("sd15")
    sampler, sigmas = h.sampler(h.pack.samplers.sample_psld), torch.tensor([2.0, 0.5, 0.0])
    latent = {"samples": torch.randn(h.latent().shape, generator=torch.Generator().manual_seed(1))}
    positive, negative = (conditioning("sd15", seed) for seed in (1, 2))
    with torch.inference_mode():
        plain = extras.SamplerCustom().sample(h.model, noise, 7, 3.0, positive, negative, sampler, sigmas, latent)
        source = extras.Noise_RandomNoise(7) if noise else extras.Noise_EmptyNoise()
        advanced = extras.SamplerCustomAdvanced().sample(source, h.guider(), sampler, sigmas, latent)
    found, other = (out[0]["samples"] for out in (plain, advanced))
    assert torch.equal(found, other)
    assert float((found - latent["samples"]).abs().mean()) > 0.01


@pytest.mark.parametrize("solve", ["sample_psld", "sample_cpigdm"])
def test_denoised_output_is_the_result(solve: str, hosts: Callable[..., Host]) -> None:
    """With the last correction, which comes after the network's own estimate."""
    extras, h, steps = nodes_custom_sampler(), hosts("sd15"), []
    options = {"rule": "line_search", "gamma": 0.0} if solve == "sample_psld" else {}
    sampler = h.sampler(getattr(h.pack.samplers, solve), **options)
    sigmas, latent = torch.tensor([2.0, 0.5, 0.0]), {"samples": h.latent()}
    with torch.inference_mode():
        output, denoised = extras.SamplerCustomAdvanced().sample(
            extras.Noise_RandomNoise(7), h.guider(), sampler, sigmas, latent
        )
    torch.testing.assert_close(denoised["samples"], output["samples"], rtol=0, atol=1e-5)
    h.sample(sampler, sigmas=sigmas, callback=lambda step, denoised, x, total: steps.append(step))
    assert steps == [0, 1]


def test_rising_noise_levels_are_refused_as_the_user_gave_them(hosts: Callable[..., Host]) -> None:
    h = hosts("sd3")
    with pytest.raises(ValueError, match=r"sigmas: got \[0.1, 0.5, 0.9\], expected noise levels that fall"):
        h.sample(h.sampler(h.pack.samplers.sample_psld), sigmas=torch.tensor([0.1, 0.5, 0.9]))


# PSLD through the host --------------------------------------------------------------------------------------------------


def test_lands_on_the_photo_where_the_photo_fixes_everything(
    pack: ModuleType, tiny: Callable[..., Path], load: Callable
) -> None:
    """v = 0 is the exact denoiser of N(0, I), the box codec is linear, and A sees all that it can show: x must be y."""
    import comfyui_posterior.nodes
    import comfyui_posterior.samplers  # noqa: F401

    model, _, vae = load(tiny("sd21v", zero_out=True, vae="box"))
    h = Host(pack, "sd21v", model, vae)
    operator = pack.operators.AreaDownscale((3, 64, 64), 8)
    target = torch.tensor([0.5, -0.5, 0.1]).reshape(1, 3, 1, 1).expand(1, 3, 8, 8).contiguous()
    measurement = pack.operators.Measurement(target, operator)
    errors = []
    for omega, steps in ((0.0, 10), (0.3, 100)):
        sampler = h.pack.nodes.host.stock_sampler(pack.samplers.sample_psld, measurement, vae, omega=omega, gamma=0.1)
        latent = h.sample(sampler, steps=steps, guider=h.guider(cfg=1.0))
        with torch.inference_mode():
            image = vae.decode(latent).movedim(-1, 1).double() * 2 - 1
            errors.append(float(measurement.to(torch.float64).residual_norm(image)) / target.numel() ** 0.5)
    assert errors[0] > 0.3  # without guidance it is a draw from the prior
    assert errors[1] < 0.03
