"""Cancelled at any stage, out of memory at any stage, NaN at any stage: a message, and everything as it was."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.host_runs import Host, Scarce, layer_of
from support.tiny_checkpoints import write_lora
from torch import Tensor, nn

METHODS = {
    "PSLD, line search": ("sample_psld", {"rule": "line_search", "omega": 0.8, "gamma": 0.0, "last_steps": 2}, True),
    "PSLD, paper": ("sample_psld", {"omega": 1.0, "gamma": 0.1}, True),
    "C-PiGDM": ("sample_cpigdm", {"inner_steps": 2, "last_steps": 2}, False),
}
STEPS = 2


def sampler(h: Host, method: str, memory: str = "fastest") -> Any:
    name, options, through_network = METHODS[method]
    solve = getattr(h.pack.samplers, name)
    return h.pack.nodes.host.stock_sampler(
        solve, h.measurement(), h.vae, memory, network_gradient=through_network, unique_id=None, **options
    )


def run(h: Host, method: str, memory: str = "fastest", **options: Any) -> Tensor:
    return h.sample(sampler(h, method, memory), steps=STEPS, **options)


def leftovers(h: Host) -> list[str]:
    """What a run could leave on a model: hooks, other forwards, options, gradients."""
    found = [f"{option}" for option in ("optimized_attention_override",) if option in str(h.model.model_options)]
    for network in (h.model.model, h.vae.first_stage_model):
        for name, module in network.named_modules():
            hooks = [key for key, value in vars(module).items() if key.endswith("_hooks") and value]
            found += [f"{name}.{key}" for key in hooks] + ([f"{name}.forward"] if "forward" in vars(module) else [])
        found += [f"{name}.grad" for name, weight in network.named_parameters() if weight.grad is not None]
    return found


@pytest.fixture
def h(hosts: Callable[..., Host]) -> Iterator[Host]:
    """A model whose weights are the same to the bit afterwards, on which nothing is left."""
    h = hosts("sd15")
    networks = (h.model.model, h.vae.first_stage_model)
    before = [{name: weight.detach().clone() for name, weight in network.named_parameters()} for network in networks]
    yield h
    for network, weights in zip(networks, before, strict=True):
        assert all(torch.equal(weight, weights[name]) for name, weight in network.named_parameters())
    assert leftovers(h) == []


# Cancelled --------------------------------------------------------------------------------------------------------------


class Cancelled:
    """Cancels at one call of one layer, on the way forward or back, and counts the layers that still run after that."""

    def __init__(self, h: Host, layer: nn.Module, call: int, back: bool = False) -> None:
        networks = (h.model.model, h.vae.first_stage_model)
        self.leaves = [m for network in networks for m in network.modules() if not list(m.children()) and list(m.parameters())]
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


@pytest.mark.parametrize(
    ("method", "where", "call", "back"),
    [
        ("PSLD, line search", "network", 1, False),
        ("PSLD, line search", "network", 1, True),
        ("PSLD, line search", "decode", 1, True),
        ("PSLD, line search", "decode", 2, False),
        ("PSLD, paper", "encode", 1, False),
        ("PSLD, paper", "encode", 1, True),
        ("C-PiGDM", "network", 2, False),
        ("C-PiGDM", "decode", 3, False),
        ("C-PiGDM", "decode", 1, True),
    ],
)
def test_cancelled_at_any_stage_within_a_layer(method: str, where: str, call: int, back: bool, h: Host) -> None:
    import comfy.model_management as mm

    expected = run(h, method)
    middle = {"network": h.model.model.diffusion_model.output_blocks[0][0].in_layers[2]}
    vae = h.vae.first_stage_model
    middle |= {"decode": vae.taesd_decoder[5].conv[2], "encode": vae.taesd_encoder[5].conv[2]}
    with Cancelled(h, middle[where], call, back) as cancelled, pytest.raises(mm.InterruptProcessingException):
        run(h, method)
    assert cancelled.asked
    assert cancelled.after <= 1
    assert torch.equal(run(h, method), expected)  # the next prompt


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


def test_a_lora_is_unpatched_after_out_of_memory(h: Host, tmp_path: Path) -> None:
    """The patched weights are those of the LoRA while the error passes, and the model's own after the host unloads it."""
    import comfy.model_management as mm
    import comfy.sd
    import comfy.utils

    lora = comfy.utils.load_torch_file(str(write_lora(tmp_path / "lora.safetensors")))
    with torch.inference_mode():
        model, _ = comfy.sd.load_lora_for_models(h.model, None, lora, 1.0, 0.0)
    patched = Host(h.pack, "sd15", model, h.vae)
    plain, expected = run(h, "C-PiGDM"), run(patched, "C-PiGDM")
    assert not torch.equal(plain, expected)
    everywhere = Scarce(layer_of(h, "decode"), set(range(1, 100)))
    with everywhere, pytest.raises(torch.cuda.OutOfMemoryError, match=r"even in mode lowest.*To make it fit"):
        run(patched, "C-PiGDM")
    assert torch.equal(run(patched, "C-PiGDM"), expected)
    mm.unload_all_models()
    assert torch.equal(run(h, "C-PiGDM"), plain)


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


@pytest.mark.parametrize("method", METHODS)
def test_nan_from_the_model_names_step_and_sigma_and_saves_what_there_is(method: str, h: Host) -> None:
    from PIL import Image

    expected, before = run(h, method), unfinished()
    with (
        Spoilt(layer_of(h, "network"), {2}),
        pytest.raises(
            RuntimeError, match=r"step 2 of 2: the model returned NaN.* at sigma [\d.]+; try .*saved in .* as"
        ) as failed,
    ):
        run(h, method)
    (picture,) = unfinished() - before
    assert picture.name in str(failed.value)
    with Image.open(picture) as image:
        assert image.size == (64, 64)
        assert image.getextrema() != ((0, 0),) * 3
    assert torch.equal(run(h, method), expected)


def test_nan_in_the_first_step_says_that_there_is_nothing_to_save(h: Host) -> None:
    before = unfinished()
    with Spoilt(layer_of(h, "network"), {1}), pytest.raises(RuntimeError, match=r"step 1 of 2: .*nothing to save"):
        run(h, "C-PiGDM")
    assert unfinished() == before


@pytest.mark.parametrize("method", METHODS)
def test_nan_from_the_vae_is_not_laid_to_the_model(method: str, h: Host) -> None:
    with (
        Spoilt(layer_of(h, "decode"), set(range(1, 1000))),
        pytest.raises(RuntimeError, match=r"step 1 of 2: the VAE returned NaN.*--fp32-vae"),
    ):
        run(h, method)


def test_messages_are_whole_sentences(h: Host) -> None:
    with Spoilt(layer_of(h, "network"), {2}), pytest.raises(RuntimeError) as failed:
        run(h, "C-PiGDM")
    assert not re.search(r"\(\)|None|  |\.\.", str(failed.value))
