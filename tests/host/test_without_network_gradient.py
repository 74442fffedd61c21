"""C-PiGDM differentiates through the VAE's decoder only: what the diffusion network cannot differentiate does not matter to it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.host_runs import Host, Probe, Scarce, layer_of, paged
from support.host_versions import needs
from support.tiny_checkpoints import conditioning
from torch import Tensor


def cpigdm(h: Host, memory: str = "auto", lighter: dict[str, str] | None = None, **options: Any) -> Any:
    given = {"network_gradient": False, "lighter": lighter, "consistency": "decoder", **options}
    return h.pack.nodes.host.stock_sampler(h.pack.samplers.sample_cpigdm, h.measurement(), h.vae, memory, **given)


def test_a_network_without_a_gradient_will_do(hosts: Callable[..., Host]) -> None:
    h = hosts("sd15")
    expected = h.sample(cpigdm(h))
    model, h.model = h.model, h.model.clone()
    try:
        h.model.set_model_unet_function_wrapper(
            lambda apply, given: apply(given["input"], given["timestep"], **given["c"]).detach()
        )
        assert torch.equal(h.sample(cpigdm(h, check_gradients=True)), expected)
        with pytest.raises(ValueError, match="has no gradient"):
            h.sample(h.sampler(h.pack.samplers.sample_psld))
    finally:
        h.model = model


def test_quantised_weights_will_do(hosts: Callable[..., Host], caplog: pytest.LogCaptureFixture) -> None:
    import comfy.model_management as mm
    from comfy.quant_ops import QuantizedTensor

    # 0.18.2 alone lists a model's weights before it loads them, which the comfy-kitchen of the newest host does not bear.
    needs(not hasattr(mm, "module_mmap_residency"), "quantised weights together with the newest comfy-kitchen")
    h = hosts("sd15")
    layer = h.model.model.diffusion_model.time_embed[0]
    weight = layer._parameters["weight"]
    with torch.inference_mode():  # as the host loads it
        quantised = QuantizedTensor.from_float(weight.detach().clone(), "TensorCoreFP8E4M3Layout")
    try:
        layer._parameters["weight"] = torch.nn.Parameter(quantised.dequantize().to(weight), requires_grad=False)
        expected = h.sample(cpigdm(h))
        layer._parameters["weight"] = torch.nn.Parameter(quantised, requires_grad=False)
        # As the host's own mixed-precision layers do, of which a tiny checkpoint has none.
        layer.forward = lambda x: torch.nn.functional.linear(x, layer.weight.dequantize().to(x), layer.bias.to(x))
        assert torch.equal(h.sample(cpigdm(h)), expected)
        assert "memory auto" not in caplog.text  # the estimate copes
        with pytest.raises(ValueError, match="quantised"):
            h.sample(h.sampler(h.pack.samplers.sample_psld))
    finally:
        layer._parameters["weight"] = weight
        vars(layer).pop("forward", None)


def test_the_estimate_leaves_the_network_out(hosts: Callable[..., Host]) -> None:
    h = hosts("sd15")
    shape = tuple(h.latent().shape)
    estimates = [h.pack.nodes.host.estimate(h.model.model, h.vae, shape, network_gradient=g) for g in (True, False)]
    (decoder,) = estimates[1].stages
    assert decoder == estimates[0].stages[1]
    network = estimates[0].stages[0]
    assert 0 < estimates[1].forward <= min(h.model.model.memory_required((2, *shape[1:])), network.saved + 2 * network.largest)
    for mode in h.pack.nodes.host.MODES:
        assert estimates[1].activations(mode) == max(
            estimates[1].forward, h.pack.nodes.host.memory.Estimate(0, (decoder,)).activations(mode)
        )


def test_its_networks_are_called_as_the_host_calls_them(hosts: Callable[..., Host]) -> None:
    h = hosts("sd15")
    blocks = h.pack.nodes.host.recompute.blocks(h.model.model.diffusion_model)

    def look(*_: Any, **__: Any) -> int:
        return sum("forward" in vars(block) for block in blocks)

    seen = []
    for network_gradient in (True, False):
        probe = Probe(look)
        h.sample(h.sampler(probe, memory="lowest", network_gradient=network_gradient), steps=1)
        seen.append(probe.seen)
    assert seen == [len(blocks), 0]


def test_out_of_memory_falls_to_the_encoder_and_says_so(hosts: Callable[..., Host], caplog: pytest.LogCaptureFixture) -> None:
    h = hosts("sd15")
    lighter = {"consistency": "encoder"}
    expected = h.sample(cpigdm(h, **lighter))
    with Scarce(layer_of(h, "decode"), {1, 2, 3}):
        result = h.sample(cpigdm(h, "fastest", lighter))
    assert torch.equal(result, expected)
    said = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert said[-1] == (
        "out of memory in mode lowest; started again with consistency encoder, which follows the photo less closely"
    )
    with Scarce(layer_of(h, "decode"), {1, 2, 3}), pytest.raises(torch.cuda.OutOfMemoryError, match="even in mode lowest"):
        h.sample(cpigdm(h, "fastest"))
    with Scarce(layer_of(h, "decode"), {1}), pytest.raises(torch.cuda.OutOfMemoryError, match="even in mode lowest"):
        h.sample(cpigdm(h, "lowest", lighter, **lighter))  # it is what runs already


def test_asked_for_the_encoder_it_takes_no_gradient_at_all(hosts: Callable[..., Host]) -> None:
    """Neither the check nor the estimate counts on the decoder's."""
    h, notes = hosts("sd15"), []
    expected = h.sample(cpigdm(h, consistency="encoder"))
    result = h.sample(cpigdm(h, consistency="encoder", check_gradients=True, notes=notes))
    assert torch.equal(result, expected)
    assert any("takes no gradient" in note for note in notes)
    shape = tuple(h.latent().shape)
    by_encoder, by_decoder = (
        h.pack.nodes.host.estimate(h.model.model, h.vae, shape, network_gradient=False, decoder_gradient=g)
        for g in (False, True)
    )
    assert by_encoder.stages == ()
    assert by_encoder.weights == by_decoder.weights
    assert by_encoder.activations("fastest") >= h.vae.memory_used_decode(shape, h.vae.vae_dtype)


def test_the_next_photo_begins_with_the_encoder_where_one_fell_back_to_it(
    hosts: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    h = hosts("sd15")
    plugin, restore = h.pack.nodes.host.plugin, h.pack.nodes.restore
    recomputing, modes = plugin.recomputing, []
    monkeypatch.setattr(plugin, "recomputing", lambda mode, *given: modes.append(mode) or recomputing(mode, *given))
    monkeypatch.setattr(plugin, "free_memory", lambda _: 2**40)
    monkeypatch.setitem(restore.CALLS["C-PiGDM"], "fast", 1)
    given = (h.model, h.vae, conditioning("sd15", 1), h.measurement(3), "C-PiGDM", "fast", 0, 1.0)
    decoder = h.vae.first_stage_model.taesd_decoder[-1]

    def fails(_: torch.nn.Module, __: object, output: Tensor) -> None:
        if output.requires_grad:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    handle = decoder.register_forward_hook(fails)
    try:
        with torch.inference_mode():
            said = str(restore.Restore.execute(*given).ui)
    finally:
        handle.remove()
    assert modes == ["fastest", "balanced", "lowest", "lowest", "lowest", "lowest"]  # and once for each of the next two photos
    assert "with consistency encoder, which follows the photo less closely, as for the photo before" in said


def test_a_network_that_the_host_pages_runs_as_under_any_sampler(
    hosts: Callable[..., Host], tiny: Callable[..., Path], load: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the VAE, which has a gradient, is loaded whole and as a twin."""
    import comfy.model_management as mm

    reference = hosts("sd15")
    expected = reference.sample(cpigdm(reference))
    model, _, vae = load(tiny("sd15"))
    paged(model)
    paged(vae.patcher)
    h = Host(reference.pack, "sd15", model, vae)
    load_models_gpu, whole, states = mm.load_models_gpu, [], []

    def loads(models: list, *args: Any, force_full_load: bool = False, **given: Any) -> None:
        whole.extend(type(patcher.model) for patcher in models if force_full_load)
        return load_models_gpu(models, *args, force_full_load=force_full_load, **given)

    monkeypatch.setattr(mm, "load_models_gpu", loads)
    network = model.model.diffusion_model
    handle = network.register_forward_pre_hook(
        lambda *_: states.append((getattr(mm, "in_training", False), torch.is_inference_mode_enabled()))
    )
    guider = h.guider()
    try:
        result = h.sample(cpigdm(h), guider=guider)
    finally:
        handle.remove()
    assert torch.equal(result, expected)
    assert guider.model_patcher is model
    assert set(whole) == {type(vae.first_stage_model)}
    assert set(states) == {(False, True)}  # the paged network itself, as in a prompt without us


@pytest.mark.parametrize("estimated", [True, False])
def test_where_memory_is_short_the_vae_stays_whole(
    estimated: bool, tiny: Callable[..., Path], load: Callable, hosts: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device whose free memory is told to the host: room for both and the lowest mode, but not for the quickest."""
    import comfy.model_management as mm

    model, _, vae = load(tiny("sd15"))
    h = Host(hosts("sd15").pack, "sd15", model, vae)
    sizes = model.model_size() + vae.patcher.model_size()
    monkeypatch.setattr(mm, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(mm, "MIN_WEIGHT_MEMORY_RATIO", 0)
    monkeypatch.setattr(mm, "vram_state", mm.VRAMState.NORMAL_VRAM)
    room = 2 * mm.minimum_inference_memory() + 2 * sizes

    def free(device: Any = None, torch_free_too: bool = False) -> Any:
        left = room - sum(loaded.model_loaded_memory() for loaded in mm.current_loaded_models)
        return (left, 0) if torch_free_too else left

    monkeypatch.setattr(mm, "get_free_memory", free)
    monkeypatch.setattr(h.pack.nodes.host.plugin, "free_memory", free)
    need = h.pack.nodes.host.memory.Estimate(0, (), int(10 * room))  # far more than there is
    monkeypatch.setattr(need.__class__, "activations", lambda self, mode: 0 if mode == "lowest" else self.forward)
    monkeypatch.setattr(h.pack.nodes.host.plugin, "needed", lambda *_: need if estimated else None)
    mm.unload_all_models()
    loaded: list[tuple[int, int]] = []

    def look(*args: Any, **given: Any) -> Tensor:
        loaded.append((vae.patcher.loaded_size() - vae.patcher.model_size(), model.loaded_size() - model.model_size()))
        return h.pack.samplers.sample_cpigdm(*args, **given)

    h.sample(h.sampler(look, network_gradient=False, memory="lowest"), steps=1)
    h.sample(h.sampler(look, network_gradient=False), steps=1)
    assert loaded == [(0, 0)] * 2
    mm.unload_all_models()


@pytest.mark.parametrize(("solve", "told"), [("sample_psld", "C-PiGDM loads only"), ("sample_cpigdm", "weights")])
def test_no_room_for_what_must_be_whole_is_said(
    solve: str, told: str, hosts: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as mm

    h, load_models_gpu = hosts("sd15"), mm.load_models_gpu
    lack: list[Exception] = [torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")]

    def loads(models: list, *args: Any, force_full_load: bool = False, **given: Any) -> None:
        if force_full_load:
            raise lack[0]
        return load_models_gpu(models, *args, **given)

    monkeypatch.setattr(mm, "load_models_gpu", loads)
    sampler = h.sampler(getattr(h.pack.samplers, solve), network_gradient=solve == "sample_psld")
    with pytest.raises(torch.cuda.OutOfMemoryError, match="must be loaded whole") as error:
        h.sample(sampler)
    assert told in str(error.value)
    assert ("C-PiGDM" in str(error.value)) == (solve == "sample_psld")
    lack[0] = MemoryError()
    with pytest.raises(h.pack.nodes.host.faults.MainMemoryFull, match="main memory is full"):
        h.sample(sampler)
