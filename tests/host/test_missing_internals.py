"""A ComfyUI that renamed or removed something loses one feature, with a message, and never the pack."""

import asyncio
import dataclasses
import importlib
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support.host_runs import Host
from support.host_versions import needs
from support.in_process import load_pack
from support.tiny_checkpoints import conditioning

PLACES = ("get_display_node_id", "get_parent_node_id", "get_real_node_id")


def psld(h: Host) -> Any:
    return h.sample(
        h.pack.nodes.host.stock_sampler(h.pack.samplers.sample_psld, h.measurement(), h.vae, unique_id="7"), steps=1
    )


def nodes(h: Host) -> list[Any]:
    return asyncio.run(h.pack.nodes.PosteriorExtension().get_node_list())


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("comfy.samplers", "KSAMPLER"),
        ("comfy.model_management", "throw_exception_if_processing_interrupted"),
        ("comfy.ldm.modules.attention", "attention_pytorch"),
    ],
)
def test_what_a_sampler_cannot_do_without_is_named(
    module: str, name: str, hosts: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    h = hosts("sd15")
    expected = psld(h)
    sampler = next(node for node in nodes(h) if node.define_schema().node_id == "PosteriorSamplerPSLD")
    with monkeypatch.context() as patch:
        patch.delattr(importlib.import_module(module), name)
        with pytest.raises(ValueError, match=rf"this ComfyUI has no {module}\.{name}, which this node needs.*Update"):
            psld(h) if name != "KSAMPLER" else sampler.execute(h.measurement(), {"rule": "line search"})
        assert len(nodes(h)) == len(h.pack.nodes.NODES)
    assert torch.equal(psld(h), expected)


@pytest.mark.parametrize(
    ("module", "name", "feature"),
    [
        ("server.PromptServer", "send_progress_text", "texts on nodes"),
        ("comfy.quant_ops", "QuantizedTensor", "telling quantised weights"),
        ("comfy.model_management", "module_size", "memory auto means lowest"),
        ("comfy.model_management", "in_training", ""),
    ],
)
def test_what_a_sampler_can_do_without_costs_one_feature(
    module: str,
    name: str,
    feature: str,
    hosts: Callable[..., Host],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    own = name == "QuantizedTensor" and hasattr(find("comfy.model_management"), "module_mmap_residency")  # 0.18.2
    needs(not own, f"way to load a model without {module}.{name}")
    h = hosts("sd15")
    expected = psld(h)
    owner = find(module)
    if module.startswith("server"):
        monkeypatch.setattr(owner, "instance", owner.__new__(owner), raising=False)
    monkeypatch.delattr(owner, name)
    result = psld(h)  # perhaps in another memory mode, where sums are taken in another order
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert feature in caplog.text
    assert not hasattr(owner, name)
    if feature.startswith("texts"):
        assert caplog.text.count(feature) == 1  # not at every step


def test_what_comfyui_itself_needs_too(
    hosts: Callable[..., Host], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without these no ComfyUI would run, but one may have renamed them; our own calls alone are tried."""
    h = hosts("sd15")
    host, mm = h.pack.nodes.host, find("comfy.model_management")
    guider = h.guider()
    monkeypatch.delattr(mm, "get_free_memory")
    assert host.memory.free_memory(torch.device("cpu")) == 0
    assert "without knowing how much memory is free" in caplog.text
    monkeypatch.delattr(mm, "load_models_gpu")
    monkeypatch.delattr(find("comfy.model_patcher"), "create_model_options_clone")
    with pytest.raises(ValueError, match=r"no comfy\.model_patcher\.create_model_options_clone"), host.naming_what_is_missing():
        host.differentiable_options({}, has_control=False)
    guider.inner_model, guider.conds = h.model.model, {}
    with (
        pytest.raises(ValueError, match=r"no comfy\.model_management\.load_models_gpu"),
        host.naming_what_is_missing(),
        host.resident(guider, h.vae, 0.0, 0.0),
    ):
        pass


def restore(h: Host, **options: Any) -> Any:
    with torch.inference_mode():
        given = (h.model, h.vae, conditioning("sd15", 1), h.measurement(), "C-PiGDM", "fast", 0, 1.0)
        return h.pack.nodes.restore.Restore.execute(*given, **options)


CALLS = {
    "PosteriorRestore": lambda h: restore(h, scheduler="normal"),
    "PosteriorSaveMeasurement": lambda h: h.pack.nodes.storage.SaveMeasurement.execute(h.measurement(), "missing"),
    "PosteriorLoadMeasurement": lambda h: h.pack.nodes.storage.LoadMeasurement.execute("missing_00001_.safetensors [output]"),
}


@pytest.mark.parametrize(
    ("module", "name", "node"),
    [
        ("comfy.samplers", "calculate_sigmas", "PosteriorRestore"),
        ("comfy.sample", "prepare_noise", "PosteriorRestore"),
        ("comfy.sample", "fix_empty_latent_channels", "PosteriorRestore"),
        ("folder_paths", "get_save_image_path", "PosteriorSaveMeasurement"),
        ("folder_paths", "annotated_filepath", "PosteriorLoadMeasurement"),
    ],
)
def test_what_one_node_cannot_do_without_is_named(
    module: str, name: str, node: str, hosts: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    h = hosts("sd15")
    monkeypatch.delattr(find(module), name)
    with pytest.raises(ValueError, match=rf"this ComfyUI has no {module}\.{name}, which this node needs.*Update"):
        CALLS[node](h)
    assert len(nodes(h)) == len(h.pack.nodes.NODES)


def test_what_restore_can_do_without_costs_that_alone(
    hosts: Callable[..., Host], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    h = hosts("sd15")
    monkeypatch.setitem(h.pack.nodes.restore.CALLS["C-PiGDM"], "fast", 1)
    expected = restore(h).args[0]
    assert "runs without" not in caplog.text
    for module, name in (
        ("latent_preview", "prepare_callback"), ("comfy.utils", "PROGRESS_BAR_ENABLED"), ("comfy_api.latest.ui", "PreviewImage"),
        ("comfy.samplers", "calculate_sigmas"),
    ):  # fmt: skip
        monkeypatch.delattr(find(module), name)
    assert torch.equal(restore(h).args[0], expected)
    for feature in ("previews of Restore", "the switch for progress bars", "pictures on nodes"):
        assert f"runs without {feature}" in caplog.text


def test_memory_that_cannot_be_given_back(
    host: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Our own call alone: a ComfyUI calls it too while it loads models."""
    monkeypatch.delattr(find("comfy.model_management"), "soft_empty_cache")
    host.memory.release_memory()
    assert "runs without giving cached memory back" in caplog.text


def test_pictures_while_a_node_runs(
    hosts: Callable[..., Host], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = find("server.PromptServer")
    sent: list[Any] = []
    instance = server.__new__(server)
    instance.client_id, instance.sockets_metadata, instance.last_node_id = "page", {}, "another"
    instance.send_sync = lambda *message: sent.append(message)
    monkeypatch.setattr(server, "instance", instance, raising=False)
    shared = SimpleNamespace(prompt_id="prompt", dynprompt=SimpleNamespace(**dict.fromkeys(PLACES, lambda node: node)))
    monkeypatch.setattr(find("comfy_execution.progress"), "get_progress_state", lambda: shared)
    flags = find("comfy_api.feature_flags")
    monkeypatch.setattr(flags, "supports_feature", lambda *_: True)
    send = hosts("sd15").pack.nodes.host.readout.send_picture
    send("7", torch.zeros(1, 8, 8, 3))
    assert len(sent) == 1
    monkeypatch.delattr(flags, "supports_feature")
    send("7", torch.zeros(1, 8, 8, 3))
    assert len(sent) == 1
    assert "has no comfy_api.feature_flags.supports_feature: it runs without pictures on nodes while they run" in caplog.text


def test_the_pack_loads_without_the_hosts_ui(
    hosts: Callable[..., Host], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    known = len(nodes(hosts("sd15")))
    api = find("comfy_api.latest")
    for name in ("ui", "UI"):
        monkeypatch.delattr(api, name)
    try:
        pack = load_pack("another_copy")
        found = asyncio.run(pack.nodes.PosteriorExtension().get_node_list())
        assert len(found) == known
        assert len(pack.nodes.restore.Uncertainty.execute(torch.rand(2, 8, 8, 3)).args) == 3
    finally:
        for name in [name for name in sys.modules if name.startswith("another_copy")]:
            del sys.modules[name]
    assert "has no comfy_api.latest.ui: it runs without pictures on nodes" in caplog.text


def test_schedulers_that_cannot_be_listed(
    hosts: Callable[..., Host], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    h = hosts("sd15")
    monkeypatch.delattr(find("comfy.samplers"), "SCHEDULER_NAMES")
    assert h.pack.nodes.host.schedulers() == ["midpoints"]
    assert "without a choice of schedulers" in caplog.text
    assert len(nodes(h)) == len(h.pack.nodes.NODES)


def test_a_node_that_cannot_be_described_is_left_out_alone(
    hosts: Callable[..., Host], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    h = hosts("sd15")
    monkeypatch.delattr(find("folder_paths"), "get_input_directory")
    left = {node.__name__ for node in h.pack.nodes.NODES} - {node.__name__ for node in nodes(h)}
    assert left == {"LoadMeasurement"}
    assert "node LoadMeasurement is not available: this ComfyUI has no folder_paths.get_input_directory" in caplog.text


def test_demo_prior_without_its_loader(hosts: Callable[..., Host], monkeypatch: pytest.MonkeyPatch) -> None:
    h = hosts("sd15")
    monkeypatch.delattr(find("comfy.model_detection"), "detect_unet_config")
    with pytest.raises(ValueError, match=r"this ComfyUI has no comfy\.model_detection\.detect_unet_config"):
        h.pack.nodes.demo.LoadDemoPrior.execute()


def test_own_mistakes_are_not_taken_for_it(hosts: Callable[..., Host], caplog: pytest.LogCaptureFixture) -> None:
    h = hosts("sd15")
    host = h.pack.nodes.host
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'shape'"), host.naming_what_is_missing():
        None.shape  # noqa: B018
    with pytest.raises(ImportError, match="numpy"), host.naming_what_is_missing():
        from numpy import no_such_thing  # noqa: F401
    # Nor are those of other nodes: what they hang on a model runs within a run of ours.
    others = h.model.clone()
    others.set_model_unet_function_wrapper(lambda *_: h.model.model.model_sampling.does_not_exist)
    with pytest.raises(AttributeError, match="no attribute 'does_not_exist'"):
        psld(dataclasses.replace(h, model=others))
    with pytest.raises(AttributeError, match="no attribute 'does_not_exist'"), host.without("this feature"):
        find("comfy.samplers").does_not_exist  # noqa: B018
    with pytest.raises(ImportError), host.without("this feature"):
        import comfy.no_such_module  # noqa: F401
    assert "this feature" not in caplog.text


def test_a_part_of_a_network_and_a_module_that_are_not_there(
    hosts: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's own way of looking up parts stands between them and us, and Python's of importing."""
    h = hosts("sd15")
    host = h.pack.nodes.host
    monkeypatch.delattr(find("comfy.model_base.BaseModel"), "get_dtype_inference")
    with pytest.raises(ValueError, match=r"no comfy\.model_base\.\w+\.get_dtype_inference"), host.naming_what_is_missing():
        host.plugin.lowest_precision(h.model.model, None)
    with monkeypatch.context() as patch:  # looked up by ComfyUI, for us
        patch.delattr(h.model.model, "model_sampling")
        with pytest.raises(ValueError, match=r"no comfy\.model_base\.\w+\.model_sampling"), host.naming_what_is_missing():
            host.sigmas_of(h.model, 1, "normal")
    monkeypatch.setitem(sys.modules, "comfy.samplers", None)
    with pytest.raises(ValueError, match=r"this ComfyUI has no comfy\.samplers, which"), host.naming_what_is_missing():
        host.sigmas_of(h.model, 1, "normal")


def find(path: str) -> ModuleType | type:
    """A module, or a class in one."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)
