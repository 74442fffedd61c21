"""Cancelled at any stage, out of memory at any stage, NaN at any stage: a message, and everything as it was."""

import contextlib
import dataclasses
import gc
import itertools
import random
import re
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from support.host_runs import Host, Scarce, layer_of
from support.tiny_checkpoints import conditioning, write_lora
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

METHODS = {
    "PSLD, line search": ("sample_psld", {"rule": "line_search", "omega": 0.8, "gamma": 0.0, "last_steps": 2}, True),
    "PSLD, paper": ("sample_psld", {"omega": 1.0, "gamma": 0.1}, True),
    "C-PiGDM": ("sample_cpigdm", {"inner_steps": 2, "last_steps": 2}, False),
}
STEPS = 2


def sampler(h: Host, method: str, memory: str = "fastest", measurement: Any = None) -> Any:
    name, options, through_network = METHODS[method]
    solve, photo = getattr(h.pack.samplers, name), h.measurement() if measurement is None else measurement
    return h.pack.nodes.host.stock_sampler(
        solve, photo, h.vae, memory, network_gradient=through_network, unique_id=None, **options
    )


def run(h: Host, method: str, memory: str = "fastest", measurement: Any = None, steps: int = STEPS, **options: Any) -> Tensor:
    return h.sample(sampler(h, method, memory, measurement), steps=steps, **options)


def networks(h: Host) -> list[nn.Module]:
    return [h.model.model, *([] if h.vae is None else [h.vae.first_stage_model])]


def leftovers(h: Host) -> list[str]:
    """What a run could leave on a model: hooks, other forwards, options, gradients."""
    found = [f"{option}" for option in ("optimized_attention_override",) if option in str(h.model.model_options)]
    for network in networks(h):
        for name, module in network.named_modules():
            hooks = [key for key, value in vars(module).items() if key.endswith("_hooks") and value]
            found += [f"{name}.{key}" for key in hooks] + ([f"{name}.forward"] if "forward" in vars(module) else [])
        found += [f"{name}.grad" for name, weight in network.named_parameters() if weight.grad is not None]
    return found


@contextlib.contextmanager
def unharmed(h: Host) -> Iterator[Host]:
    """Afterwards the weights are the same to the bit, and nothing is left on the networks."""
    before = [{name: weight.detach().clone() for name, weight in network.named_parameters()} for network in networks(h)]
    yield h
    for network, weights in zip(networks(h), before, strict=True):
        assert all(torch.equal(weight, weights[name]) for name, weight in network.named_parameters())
    assert leftovers(h) == []


@pytest.fixture
def h(hosts: Callable[..., Host]) -> Iterator[Host]:
    with unharmed(hosts("sd15")) as host:
        yield host


# Cancelled --------------------------------------------------------------------------------------------------------------


class Cancelled:
    """Cancels at one call of one layer, on the way forward or back, and counts the layers that still run after that."""

    def __init__(self, h: Host, layer: nn.Module, call: int, back: bool = False) -> None:
        every = [module for network in networks(h) for module in network.modules()]
        self.leaves = [module for module in every if not list(module.children()) and list(module.parameters())]
        self.layer, self.call, self.back = layer, call, back
        self.calls, self.after, self.asked = 0, 0, False

    def __enter__(self) -> "Cancelled":
        self.handles = [leaf.register_forward_hook(self._passed) for leaf in self.leaves]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _passed(self, module: nn.Module, _: Any, output: Tensor) -> None:
        self.after += self.asked
        if self.back and output.requires_grad:
            output.register_hook(lambda gradient: self._event(module, gradient))
        elif not self.back:
            self._event(module, output)

    def _event(self, module: nn.Module, _: Tensor) -> None:
        import comfy.model_management as mm

        if self.back:
            self.after += self.asked
        if module is self.layer:
            self.calls += 1
            if self.calls == self.call:
                mm.interrupt_current_processing()
                self.asked = True


def middle(h: Host, where: str) -> nn.Module:
    """A layer inside, so that others follow on the way forward and back."""
    if where == "network":
        return h.model.model.diffusion_model.output_blocks[0][0].in_layers[2]
    vae = h.vae.first_stage_model
    return {"decode": vae.taesd_decoder, "encode": vae.taesd_encoder}[where][5].conv[2]


@pytest.mark.parametrize(
    ("method", "where", "call", "back", "memory"),
    [
        ("PSLD, line search", "network", 1, False, "lowest"),
        ("PSLD, line search", "network", 1, True, "fastest"),
        ("PSLD, paper", "network", 2, True, "balanced"),
        ("PSLD, line search", "decode", 1, True, "lowest"),
        ("PSLD, line search", "decode", 2, False, "balanced"),
        ("PSLD, paper", "encode", 1, False, "fastest"),
        ("PSLD, paper", "encode", 1, True, "balanced"),
        ("C-PiGDM", "network", 2, False, "fastest"),
        ("C-PiGDM", "decode", 3, False, "lowest"),
        ("C-PiGDM", "decode", 1, True, "fastest"),
    ],
)
def test_cancelled_at_any_stage_within_a_layer(
    method: str, where: str, call: int, back: bool, memory: str, h: Host, count: Callable[[int, int], int]
) -> None:
    """Going back through what was computed again it is within a block, for PyTorch has one place for hooks there."""
    import comfy.model_management as mm

    modes = h.pack.nodes.host.MODES
    for mode in [memory, *(other for other in modes if other != memory)][: count(1, len(modes))]:
        expected = run(h, method, mode)
        with Cancelled(h, middle(h, where), call, back) as cancelled, pytest.raises(mm.InterruptProcessingException):
            run(h, method, mode)
        assert cancelled.asked
        block = 6 if where == "network" else 3  # layers in one
        assert cancelled.after <= (block if back and mode != "fastest" else 1)
        assert torch.equal(run(h, method, mode), expected)  # the next prompt


def test_interrupt_within_a_solve_of_the_operator(h: Host) -> None:
    """A pseudo-inverse by iterations notices it too: the flag is up before the first, and no step is taken."""
    import comfy.model_management as mm

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


def test_finish_is_cancelled_within_a_solve(h: Host) -> None:
    """An operator without a closed form: its solve takes hundreds of applications."""
    import comfy.model_management as mm

    ops = h.pack.operators
    blur = ops.Blur(ops.motion_kernel(9.0, 30.0), (3, 64, 64), "replicate")
    assert not blur.exact
    image, asked = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0)), []
    measurement = ops.Measurement(blur.A(2 * image.movedim(-1, 1).double() - 1), blur, 0.02)
    finish = h.pack.nodes.finish.Finish.execute
    expected = finish(0.9 * image, measurement, 0.05).args[0]
    faults = h.pack.nodes.host.faults
    look = faults.throw_if_interrupted

    def asks() -> None:
        asked.append(1)
        if len(asked) == 20:
            mm.interrupt_current_processing()
        look()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "throw_if_interrupted", asks)
        with pytest.raises(mm.InterruptProcessingException):
            finish(0.9 * image, measurement, 0.05)
    assert len(asked) == 20  # at each of its applications
    assert torch.equal(finish(0.9 * image, measurement, 0.05).args[0], expected)


@pytest.mark.parametrize("name", ["downscale", "product", "iterations"])
def test_a_runs_own_operator_is_gone_with_the_last_that_holds_it(name: str, pack: ModuleType) -> None:
    """By counting alone: until a garbage collection its tables would stay on a device."""
    ops, shape = pack.operators, (3, 16, 16)
    blur = ops.Blur(ops.motion_kernel(5.0, 30.0), (3, 64, 64), "replicate")
    operator = {
        "downscale": ops.AreaDownscale(shape, 8),
        "product": ops.AreaDownscale(shape, 8) @ ops.Blur(ops.gaussian_kernel(1.0), shape, "circular"),
        "iterations": blur,
    }[name]
    own = pack.nodes.host.stoppable(ops.Measurement(torch.zeros(1, *operator.out_shape), operator))
    expected = operator.A(torch.ones(1, *operator.in_shape))
    gc.collect()
    gc.disable()
    try:
        assert torch.equal(own.operator.A(torch.ones(1, *operator.in_shape)), expected)
        own.operator.A_dagger(own.y)
        left = weakref.ref(own.operator)
        del own
        assert left() is None
    finally:
        gc.enable()


# Many runs --------------------------------------------------------------------------------------------------------------


def objects() -> dict[str, int]:
    """How many there are of what a run makes and hooks on, the fake tensors of an estimate too."""
    gc.collect()
    found = [type(thing) for thing in gc.get_objects() if issubclass(type(thing), Tensor | RemovableHandle)]
    return {kind.__name__: found.count(kind) for kind in set(found)}


def test_nothing_is_left_of_many_mixed_runs(h: Host, count: Callable[[int, int], int]) -> None:
    """Methods, modes and ends, each with each, in a mixed order, and all of it again: after the second turn there is nothing more
    of anything than after the first. The 12 of `make test` have each pair of two of them; `make test-full` has all 36.
    """
    import comfy.model_management as mm

    layer, modes = layer_of(h, "decode"), h.pack.nodes.host.MODES
    cancelled = mm.InterruptProcessingException
    ends = [
        (contextlib.nullcontext, None),
        (lambda: Scarce(layer, {1}, cancelled()), cancelled),
        (lambda: Spoilt(layer, {1}), h.pack.nodes.host.faults.NotFinite),
        (lambda: Scarce(layer, {1}), None),
    ]
    every = [*itertools.product(range(3), range(3), range(4))]
    every.sort(key=lambda chosen: chosen[1] != (chosen[0] + chosen[2]) % 3)
    turn = every[: count(12, 36)]
    random.Random(0).shuffle(turn)
    levels = []
    for _ in range(2):
        for method, mode, end in turn:
            spoil, error = ends[end]
            if end == 3 and modes[mode] == modes[-1]:
                error = torch.cuda.OutOfMemoryError  # there is no lower one
            with spoil(), contextlib.nullcontext() if error is None else pytest.raises(error):
                run(h, [*METHODS][method], modes[mode], steps=1)
            assert leftovers(h) == [], (method, mode, end)
        levels.append(objects())
    assert levels[0] == levels[1], levels


# Out of memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ["network", "decode", "encode"])
@pytest.mark.parametrize("failing", [1, 2])
def test_out_of_memory_at_any_stage_falls_back(
    method: str, where: str, failing: int, h: Host, caplog: pytest.LogCaptureFixture
) -> None:
    """The documented fall-back: the next lower mode, with the same result. The second call of the network is in the second step."""
    expected = run(h, method)
    with Scarce(layer_of(h, where), {failing}) as scarce:
        result = run(h, method)
    if scarce.calls == 0:
        assert where == "encode"  # which these methods do not use
        assert torch.equal(result, expected)
        return
    assert "out of memory in mode fastest; started again in mode balanced" in caplog.text
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(run(h, method), expected)


@pytest.mark.parametrize(
    ("method", "where"), [("PSLD, line search", "network"), ("PSLD, paper", "encode"), ("C-PiGDM", "decode")]
)
def test_out_of_memory_in_a_backward_pass_falls_back(
    method: str, where: str, h: Host, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run(h, method)
    with Scarce(middle(h, where), {1}, back=True) as scarce:
        result = run(h, method)
    assert scarce.calls > 1
    assert "out of memory in mode fastest; started again in mode balanced" in caplog.text
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(run(h, method), expected)


class ScarceOperator:
    """PyTorch's error for main memory, from an operator at one of its calls."""

    def __init__(self, operator: type, failing: int) -> None:
        self.operator, self.failing, self.calls = operator, failing, 0

    def __enter__(self) -> "ScarceOperator":
        forward = self.forward = self.operator._forward

        def scarce(operator: Any, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == self.failing:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
            return forward(operator, x)

        self.operator._forward = scarce
        return self

    def __exit__(self, *_: object) -> None:
        self.operator._forward = self.forward


@pytest.mark.parametrize(("method", "failing"), [("PSLD, line search", 6), ("C-PiGDM", 6)])
def test_out_of_memory_in_an_inner_step_falls_back(
    method: str, failing: int, h: Host, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run(h, method)
    with ScarceOperator(h.pack.operators.AreaDownscale, failing) as scarce:
        result = run(h, method)
    assert scarce.calls > failing
    assert "out of memory in mode fastest; started again in mode balanced" in caplog.text
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_out_of_memory_while_models_are_loaded(h: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI unloads all models on this error, and says what helps."""
    import comfy.model_management as mm

    def full(*_: Any, **__: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    expected = run(h, "C-PiGDM")
    with monkeypatch.context() as patch:
        patch.setattr(mm, "load_models_gpu", full)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            run(h, "C-PiGDM")
    assert torch.equal(run(h, "C-PiGDM"), expected)


def test_out_of_memory_in_finish_says_what_helps(h: Host) -> None:
    measurement, image = h.measurement(), torch.full((1, 64, 64, 3), 0.4)
    finish = h.pack.nodes.finish.Finish.execute
    expected = finish(image, measurement, 0.05).args[0]
    with (
        ScarceOperator(h.pack.operators.AreaDownscale, 2),
        pytest.raises(MemoryError, match=r"main memory is full .*DefaultCPUAllocator.*smaller or fewer pictures"),
    ):
        finish(image, measurement, 0.05)
    assert torch.equal(finish(image, measurement, 0.05).args[0], expected)


def test_lack_of_memory_is_named_once_and_on_a_device_left_to_comfyui(pack: ModuleType) -> None:
    named = pack.nodes.host.naming_lack_of_memory
    with pytest.raises(MemoryError) as failed, named(), named():
        raise MemoryError("1 TB")
    assert str(failed.value) == "main memory is full (1 TB); smaller or fewer pictures need less"
    for error in (torch.cuda.OutOfMemoryError("x"), torch.AcceleratorError("CUDA error: out of memory", 2)):
        with pytest.raises(type(error)) as failed, named():
            raise error
        assert failed.value is error


# Inside Restore ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def restore(h: Host, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Tensor]:
    node = h.pack.nodes.restore
    monkeypatch.setitem(node.CALLS["C-PiGDM"], "fast", 2)

    def run() -> Tensor:
        with torch.inference_mode():
            given = (h.model, h.vae, conditioning("sd15", 1), h.measurement(), "C-PiGDM", "fast", 0, 1.0)
            return node.Restore.execute(*given, memory="fastest").args[0]

    return run


@pytest.mark.parametrize("where", ["encode", "decode"])
def test_restore_when_the_hosts_own_vae_calls_are_cancelled_or_out_of_memory(
    where: str, h: Host, restore: Callable[[], Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """Those before the sampling and after it. ComfyUI's own way out of a lack of memory is to work in tiles."""
    import comfy.model_management as mm

    layer = middle(h, where)
    with Scarce(layer, set()) as passed:
        expected = restore()
    with Cancelled(h, layer, passed.calls) as cancelled, pytest.raises(mm.InterruptProcessingException):
        restore()
    assert cancelled.after <= 1
    with Scarce(layer, {passed.calls}) as scarce:
        result = restore()
    assert scarce.calls > passed.calls
    assert "tiled" in caplog.text
    blocks = torch.nn.functional.avg_pool2d(result.movedim(-1, 1).double(), 8)
    assert float((blocks - (h.measurement().y.double() + 1) / 2).abs().max()) < 1e-4
    assert torch.equal(restore(), expected)


def test_restore_is_cancelled_in_its_last_application_of_the_operator(h: Host, restore: Callable[[], Tensor]) -> None:
    import comfy.model_management as mm

    faults, asked, limit = h.pack.nodes.host.faults, [], 10**9
    look = faults.throw_if_interrupted

    def asks() -> None:
        asked.append(1)
        if len(asked) == limit:
            mm.interrupt_current_processing()
        look()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "throw_if_interrupted", asks)
        expected = restore()
        limit = len(asked)
        asked.clear()
        with pytest.raises(mm.InterruptProcessingException):
            restore()
    assert len(asked) == limit
    assert torch.equal(restore(), expected)


# A LoRA -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["out of memory", "NaN", "cancelled"])
def test_a_lora_is_unpatched_after(fault: str, h: Host, tmp_path: Path) -> None:
    """The patched weights are those of the LoRA while the error passes, and the model's own after the host unloads it."""
    import comfy.model_management as mm
    import comfy.sd
    import comfy.utils

    lora = comfy.utils.load_torch_file(str(write_lora(tmp_path / "lora.safetensors")))
    with torch.inference_mode():
        model, _ = comfy.sd.load_lora_for_models(h.model, None, lora, 1.0, 0.0)
    patched = Host(h.pack, "sd15", model, h.vae)
    plain, expected = run(h, "PSLD, line search"), run(patched, "PSLD, line search")
    assert not torch.equal(plain, expected)
    faults = {
        "out of memory": (Scarce(layer_of(h, "decode"), set(range(1, 100))), r"even in mode lowest.*To make it fit"),
        "NaN": (Spoilt(layer_of(h, "network"), {2}), "step 2 of 2"),
        "cancelled": (Cancelled(h, middle(h, "network"), 1, back=True), None),
    }
    kinds = (torch.cuda.OutOfMemoryError, h.pack.nodes.host.faults.NotFinite, mm.InterruptProcessingException)
    spoilt, words = faults[fault]
    with spoilt, pytest.raises(dict(zip(faults, kinds, strict=True))[fault], match=words):
        run(patched, "PSLD, line search")
    assert torch.equal(run(patched, "PSLD, line search"), expected)
    mm.unload_all_models()
    assert torch.equal(run(h, "PSLD, line search"), plain)


# NaN --------------------------------------------------------------------------------------------------------------------


class Spoilt(Scarce):
    """NaN out of a layer, at the calls given by number."""

    def __enter__(self) -> "Spoilt":
        self.handle = self.layer.register_forward_hook(self._spoil)
        return self

    def _spoil(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        self.calls += 1
        return output * float("nan") if self.calls in self.failing else output


def unfinished() -> set[Path]:
    import folder_paths

    return set(Path(folder_paths.get_output_directory()).glob("posterior_unfinished*.png"))


def eight_bits(h: Host, denoised: Tensor) -> np.ndarray:
    """The picture of what a callback was given, through the host's own VAE node."""
    if h.vae is None:
        image = (denoised.movedim(1, -1) + 1) / 2
    else:
        with torch.inference_mode():
            image = h.vae.decode(h.model.model.latent_format.process_out(denoised))
    return (image.clamp(0, 1) * 255).numpy()


@pytest.mark.parametrize(
    ("method", "arch", "batch", "pixels"),
    [
        *((method, "sd15", 1, False) for method in METHODS),
        ("C-PiGDM", "sd15", 2, False),
        ("C-PiGDM", "sd15", 1, True),
        ("C-PiGDM", "sd3", 1, False),
    ],
)
def test_nan_from_the_model_names_step_and_sigma_and_saves_the_last_good_estimate(
    method: str, arch: str, batch: int, pixels: bool, hosts: Callable[..., Host]
) -> None:
    from PIL import Image

    host = hosts(arch)
    if pixels:
        host = dataclasses.replace(host, vae=None)  # its latents are the pictures, with 4 channels
    ops, steps, before = host.pack.operators, [], unfinished()
    photo = ops.Measurement(torch.zeros(1, 4, 4, 4), ops.AreaDownscale((4, 8, 8), 2)) if pixels else host.measurement()
    given = {"measurement": photo, "steps": 3, "latent": host.latent(batch)}
    with unharmed(host):
        expected = run(host, method, **given)
        with Spoilt(layer_of(host, "network"), {3}), pytest.raises(RuntimeError) as failed:
            run(host, method, **given, callback=lambda i, denoised, *_: steps.append(denoised.clone()))
        assert torch.equal(run(host, method, **given), expected)
    sigma = float(host.pack.nodes.host.sigmas_of(host.model, 3, "normal")[2])
    sigma = sigma / (1 - sigma) if arch == "sd3" else sigma  # the samplers' own, as on the node
    said = re.fullmatch(
        r"step 3 of 3, sigma ([\d.]+): the model returned NaN.*step 2, is saved in .* as (.*)", str(failed.value)
    )
    assert said, failed.value
    assert abs(float(said[1]) - sigma) < 0.01 * sigma
    pictures = sorted(unfinished() - before)
    assert said[2].split(", ") == [path.name for path in pictures]
    first, last = (eight_bits(host, denoised) for denoised in steps)
    assert len(pictures) == len(last) == batch
    assert np.abs(first - last).max() > 3  # another step's picture is another
    for path, right in zip(pictures, last, strict=True):
        with Image.open(path) as image:
            assert np.abs(np.asarray(image).astype(float) - right).max() <= 1.01


def test_nan_in_the_first_step_says_that_there_is_nothing_to_save(h: Host) -> None:
    before = unfinished()
    with (
        Spoilt(layer_of(h, "network"), {1}),
        pytest.raises(RuntimeError, match=r"step 1 of 2, sigma [\d.]+: .*nothing to save"),
    ):
        run(h, "C-PiGDM")
    assert unfinished() == before


@pytest.mark.parametrize("method", METHODS)
def test_nan_from_the_vae_is_not_laid_to_the_model(method: str, h: Host) -> None:
    with (
        Spoilt(layer_of(h, "decode"), set(range(1, 1000))),
        pytest.raises(RuntimeError, match=r"step 1 of 2, sigma [\d.]+: the VAE returned NaN.*--fp32-vae"),
    ):
        run(h, method)


def test_messages_are_whole_sentences(h: Host) -> None:
    with Spoilt(layer_of(h, "network"), {2}), pytest.raises(RuntimeError) as failed:
        run(h, "C-PiGDM")
    assert not re.search(r"\(\)|None|  |\.\.", str(failed.value))
