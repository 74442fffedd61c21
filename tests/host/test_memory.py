"""Memory in the real ComfyUI: a fall to the next mode on lack of it, and estimates that choose the first."""

import copy
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from support.full_networks import base_model, kl_network
from support.host_runs import Host, Probe, Scarce, layer_of, own_forwards, psld
from support.tiny_checkpoints import conditioning

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


@pytest.mark.parametrize("free", [None, 1000], ids=["free by all accounts", "too little free"])
def test_lack_of_main_memory_says_what_helps_on_a_cpu(
    free: int | None, hosts: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as mm

    h = hosts("sd15")
    if free is not None:
        monkeypatch.setattr(mm, "get_free_memory", lambda *_, **__: free)
    error = RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory")
    with Scarce(layer_of(h, "decode"), set(range(1, 10)), error), pytest.raises(MemoryError) as failed:
        h.sample(psld(h, "lowest"), steps=1)
    way_out = "close other programs, or restart ComfyUI" if free is None else "a smaller batch"
    assert str(failed.value).startswith(f"main memory is full even in mode lowest ({error}). This run needs about ")
    assert str(failed.value).endswith(f" GB were free. To make it fit: {way_out}")


def test_lack_of_main_memory_beside_a_gpu_is_not_explained_by_the_gpus(host: ModuleType) -> None:
    estimate, gpu = host.Estimate(weights=2**30, stages=()), torch.device("cuda")
    said = host.plugin._too_large(estimate, (64, 64), 2.0**30, gpu, MemoryError("1 TB"))
    assert isinstance(said, MemoryError)
    assert str(said) == "main memory is full even in mode lowest (1 TB). A smaller picture or batch needs less"


def test_cpu_allocator_counts_as_out_of_memory(host: ModuleType) -> None:
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**60, dtype=torch.uint8)
    assert host.memory.out_of_memory(failed.value)


# Estimates --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "side", "expected", "readme"),
    # What saved-tensor hooks measured on these networks: GiB of the UNet (batch 2), of KL decode, and of KL encode. And what the
    # README says of lowest and fastest, for PSLD and for C-PiGDM.
    [
        ("SD15", 64, (1.44, 2.81, 1.51), (3.3, 7.8, 3.3, 4.8)),
        ("SDXL", 128, (9.94, 11.6, 6.43), (10.9, 33.9, 10.9, 17.6)),
    ],
)
def test_estimate_of_the_full_networks(
    family: str,
    side: int,
    expected: tuple[float, ...],
    readme: tuple[float, ...],
    hosts: Callable[..., Host],
    host: ModuleType,
) -> None:
    """Stock SD 1.5 at 512 x 512 and SDXL at 1024 x 1024, float16 with a bfloat16 VAE, built without memory."""
    vae = copy.copy(hosts("sd15").vae)
    vae.first_stage_model, vae.vae_dtype = kl_network(torch.bfloat16, "meta"), torch.bfloat16
    model = base_model(family, torch.float16, "meta")
    estimate = host.estimate(model, vae, (1, 4, side, side))
    for stage, figure in zip(estimate.stages, expected, strict=True):
        assert abs(stage.saved / 2**30 - figure) <= 0.02 * figure
    assert estimate.activations("balanced") < 0.6 * estimate.activations("fastest")
    assert estimate.activations("lowest") < 0.5 * estimate.activations("fastest")
    without = host.estimate(model, vae, (1, 4, side, side), network_gradient=False)
    found = [each.gigabytes(mode) for each in (estimate, without) for mode in ("lowest", "fastest")]
    assert found == pytest.approx(readme, abs=0.1)


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


def test_latents_of_another_model_are_named(hosts: Callable[..., Host], pack: ModuleType) -> None:
    sd15, sd3 = hosts("sd15"), hosts("sd3")
    estimate = pack.nodes.memory.MemoryEstimate.execute
    with pytest.raises(
        ValueError, match=r"^latent: is of 16 channels, the model's latents have 4; connect a latent of this model"
    ):
        estimate(sd15.model, 0, True, latent={"samples": sd3.latent() + 1})
    # ComfyUI gives an empty latent the channels of the model.
    empty, own = (estimate(sd3.model, 0, True, latent={"samples": h.latent()}).args[0] for h in (sd15, sd3))
    assert empty == own
    with pytest.raises(
        ValueError, match=r"^vae: its latents have 16 channels, the model's have 4; connect the VAE that belongs to this model"
    ):
        estimate(sd15.model, 0, True, sd3.vae, sd15.measurement())
    with pytest.raises(ValueError, match=r"^vae: is not connected, and this model does not work on pixels[.] Connect"):
        estimate(sd15.model, 0, True, None, sd15.measurement())


def test_advice_names_a_size_that_fits(host: ModuleType) -> None:
    stage = host.memory.Stage(saved=8 * 2**30, kept=2 * 2**30, block=2 * 2**30, largest=0)
    estimate = host.Estimate(weights=2**30, stages=(stage,))
    assert estimate.gigabytes("fastest") == 9.0
    assert estimate.gigabytes("lowest") == 5.0
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    text = estimate.advice((1024, 512), 2 * 2**30, gpu)
    assert "about 320 x 640" in text  # sqrt(1.8 / 4) of 512 x 1024, in steps of 64
    assert text.endswith("a float16 or bfloat16 model and VAE instead of float32")
    assert estimate.advice((1024, 512), 2 * 2**30, cpu) == "a picture of about 320 x 640 would fit; so may a smaller batch"
    assert estimate.advice((1024, 512), 8 * 2**30, gpu) == "close other programs that use the GPU, or restart ComfyUI"
    assert estimate.advice((1024, 512), 8 * 2**30, cpu) == "close other programs, or restart ComfyUI"


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


@pytest.mark.parametrize("memory", ["auto", "lowest"])
def test_the_lowest_mode_for_want_of_knowledge_is_explained_on_the_node(
    memory: str, hosts: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as mm

    h = hosts("sd15")
    config = h.model.model.model_config.unet_config
    notes: list[list[str]] = [[], []]
    with monkeypatch.context() as patch:
        patch.delitem(config, "context_dim")
        h.sample(h.sampler(Probe(lambda *_, **__: None), memory=memory, notes=notes[0]))
    monkeypatch.setattr(mm, "get_free_memory", lambda *_, **__: 0)
    h.sample(h.sampler(Probe(lambda *_, **__: None), memory=memory, notes=notes[1]))
    if memory == "lowest":  # the user's own choice
        assert notes == [["memory: lowest"], ["memory: lowest"]]
    else:
        assert notes[0][0].startswith("memory: lowest, for the memory that ")
        assert "cannot be estimated" in notes[0][0]
        assert notes[1] == ["memory: lowest, for no memory is known to be free"]


# Runs of one node -------------------------------------------------------------------------------------------------------


def test_restore_estimates_once_and_stays_in_the_mode_that_it_fell_back_to(
    hosts: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    h = hosts("sd15")
    plugin, restore = h.pack.nodes.host.plugin, h.pack.nodes.restore
    estimate, recomputing = plugin.estimate, plugin.recomputing
    estimates, modes = [], []
    monkeypatch.setattr(plugin, "estimate", lambda *given: estimates.append(1) or estimate(*given))
    monkeypatch.setattr(plugin, "recomputing", lambda mode, *given: modes.append(mode) or recomputing(mode, *given))
    monkeypatch.setitem(restore.CALLS["PSLD"], "fast", 1)

    def run() -> torch.Tensor:
        given = (h.model, h.vae, conditioning("sd15", 1), h.measurement(2), "PSLD", "fast", 0, 1.0)
        with torch.inference_mode():
            return restore.Restore.execute(*given, samples=2, memory="fastest").args[0]

    expected = run()
    assert (modes, estimates) == (["fastest"] * 4, [1])
    modes.clear()
    with Scarce(h.model.model.diffusion_model.out[2], {2}):  # of the second sample
        result = run()
    assert modes == ["fastest", "fastest", "balanced", "balanced", "balanced"]
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    modes.clear()
    run()
    assert modes == ["fastest"] * 4  # nothing is kept for the next prompt
    assert estimates == [1] * 3


def test_runs_of_a_sampler_node_are_their_own(hosts: Callable[..., Host], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its SAMPLER may be used for other sizes and models."""
    h = hosts("sd15")
    plugin, shapes = h.pack.nodes.host.plugin, []
    estimate = plugin.estimate
    monkeypatch.setattr(plugin, "estimate", lambda *given: shapes.append(given[2]) or estimate(*given))
    sampler = h.sampler(Probe(lambda *_, **__: None))
    for batch in (1, 2):
        h.sample(sampler, latent=h.latent(batch))
    assert [shape[0] for shape in shapes] == [1, 2]
