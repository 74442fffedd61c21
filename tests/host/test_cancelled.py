"""Cancelled at any stage: it stops within a layer, and everything is as it was."""

import gc
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.fault_runs import Cancelled, middle, run, unfinished
from support.host_runs import Host, Scarce
from torch import Tensor


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


def test_a_copy_of_a_runs_operator_is_whole(pack: ModuleType) -> None:
    ops = pack.operators
    own = pack.nodes.host.stoppable(ops.Measurement(torch.zeros(1, 3, 2, 2), ops.AreaDownscale((3, 16, 16), 8)))
    copy = own.to("cpu", torch.float64)
    again = pack.nodes.host.stoppable(own)
    del own
    for operator in (copy.operator, again.operator):
        assert torch.equal(operator.A(torch.ones(1, 3, 16, 16)), torch.ones(1, 3, 2, 2))


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


def test_what_restore_had_done_is_kept(h: Host, restore: Callable[..., Tensor], caplog: pytest.LogCaptureFixture) -> None:
    """Two of three pictures, to the last layer before the third is decoded."""
    import comfy.model_management as mm

    layer, before = middle(h, "decode"), unfinished()
    with Scarce(layer, set()) as passed:
        expected = restore(samples=3)
    assert unfinished() == before
    with Cancelled(h, layer, passed.calls), pytest.raises(mm.InterruptProcessingException):
        restore(samples=3)
    kept = sorted(unfinished() - before)
    for file, picture in zip(kept, expected[:2], strict=True):
        difference = np.asarray(Image.open(file)) - 255 * picture.clamp(0, 1).numpy()
        assert abs(difference).max() <= 1
    said = f"what was done, 2 of 3 pictures, is saved in ComfyUI's output folder as {kept[0].name} to {kept[1].name}"
    assert said in caplog.text


def test_what_cannot_be_saved_does_not_hide_that_a_run_was_cancelled(
    h: Host, restore: Callable[..., Tensor], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as mm
    from comfy_api.latest import ui

    layer, before, save, saved = middle(h, "decode"), unfinished(), ui.ImageSaveHelper.save_images, []

    def full(*given: Any, **named: Any) -> Any:  # nodes' own previews go through here, too
        saved.extend([1] * ("posterior_unfinished" in given[1:]))
        if len(saved) > 1:
            raise OSError("No space left on device")
        return save(*given, **named)

    monkeypatch.setattr(ui.ImageSaveHelper, "save_images", full)
    with Scarce(layer, set()) as passed:
        restore(samples=3)
    with Cancelled(h, layer, passed.calls), pytest.raises(mm.InterruptProcessingException):
        restore(samples=3)
    (kept,) = unfinished() - before
    said = f"2 of 3 pictures, is saved in ComfyUI's output folder as {kept.name}, the rest could not be saved (No space left on device)"
    assert said in caplog.text
