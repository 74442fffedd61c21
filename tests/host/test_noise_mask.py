"""Latent noise masks: what they protect comes out as it was, by every rule."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.host_runs import Host
from torch import Tensor

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


@pytest.mark.parametrize("rule", RULES)
def test_a_mask_that_holds_nothing_is_none(rule: str, hosts: Callable[..., Host]) -> None:
    h = hosts("sd15")
    name, options = RULES[rule]
    sampler = h.sampler(getattr(h.pack.samplers, name), **options)
    masked, plain = (h.sample(sampler, noise_mask=given) for given in (torch.ones(1, 1, 64, 64), None))
    torch.testing.assert_close(masked, plain, rtol=0, atol=1e-4)


def test_differential_diffusion_frees_for_guidance_what_it_frees_in_the_end(hosts: Callable[..., Host]) -> None:
    """A graded mask: guidance may move at full length what is free in the last step, and nothing that the user has held."""
    from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion

    h = hosts("sd15")
    model, mask, seen = h.model, torch.full((1, 1, 64, 64), 0.25), []
    mask[..., :32] = 0
    latent = torch.randn(h.latent().shape, generator=torch.Generator().manual_seed(1))
    solve = h.pack.samplers.sample_cpigdm

    def look(*args: Any, extra_args: dict, **given: Any) -> Tensor:
        seen.append(extra_args["denoise_mask"])
        return solve(*args, extra_args=extra_args, **given)

    try:
        h.model = DifferentialDiffusion.execute(model, 1.0).args[0]
        sampler = h.sampler(look, network_gradient=False)
        graded = h.sample(sampler, latent=latent, noise_mask=mask, steps=4)
        h.sample(sampler, noise_mask=mask, sigmas=torch.tensor([0.0]))  # nothing to do
    finally:
        h.model = model
    assert torch.equal(seen[0], (seen[0] > 0).float())
    assert bool((seen[0][..., :4] == 0).all())
    assert bool((seen[0][..., 4:] == 1).all())
    # In its last step the model itself frees what is held: guidance does not.
    free, held = ((graded - latent)[..., side].square().mean().sqrt() for side in (slice(4, 8), slice(0, 4)))
    assert float(held) < 0.3 * float(free)


class HeldLeft:
    """A Gaussian prior on pixels, whose model holds x0 left of column `edge` as ComfyUI's does."""

    def __init__(self, held: Tensor, edge: int) -> None:
        self.held, self.mask = held, torch.ones(1, 1, *held.shape[2:])
        self.mask[..., :edge] = 0

    def __call__(self, x: Tensor, sigma: Tensor, denoise_mask: Tensor) -> Tensor:
        return denoise_mask * x / (1 + sigma[:, None, None, None] ** 2) + (1 - denoise_mask) * self.held

    def sample(self, pack: Any, solve: str, operator: Any, y: Tensor, sigma: float) -> Tensor:
        options = {"rule": "line_search", "gamma": 0.0} if solve == "sample_psld" else {}
        x = 10 * torch.randn(self.held.shape, generator=torch.Generator().manual_seed(4))
        sigmas, extra = torch.tensor([10.0, 3.0, 1.0, 0.3, 0.0]), {"denoise_mask": self.mask}
        measurement = pack.operators.Measurement(y, operator, sigma)
        return getattr(pack.samplers, solve)(self, x, sigmas, extra, measurement=measurement, **options)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("solve", ["sample_psld", "sample_cpigdm"])
@pytest.mark.parametrize("edge", [8, 6, 7])
def test_blocks_on_the_edge_are_met_by_their_free_pixels(solve: str, edge: int, pack: Any) -> None:
    held = 0.3 * noise(1, 3, 16, 16, seed=3)
    operator = pack.operators.AreaDownscale((3, 16, 16), 4)
    y = 0.3 * noise(1, 3, 4, 4, seed=2)
    result = HeldLeft(held, edge).sample(pack, solve, operator, y, 0.0)
    assert torch.equal(result[..., :edge], held[..., :edge])
    assert float((operator.A(result) - y)[..., -(-edge // 4) - (edge % 4 > 0) :].abs().max()) < 1e-4


@pytest.mark.parametrize("solve", ["sample_psld", "sample_cpigdm"])
@pytest.mark.parametrize("apart", [0.0, 1.0, 10.0])
def test_what_is_held_does_not_decide_how_near_the_rest_comes(solve: str, apart: float, pack: Any) -> None:
    """The held half may be the photo itself, or far from it."""
    sigma, operator = 0.3, pack.operators.Identity((3, 32, 32))
    y = noise(1, 3, 32, 32, seed=5)
    result = HeldLeft(y + apart * noise(1, 3, 32, 32, seed=6), 16).sample(pack, solve, operator, y, sigma)
    rms = float((result - y)[..., 16:].square().mean().sqrt())
    assert 0.9 * sigma < rms < 1.1 * sigma


@pytest.mark.parametrize("solve", ["sample_psld", "sample_cpigdm"])
def test_the_residual_told_is_that_of_the_whole_photo(solve: str, pack: Any) -> None:
    held = 0.3 * noise(1, 3, 16, 16, seed=3)
    operator, y, told = pack.operators.AreaDownscale((3, 16, 16), 4), 0.3 * noise(1, 3, 4, 4, seed=2), []
    model = HeldLeft(held, 8)
    options = {"rule": "line_search", "gamma": 0.0} if solve == "sample_psld" else {}
    codec = SimpleNamespace(decode=lambda z: z, encode=lambda image: image)
    measurement = pack.operators.Measurement(y, operator, 0.1)
    getattr(pack.samplers, solve)(
        model, 3 * noise(1, 3, 16, 16, seed=1), torch.tensor([3.0, 1.0, 0.0]), {"denoise_mask": model.mask}, told.append,
        measurement=measurement, autoencoder=codec, **options
    )  # fmt: skip
    for step in told:
        torch.testing.assert_close(step["residual"], measurement.residual_norm(step["denoised"]))
