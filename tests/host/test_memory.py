"""Modes of memory in the real ComfyUI: the same picture in each, a fall to the next on lack of it, and estimates."""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.full_networks import base_model, kl_network
from support.host_runs import Host, Probe, Scarce, directional_derivatives, layer_of, pull_back
from support.host_versions import needs, nodes_custom_sampler
from support.tiny_checkpoints import conditioning, write_controlnet
from torch import Tensor

ARCHS = ["sd15", "sd21v", "sdxl_vega", "sd3"]


def own_forwards(*networks: torch.nn.Module) -> list[str]:
    return [name for network in networks for name, module in network.named_modules() if "forward" in vars(module)]


def psld(h: Host, memory: str = "auto", **options: Any) -> Any:
    return h.pack.nodes.host.stock_sampler(h.pack.samplers.sample_psld, h.measurement(), h.vae, memory, **options)


# Modes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_every_mode_gives_the_same_latent(arch: str, hosts: Callable[..., Host]) -> None:
    h = hosts(arch)
    expected, *others = (h.sample(psld(h, mode, eta=0.5), steps=3) for mode in h.pack.nodes.host.MODES)
    for other in others:
        torch.testing.assert_close(other, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("arch", "vae", "expected"),
    [
        ("sd15", "taesd", {"ResBlock", "BasicTransformerBlock"}),
        ("sdxl_vega", "taesd", {"ResBlock", "BasicTransformerBlock", "Upsample", "Downsample"}),
        ("sd3", "taesd", {"JointBlock", "PatchEmbed", "TimestepEmbedder", "VectorEmbedder", "FinalLayer"}),
        ("sd15", "kl", {"ResnetBlock", "AttnBlock", "Upsample", "Downsample"}),
    ],
)
def test_blocks_are_found(arch: str, vae: str, expected: set[str], hosts: Callable[..., Host]) -> None:
    h = hosts(arch, vae=vae)
    blocks = h.pack.nodes.host.memory.blocks
    network = h.vae.first_stage_model if vae == "kl" else h.model.model.diffusion_model
    assert {type(block).__name__ for block in blocks(network)} == expected
    if vae == "taesd":
        assert len(blocks(h.vae.first_stage_model)) == 20  # 10 residual blocks each way


def saved_bytes(h: Host, mode: str) -> list[int]:
    """What autograd keeps of a call of the guided model, of decode and of encode, without weights."""
    weights = {p.untyped_storage().data_ptr() for n in (h.model.model, h.vae.first_stage_model) for p in n.parameters()}

    def saved(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            function(x.detach().requires_grad_())
        return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights)

    def look(model: Any, x: Tensor, autoencoder: Any, **_: Any) -> list[int]:
        image = torch.zeros(1, 3, 64, 64)
        return [saved(f, v) for f, v in ((model, x), (autoencoder.decode, x), (autoencoder.encode, image))]

    probe = Probe(look)
    h.sample(h.sampler(probe, memory=mode), sigmas=torch.tensor([0.7, 0.3]))
    return probe.seen


@pytest.mark.parametrize("arch", ARCHS)
def test_lower_modes_keep_less_and_the_estimate_knows(arch: str, hosts: Callable[..., Host]) -> None:
    """The fake networks of the estimate keep as many bytes as the real ones, in all and outside their blocks."""
    h = hosts(arch)
    estimate = h.pack.nodes.host.estimate(h.model.model, h.vae, tuple(h.latent().shape))
    fastest, balanced, lowest = (saved_bytes(h, mode) for mode in h.pack.nodes.host.MODES)
    for stage, *real in zip(estimate.stages, fastest, balanced, lowest, strict=True):
        # The guider's own arithmetic on latents is not in the estimate, and the hooks do not see the text that blocks keep.
        extra, text = 64 * h.latent().numel(), 4 * conditioning(arch)[0][0].numel() * 2
        assert abs(stage.saved - real[0]) <= 0.02 * real[0] + extra
        assert -0.02 * real[1] - extra <= stage.kept - real[1] <= 0.02 * real[1] + extra + text
        assert real[1] < 0.6 * real[0]
        assert real[2] < 0.5 * real[1] + extra


def test_another_extensions_forward_is_put_back(hosts: Callable[..., Host]) -> None:
    h = hosts("sd15")
    blocks = h.pack.nodes.host.memory.blocks(h.model.model.diffusion_model)
    own, theirs, calls = blocks[0].forward, "theirs", []

    def patched(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(theirs)
        return own(*args, **kwargs)

    blocks[0].forward = patched
    try:
        h.sample(psld(h, "lowest"), steps=1)
        assert blocks[0].__dict__["forward"] is patched
        assert len(calls) >= 2  # in the forward pass, and again in the backward pass
    finally:
        del blocks[0].forward
    assert own_forwards(h.model.model, h.vae.first_stage_model) == []


# Out of memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["network", "decode", "encode"])
@pytest.mark.parametrize("failing", [{1}, {3}, {1, 2}])
def test_out_of_memory_starts_again_in_the_next_mode(
    where: str, failing: set[int], hosts: Callable[..., Host], caplog: pytest.LogCaptureFixture
) -> None:
    h = hosts("sd15")
    expected = h.sample(psld(h, "fastest", eta=0.5), steps=3)
    weights = {name: p.detach().clone() for name, p in h.model.model.named_parameters()}
    steps: list[int] = []
    with Scarce(layer_of(h, where), failing):
        result = h.sample(psld(h, "fastest", eta=0.5), steps=3, callback=lambda i, *_: steps.append(i))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert steps == ([0, 1] if failing == {3} else []) + [0, 1, 2]
    said = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert said[0] == "out of memory in mode fastest; started again in mode balanced"
    assert len(said) == len(failing)
    assert own_forwards(h.model.model, h.vae.first_stage_model) == []
    assert all(torch.equal(p, weights[name]) for name, p in h.model.model.named_parameters())


def test_out_of_memory_while_a_block_is_computed_again(hosts: Callable[..., Host], caplog: pytest.LogCaptureFixture) -> None:
    """In mode balanced the second call of a block within one step is that of the backward pass."""
    h = hosts("sd15")
    expected = h.sample(psld(h, "lowest"), steps=2)
    block = h.model.model.diffusion_model.input_blocks[1][0].in_layers[0]
    with Scarce(block, {2}) as scarce:
        result = h.sample(psld(h, "balanced"), steps=2)
    assert scarce.calls > 4
    assert "out of memory in mode balanced; started again in mode lowest" in caplog.text
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert own_forwards(h.model.model, h.vae.first_stage_model) == []


@pytest.mark.parametrize("mode", ["fastest", "lowest"])
def test_out_of_memory_in_every_mode_says_what_would_fit(mode: str, hosts: Callable[..., Host]) -> None:
    h = hosts("sd15")
    with (
        Scarce(layer_of(h, "decode"), set(range(1, 10))) as scarce,
        pytest.raises(
            torch.cuda.OutOfMemoryError, match=r"even in mode lowest.*needs about .* GB beside .* GB of weights.*fit:"
        ),
    ):
        h.sample(psld(h, mode), steps=2)
    assert scarce.calls == (3 if mode == "fastest" else 1)
    assert own_forwards(h.model.model, h.vae.first_stage_model) == []
    assert h.sample(psld(h), steps=1).isfinite().all()  # and the next run is fine


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("mat1 and mat2 shapes cannot be multiplied")])
def test_other_errors_are_not_taken_for_it(error: Exception, hosts: Callable[..., Host]) -> None:
    h = hosts("sd15")
    with Scarce(layer_of(h, "network"), {1}, error) as scarce, pytest.raises(type(error), match=str(error)):
        h.sample(psld(h, "fastest"), steps=2)
    assert scarce.calls == 1


def test_cpu_allocator_counts_as_out_of_memory(host: ModuleType) -> None:
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**60, dtype=torch.uint8)
    assert host.memory.out_of_memory(failed.value)


@pytest.mark.parametrize("memory", ["fastest", "balanced", "lowest"])
@pytest.mark.parametrize("call", [1, 2])
def test_interrupt_within_a_step(memory: str, call: int, hosts: Callable[..., Host]) -> None:
    """In the lower modes the second call of the layer is in the backward pass of the first step."""
    import comfy.model_management as mm

    h = hosts("sd15")
    layer = h.model.model.diffusion_model.input_blocks[1][0].in_layers[0]
    steps: list[int] = []
    sampler, error = psld(h, memory), mm.InterruptProcessingException()
    with Scarce(layer, {call}, error) as scarce, pytest.raises(mm.InterruptProcessingException):
        h.sample(sampler, steps=4, callback=lambda i, *_: steps.append(i))
    assert len(steps) == (1 if memory == "fastest" and call == 2 else 0)
    assert scarce.calls == call
    assert own_forwards(h.model.model, h.vae.first_stage_model) == []


def test_interrupt_within_a_solve_of_the_operator(hosts: Callable[..., Host]) -> None:
    """A pseudo-inverse by iterations notices it too: the flag is up before the first, and no step is taken."""
    import comfy.model_management as mm

    h = hosts("sd15")
    ops, applied = h.pack.operators, []
    blur = ops.Blur(ops.motion_kernel(9.0, 30.0), (3, 64, 64), "replicate")
    assert not blur.exact

    def solve(model: Any, x: Tensor, sigmas: Tensor, measurement: Any, **_: Any) -> Tensor:
        measurement.operator.A(torch.zeros(1, 3, 64, 64))
        mm.interrupt_current_processing()
        try:
            applied.append(measurement.operator.A_dagger(measurement.y))
        finally:
            mm.interrupt_current_processing(False)
        return x

    measurement = ops.Measurement(torch.rand(1, 3, 64, 64), blur)
    with pytest.raises(mm.InterruptProcessingException):
        h.sample(h.pack.nodes.host.stock_sampler(solve, measurement, h.vae))
    assert applied == []
    assert "_forward" not in {*vars(blur), *vars(blur.form)}  # it was the run's own copy that stopped


# Estimates --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "side", "expected"),
    # What saved-tensor hooks measured on these networks: GiB of the UNet (batch 2), of KL decode, and of KL encode.
    [("SD15", 64, (1.44, 2.81, 1.51)), ("SDXL", 128, (9.94, 11.6, 6.43))],
)
def test_estimate_of_the_full_networks(
    family: str, side: int, expected: tuple[float, ...], hosts: Callable[..., Host], host: ModuleType
) -> None:
    """Stock SD 1.5 at 512 x 512 and SDXL at 1024 x 1024, float16 with a bfloat16 VAE, built without memory."""
    vae = copy.copy(hosts("sd15").vae)
    vae.first_stage_model, vae.vae_dtype = kl_network(torch.bfloat16, "meta"), torch.bfloat16
    estimate = host.estimate(base_model(family, torch.float16, "meta"), vae, (1, 4, side, side))
    for stage, figure in zip(estimate.stages, expected, strict=True):
        assert abs(stage.saved / 2**30 - figure) <= 0.02 * figure
    assert estimate.activations("balanced") < 0.6 * estimate.activations("fastest")
    assert estimate.activations("lowest") < 0.5 * estimate.activations("fastest")
    assert estimate.gigabytes("lowest") < (7.5 if family == "SD15" else 20)


def test_interrupt_within_an_estimate(hosts: Callable[..., Host], host: ModuleType) -> None:
    import comfy.model_management as mm

    h = hosts("sd15")
    mm.interrupt_current_processing()
    with pytest.raises(mm.InterruptProcessingException):
        host.estimate(h.model.model, h.vae, (1, 4, 8, 8))


def test_auto_takes_the_quickest_mode_that_fits(hosts: Callable[..., Host], monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.model_management as mm

    h = hosts("sd15")
    host = h.pack.nodes.host
    estimate = host.estimate(h.model.model, h.vae, tuple(h.latent().shape))
    for mode in host.MODES:
        free = 1.2 * estimate.activations(mode)
        monkeypatch.setattr(mm, "get_free_memory", lambda *_, free=free, **__: free)
        seen = []
        probe = Probe(lambda model, x, **_: seen.extend(own_forwards(h.model.model)))  # noqa: B023
        h.sample(h.sampler(probe))
        assert bool(seen) == (mode != "fastest")
        assert ("diffusion_model" in seen) == (mode == "lowest")
    monkeypatch.setattr(mm, "get_free_memory", lambda *_, **__: 1000)
    assert estimate.best(1000) == "lowest"


def test_advice_names_a_size_that_fits(host: ModuleType) -> None:
    stage = host.memory.Stage(saved=8 * 2**30, kept=2 * 2**30, block=2 * 2**30, largest=0)
    estimate = host.Estimate(weights=2**30, stages=(stage,))
    assert estimate.gigabytes("fastest") == 9.0
    assert estimate.gigabytes("lowest") == 5.0
    text = estimate.advice((1024, 512), free=2 * 2**30)
    assert "about 320 x 640" in text  # sqrt(1.8 / 4) of 512 x 1024, in steps of 64
    assert "would fit" not in estimate.advice((1024, 512), free=8 * 2**30)


def test_network_that_cannot_be_estimated_runs_in_the_lowest_mode(
    hosts: Callable[..., Host], caplog: pytest.LogCaptureFixture
) -> None:
    """Estimates build the inputs of a network from its configuration; one that says nothing of its text cannot run on them."""
    h = hosts("sd15")
    config = h.model.model.model_config.unet_config
    width = config.pop("context_dim")
    seen = []
    try:
        h.sample(h.sampler(Probe(lambda *_, **__: seen.extend(own_forwards(h.model.model)))))
    finally:
        config["context_dim"] = width
    assert "diffusion_model" in seen
    assert "memory auto means lowest" in caplog.text


# Paged models -----------------------------------------------------------------------------------------------------------


def paged(patcher: Any) -> Any:
    """The patcher as a class that says it pages, which a CPU never does; its twin is ComfyUI's real reload from the file."""
    import comfy.model_patcher

    needs("force_deepcopy" in inspect.signature(comfy.model_patcher.ModelPatcher.clone).parameters, "deep copies of models")

    class Paged(comfy.model_patcher.ModelPatcher):
        def is_dynamic(self) -> bool:
            return True

        def get_non_dynamic_delegate(self) -> comfy.model_patcher.ModelPatcher:
            twin = comfy.model_patcher.ModelPatcher.clone(self, force_deepcopy=True)
            twin.__class__ = comfy.model_patcher.ModelPatcher
            return twin

    patcher.__class__ = Paged
    return patcher


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
