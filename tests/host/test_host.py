"""nodes/host, room by room, in the real ComfyUI."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support.host_runs import Host, Probe
from support.host_versions import needs
from support.tiny_checkpoints import conditioning
from torch import Tensor

ARCHS = ["sd15", "sd21v", "sd3"]
UNKNOWN = ["IMG_TO_IMG", "IMG_TO_IMG_FLOW", "FLOW_COSMOS", "V_PREDICTION_DDPM"]


def stand_still(model: Any, x: Tensor, sigmas: Tensor, **_: Any) -> Tensor:
    return x


# Leaving inference mode -------------------------------------------------------------------------------------------------


def test_weights_become_normal_without_a_copy(host: ModuleType, tiny: Callable[..., Path], load: Callable) -> None:
    model, _, vae = load(tiny("sd15"))
    for network in (model.model, vae.first_stage_model):
        before = {name: (p.data_ptr(), p.sum().item()) for name, p in network.named_parameters()}
        buffers = {name: b.data_ptr() for name, b in network.named_buffers()}
        with torch.inference_mode(False):
            assert host.normal_weights(network) == len(before) + len(buffers)
            assert host.normal_weights(network) == 0
        after = dict(network.named_parameters())
        assert {name: (p.data_ptr(), p.sum().item()) for name, p in after.items()} == before
        assert {name: b.data_ptr() for name, b in network.named_buffers()} == buffers
        assert not any(p.is_inference() or p.requires_grad for p in after.values())


def test_quantised_weights_are_refused(host: ModuleType) -> None:
    from comfy.quant_ops import QuantizedTensor

    layer = torch.nn.Linear(32, 32)
    weight = QuantizedTensor.from_float(torch.randn(32, 32), "TensorCoreFP8E4M3Layout")
    layer._parameters["weight"] = torch.nn.Parameter(weight, requires_grad=False)
    with torch.inference_mode(False), pytest.raises(ValueError, match=r"quantised .* at weight"):
        host.normal_weights(layer)


def test_normal_tensors_rebuilds_conditionings(host: ModuleType) -> None:
    import comfy.conds

    with torch.inference_mode():
        tensor = torch.ones(2)
        tree = {"a": [tensor, (tensor, 1)], "c": comfy.conds.CONDRegular(tensor), "s": "text"}
    with torch.inference_mode(False):
        clean = host.normal_tensors(tree)
    assert not any(t.is_inference() for t in (clean["a"][0], clean["a"][1][0], clean["c"].cond))
    assert clean["s"] == "text"
    assert tensor.is_inference()
    assert tree["a"][0] is tensor  # the original, which other nodes hold, is as it was


def test_training_switch_is_put_back(host: ModuleType) -> None:
    import comfy.model_management as mm

    with torch.inference_mode(), host.gradients():
        assert mm.in_training
        assert torch.ones(1, requires_grad=True).mul(2).requires_grad
    assert not mm.in_training


def test_options_are_a_copy(host: ModuleType) -> None:
    options = {"transformer_options": {"patches": {"input_block_patch_after_skip": ["theirs"]}}}
    ours = host.differentiable_options(options, has_control=True)
    assert "optimized_attention_override" in ours["transformer_options"]
    assert ours["transformer_options"]["patches"]["input_block_patch_after_skip"][1:] == ["theirs"]
    assert options == {"transformer_options": {"patches": {"input_block_patch_after_skip": ["theirs"]}}}


def test_model_and_vae_are_loaded_whole_and_side_by_side(hosts: Callable[..., Host], monkeypatch: pytest.MonkeyPatch) -> None:
    """Part of a model on the CPU would be cast at each step, and a gradient would keep every cast copy."""
    import comfy.model_management as mm

    loads: list[tuple[list[Any], bool]] = []
    load_models = mm.load_models_gpu

    def spy(models: list[Any], *args: Any, force_full_load: bool = False, **options: Any) -> Any:
        loads.append((list(models), force_full_load))
        return load_models(models, *args, force_full_load=force_full_load, **options)

    monkeypatch.setattr(mm, "load_models_gpu", spy)
    h = hosts("sd15")
    h.sample(h.sampler(stand_still), sigmas=torch.tensor([2.0, 1.0]))
    assert any({h.model, h.vae.patcher} <= set(models) and whole for models, whole in loads)


# The state --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_no_guidance_is_stock_ddim(arch: str, hosts: Callable[..., Host]) -> None:
    """With both weights 0 PSLD is DDIM in the k-state, which is the stock euler sampler in every family's own state."""
    import comfy.samplers

    h = hosts(arch)
    ours = h.sample(h.sampler(h.pack.samplers.sample_psld, omega=0.0, gamma=0.0), steps=4)
    stock = h.sample(comfy.samplers.sampler_object("euler"), steps=4)
    # Another attention kernel, and for sd3 a start at s = 1 - 1e-6: not bit-equal, but the same trajectory.
    torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-3)


def test_flow_state_round_trip(hosts: Callable[..., Host]) -> None:
    state, s = hosts("sd15").pack.samplers.State(flow=True), torch.tensor([0.9, 0.5, 0.01, 0.0])
    sigma = state.sigmas_to_k(s)
    torch.testing.assert_close(sigma, s / (1 - s))
    torch.testing.assert_close(state.sigma_from_k(sigma), s)
    x0, eps = torch.randn(4, 1, 2, 2), torch.randn(4, 1, 2, 2)
    wide = (-1, 1, 1, 1)
    x_s = (1 - s.reshape(wide)) * x0 + s.reshape(wide) * eps
    x = state.to_k(x_s, sigma.reshape(wide))
    torch.testing.assert_close(x, x0 + sigma.reshape(wide) * eps)
    torch.testing.assert_close(state.from_k(x, sigma.reshape(wide)), x_s)
    assert state.sigmas_to_k(torch.tensor([1.0])).isfinite()


def test_unknown_parametrisations_are_refused_by_name(host: ModuleType) -> None:
    import comfy.model_base
    from comfy.model_base import ModelType

    config = SimpleNamespace(sampling_settings={})
    known = {ModelType.EPS: False, ModelType.V_PREDICTION: False, ModelType.EDM: False, ModelType.FLOW: True}
    for kind, flow in known.items():
        assert host.state_of(comfy.model_base.model_sampling(config, kind)).flow is flow
    unknown = [name for name in UNKNOWN if hasattr(ModelType, name)]
    assert len(unknown) >= 3
    for name in unknown:
        sampling = comfy.model_base.model_sampling(config, ModelType[name])
        with pytest.raises(ValueError, match=r"parametrisation .*(IMG_TO_IMG|COSMOS|DDPM)"):
            host.state_of(sampling)


# Refusals ---------------------------------------------------------------------------------------------------------------


def test_different_hooks_are_refused(hosts: Callable[..., Host], host: ModuleType) -> None:
    import comfy.hooks

    h = hosts("sd15")
    group = comfy.hooks.create_hook_lora(lora={}, strength_model=1.0, strength_clip=1.0)
    hooked = [[c, {**d, "hooks": group}] for c, d in conditioning("sd15", 1)]
    with pytest.raises(ValueError, match="different hooks"):
        h.sample(h.sampler(stand_still), guider=h.guider(positive=hooked))


def test_several_gpus_are_refused(hosts: Callable[..., Host]) -> None:
    """As the MultiGPU node sets it up, with a second CPU for want of a second GPU."""
    h = hosts("sd15")
    needs(hasattr(h.model, "is_multigpu_base_clone"), "multi-GPU node")
    model, other = h.model.clone(), h.model.clone()
    other.load_device, other.is_multigpu_base_clone = torch.device("cpu:1"), True
    model.set_additional_models("multigpu", [other])
    refused(Host(h.pack, "sd15", model, h.vae), "split over several GPUs")


def test_context_windows_are_refused(hosts: Callable[..., Host]) -> None:
    from comfy.context_windows import (
        ContextSchedules,
        IndexListContextHandler,
        get_matching_context_schedule,
        get_matching_fuse_method,
    )

    h = hosts("sd15")
    model = h.model.clone()
    model.model_options["context_handler"] = IndexListContextHandler(
        get_matching_context_schedule(ContextSchedules.STATIC_STANDARD), get_matching_fuse_method("flat"), 16, 4
    )
    refused(Host(h.pack, "sd15", model, h.vae), "context windows are active")


@pytest.mark.parametrize("kind", UNKNOWN)
def test_unknown_parametrisation_is_refused_before_the_first_step(kind: str, hosts: Callable[..., Host]) -> None:
    import comfy.model_base

    needs(hasattr(comfy.model_base.ModelType, kind), kind)
    h = hosts("sd15")
    model = h.model.clone()
    config = SimpleNamespace(sampling_settings={})
    model.add_object_patch("model_sampling", comfy.model_base.model_sampling(config, comfy.model_base.ModelType[kind]))
    refused(Host(h.pack, "sd15", model, h.vae), r"parametrisation .*(IMG_TO_IMG|COSMOS|DDPM).* is not supported")


def refused(h: Host, words: str, **run: Any) -> None:
    """Through the real guider, before the model is called once."""
    calls = []
    model = h.model.clone()
    model.set_model_unet_function_wrapper(
        lambda apply, given: calls.append(given) or apply(given["input"], given["timestep"], **given["c"])
    )
    guider = Host(h.pack, h.arch, model, h.vae).guider()
    probe = Probe(lambda *_, **__: True)
    with pytest.raises(ValueError, match=words):
        h.sample(h.sampler(probe), guider=guider, sigmas=torch.tensor([2.0, 1.0]), **run)
    assert probe.seen is None
    assert calls == []


@pytest.mark.parametrize("node", ["EasyCacheNode", "LazyCacheNode"])
def test_nodes_that_skip_network_calls_are_refused(node: str, hosts: Callable[..., Host]) -> None:
    import comfy_extras.nodes_easycache as caches

    h = hosts("sd15")
    with torch.inference_mode():
        model = getattr(caches, node).execute(h.model, 0.2, 0.15, 0.95, False)[0]
    with pytest.raises(ValueError, match="EasyCache or LazyCache"):
        h.sample(h.sampler(stand_still), guider=Host(h.pack, "sd15", model, h.vae).guider())


def test_video_latent_is_refused(hosts: Callable[..., Host]) -> None:
    refused(hosts("sd15"), r"latent_image: has 5 dimensions \(1, 4, 2, 8, 8\)", latent=torch.zeros(1, 4, 2, 8, 8))


@pytest.mark.parametrize(("arch", "multiple"), [("sd15", 8), ("sdxl_vega", 8), ("sd3", 16)])
def test_sides_fit_the_patches_of_transformers(arch: str, multiple: int, hosts: Callable[..., Host]) -> None:
    """ComfyUI fills a patch that reaches over the bottom with the top row."""
    h = hosts(arch)
    assert h.pack.nodes.host.side_multiple(h.vae, h.model) == multiple


def test_vae_refusals(hosts: Callable[..., Host], host: ModuleType, tiny: Callable[..., Path], load: Callable) -> None:
    import comfy.sd

    h, other = hosts("sd15"), hosts("sd3")
    assert host.latent_size(h.vae, (3, 64, 128)) == (4, 8, 16)
    with pytest.raises(ValueError, match=r"130 x 97.*multiples of 8"):
        host.latent_size(h.vae, (3, 97, 130))
    with pytest.raises(ValueError, match="no VAE in it"):
        host.check_vae(load(tiny("sd15", vae=None))[2])
    with pytest.raises(ValueError, match="16 channels, the model's have 4"):
        host.check_vae(other.vae, h.model.model.latent_format)
    with torch.inference_mode():
        video = comfy.sd.VAE(sd={"decoder.22.bias": torch.zeros(3), "decoder.1.weight": torch.zeros(256, 16, 3, 3)})
    with pytest.raises(ValueError, match="video or audio"):
        host.check_vae(video)


def test_sizes_are_checked_before_the_first_step(hosts: Callable[..., Host], host: ModuleType) -> None:
    h = hosts("sd15")
    with pytest.raises(ValueError, match=r"latent_image: got \(4, 16, 8\).*\(4, 8, 8\)"):
        h.sample(h.sampler(stand_still), latent=torch.zeros(1, 4, 16, 8))
    sampler = host.stock_sampler(stand_still, h.measurement(batch=2), h.vae)
    with pytest.raises(ValueError, match="batch of 3 for a measurement of 2"):
        h.sample(sampler, latent=h.latent(3))
    with pytest.raises(ValueError, match=r"vae: is not connected .* which a model without a VAE works on"):
        h.sample(host.stock_sampler(stand_still, h.measurement(), None))


def test_model_that_loses_the_gradient_is_refused(hosts: Callable[..., Host], host: ModuleType) -> None:
    h = hosts("sd15")
    with torch.inference_mode():
        model = h.model.clone()
        model.set_model_unet_function_wrapper(
            lambda apply, given: apply(given["input"].detach(), given["timestep"], **given["c"])
        )
        model.set_model_sampler_post_cfg_function(lambda given: given["denoised"].detach())
    probe = Probe(lambda model, x, **_: model(x.requires_grad_()))
    with pytest.raises(ValueError, match="no gradient"):
        h.sample(h.sampler(probe), guider=Host(h.pack, "sd15", model, h.vae).guider())


def test_nan_from_the_model_names_the_noise_level(hosts: Callable[..., Host]) -> None:
    h = hosts("sd15")
    with torch.inference_mode():
        model = h.model.clone()
        model.set_model_sampler_post_cfg_function(lambda given: given["denoised"] * float("nan"))
    probe = Probe(lambda model, x, **_: model(x))
    with pytest.raises(RuntimeError, match="step 1 of 1, sigma 2: the model returned NaN or infinite values"):
        h.sample(h.sampler(probe), guider=Host(h.pack, "sd15", model, h.vae).guider(), sigmas=torch.tensor([2.0, 1.0]))


def test_masks_of_attention_may_hold_minus_infinity(hosts: Callable[..., Host]) -> None:
    """StyleModelApply makes them so."""
    import comfy.conds

    h = hosts("sd15")
    guider, mask = h.guider(), torch.tensor([1.0, 0.0]).log()
    guider.inner_model = h.model.model
    guider.conds = {"positive": [{"model_conds": {"attention_mask": comfy.conds.CONDRegular(mask)}}]}
    h.pack.nodes.host.refusals.check_prompts(guider)
    guider.conds["positive"][0]["model_conds"]["attention_mask"].cond[0] = torch.nan
    with pytest.raises(ValueError, match="positive: has NaN values"):
        h.pack.nodes.host.refusals.check_prompts(guider)


# Models in memory -------------------------------------------------------------------------------------------------------


def test_a_loader_that_cannot_reload_is_named(host: ModuleType) -> None:
    class Paged:
        def is_dynamic(self) -> bool:
            return True

        def get_non_dynamic_delegate(self) -> None:
            raise RuntimeError("cached_patcher_init is not initialized.")

    with pytest.raises(ValueError, match=r"vae: is under dynamic VRAM.*--disable-dynamic-vram"):
        host.static_patcher(Paged(), "vae")


def test_nothing_of_the_model_changes(hosts: Callable[..., Host]) -> None:
    """Weights, attributes of patched modules, and a stock picture are bit-identical after a run of ours."""
    import comfy.samplers

    h = hosts("sd15")
    euler = comfy.samplers.sampler_object("euler")
    before = h.sample(euler)
    weights = {name: p.detach().clone() for name, p in h.model.model.named_parameters()}
    options = repr(h.model.model_options)
    h.sample(h.sampler(h.pack.samplers.sample_psld), steps=2)
    assert repr(h.model.model_options) == options
    assert all(torch.equal(p, weights[name]) for name, p in h.model.model.named_parameters())
    assert torch.equal(h.sample(euler), before)


def test_latent_that_comes_back_is_detached(hosts: Callable[..., Host]) -> None:
    h = hosts("sd15")
    result = h.sample(h.sampler(h.pack.samplers.sample_psld), steps=2)
    assert not result.requires_grad
    assert result.isfinite().all()


def test_interrupt_stops_within_a_step(hosts: Callable[..., Host]) -> None:
    import comfy.model_management as mm

    h, steps = hosts("sd15"), []

    def callback(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
        steps.append((step, total))
        assert not denoised.requires_grad
        if step == 1:
            mm.interrupt_current_processing()

    with pytest.raises(mm.InterruptProcessingException):
        h.sample(h.sampler(h.pack.samplers.sample_psld), steps=5, callback=callback)
    assert steps == [(0, 5), (1, 5)]
    assert h.sample(h.sampler(h.pack.samplers.sample_psld), steps=2).isfinite().all()  # and the next run is fine
