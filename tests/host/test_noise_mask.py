"""Latent noise masks: what they protect comes out as it was, by every rule."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.host_runs import Host

RULES = {
    "paper": ("sample_psld", {"gamma": 0.1}),
    "line search": ("sample_psld", {"rule": "line_search", "gamma": 0.0}),
    "decoder": ("sample_cpigdm", {"network_gradient": False}),
    "encoder": ("sample_cpigdm", {"network_gradient": False, "consistency": "encoder"}),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("arch", ["sd15", "sd3"])
def test_what_a_mask_protects_stays(arch: str, rule: str, hosts: Callable[..., Host]) -> None:
    h = hosts(arch)
    name, options = RULES[rule]
    latent = torch.randn(h.latent().shape, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 1, 64, 64)
    mask[..., :32] = 0
    sampler = h.sampler(getattr(h.pack.samplers, name), **options)
    result, plain = (h.sample(sampler, latent=latent, noise_mask=given) for given in (mask, None))
    torch.testing.assert_close(result[..., :4], latent[..., :4], rtol=0, atol=1e-5)  # ComfyUI scales latents forth and back
    assert float((result - latent)[..., 4:].abs().max()) > 0.1
    assert float((plain - latent)[..., :4].abs().max()) > 0.1


@pytest.mark.parametrize("solve", ["sample_psld", "sample_cpigdm"])
@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_on_pixels(solve: str, sigma: float, pack: Any) -> None:
    """A Gaussian prior, whose model holds x0 in the left half as ComfyUI's does."""
    operator = pack.operators.AreaDownscale((3, 16, 16), 4)
    y = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(2)) - 0.5
    held = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(1, 1, 16, 16)
    mask[..., :8] = 0

    def model(x: torch.Tensor, sigma: torch.Tensor, denoise_mask: torch.Tensor) -> torch.Tensor:
        return denoise_mask * x / (1 + sigma[:, None, None, None] ** 2) + (1 - denoise_mask) * held

    options = {"rule": "line_search", "gamma": 0.0} if solve == "sample_psld" else {}
    x = 10 * torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    measurement = pack.operators.Measurement(y, operator, sigma)
    sigmas = torch.tensor([10.0, 3.0, 1.0, 0.3, 0.0])
    extra = {"denoise_mask": mask}
    result = getattr(pack.samplers, solve)(model, x, sigmas, extra, measurement=measurement, **options)
    assert torch.equal(result[..., :8], held[..., :8])
    residual = (operator.A(result) - y)[..., 2:]
    assert float(residual.square().mean().sqrt()) < max(2 * sigma, 1e-3)  # the free half agrees
