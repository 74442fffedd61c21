"""Models whose weights the host pages: a run works on twins that stay, with the same result, and the user's own are untouched."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.host_runs import Host, Probe, directional_derivatives, own_forwards, paged, psld, pull_back
from support.host_versions import needs, nodes_custom_sampler
from support.tiny_checkpoints import conditioning, write_controlnet
from torch import Tensor


@pytest.mark.parametrize("mode", ["fastest", "lowest"])
def test_paged_model_and_vae_are_swapped_for_twins(
    mode: str, hosts: Callable[..., Host], tiny: Callable[..., Path], load: Callable
) -> None:
    reference = hosts("sd15")
    expected = reference.sample(psld(reference, mode), steps=2)
    model, _, vae = load(tiny("sd15"))
    paged(model)
    paged(vae.patcher)
    h = Host(reference.pack, "sd15", model, vae)
    guider, seen = h.guider(), []

    def look(*args: Any, autoencoder: Any, **given: Any) -> Tensor:
        seen.append((guider.model_patcher, autoencoder.network))
        return h.pack.samplers.sample_psld(*args, autoencoder=autoencoder, **given)

    result = h.sample(h.sampler(look, memory=mode), guider=guider, steps=2)
    patcher, network = seen[0]
    assert patcher is not model
    assert not patcher.is_dynamic()
    assert network is not vae.first_stage_model
    assert guider.model_patcher is model
    assert all(p.is_inference() for p in vae.first_stage_model.parameters())  # the paged one was not touched
    assert own_forwards(patcher.model, network) == []
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_paged_second_model_is_swapped_for_a_twin(
    hosts: Callable[..., Host], tiny: Callable[..., Path], load: Callable
) -> None:
    extras = nodes_custom_sampler()
    needs(hasattr(extras, "Guider_DualModel"), "Guider_DualModel")
    h = hosts("sd15")
    results = []
    for wrap in (lambda patcher: patcher, paged):
        other = wrap(load(tiny("sd15", seed=1, vae=None))[0])
        guider = extras.Guider_DualModel(h.model, other)
        guider.set_conds(conditioning("sd15", 1), conditioning("sd15", 2))
        guider.set_cfg(3.0)
        results.append(h.sample(psld(h), guider=guider, steps=2))
        assert guider.uncond_model_patcher is other
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["fastest", "lowest"])
def test_paged_controlnet_is_copied(mode: str, hosts: Callable[..., Host], tmp_path: Path) -> None:
    """Two in a chain, the first of which pages: the gradient is right, and the user's own ControlNet is as it was."""
    import comfy.controlnet

    needs(hasattr(comfy.controlnet.ControlBase, "deepclone_multigpu"), "copies of ControlNets")
    h = hosts("sd15")
    with torch.inference_mode():
        net, plain = (
            comfy.controlnet.load_controlnet(str(write_controlnet(tmp_path / f"{seed}.safetensors", seed=seed)))
            for seed in (0, 1)
        )
        paged(net.control_model_wrapped)
        hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
        first = net.copy().set_cond_hint(hint, 1.0, (0.0, 1.0))
        control = plain.copy().set_cond_hint(hint, 0.5, (0.0, 1.0)).set_previous_controlnet(first)
        conds = [[c, {**d, "control": control, "control_apply_to_uncond": True}] for c, d in conditioning("sd15", 1)]
    seen = []

    def look(model: Any, x: Tensor, **_: Any) -> tuple:
        seen.extend(cond["control"] for cond in guider.conds["positive"])
        return directional_derivatives(model, x), pull_back(model, x)[1]

    guider, probe = h.guider(positive=conds), Probe(look)
    h.sample(h.sampler(probe, memory=mode), guider=guider, sigmas=torch.tensor([2.0, 1.0]))
    (differences, products, size), gradient = probe.seen
    for difference, product in zip(differences, products, strict=True):
        assert abs(difference - product) <= 0.01 * size
    assert seen[0] is not control
    assert not any(patcher.is_dynamic() for patcher in seen[0].get_models())
    assert len(seen[0].get_models()) == 2
    assert control.previous_controlnet is first
    assert all(p.is_inference() for p in net.control_model.parameters())
    assert own_forwards(plain.control_model, net.control_model) == []

    net.control_model_wrapped.__class__ = type(plain.control_model_wrapped)  # no longer paged: the same, without a copy
    probe = Probe(lambda model, x, **_: pull_back(model, x)[1])
    h.sample(h.sampler(probe, memory=mode), guider=h.guider(positive=conds), sigmas=torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(probe.seen, gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))
