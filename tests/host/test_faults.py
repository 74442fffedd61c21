"""Out of memory at any stage, and whatever goes wrong many times over: a message, and everything as it was."""

import contextlib
import gc
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.fault_runs import METHODS, Cancelled, Spoilt, leftovers, middle, run
from support.host_runs import Host, Scarce, layer_of
from support.tiny_checkpoints import write_lora
from torch import Tensor
from torch.utils.hooks import RemovableHandle

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


# Inside Restore --------------------------------------------------------------------------------------------------------


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
