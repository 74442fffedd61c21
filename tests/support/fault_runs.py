"""Runs that go wrong on their way: what makes them, and what must be as it was before."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from support.host_runs import Host, Scarce
from torch import Tensor, nn

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


def unfinished() -> set[Path]:
    """The pictures that runs have left which did not come to their end."""
    import folder_paths

    return set(Path(folder_paths.get_output_directory()).glob("posterior_unfinished*.png"))


class Spoilt(Scarce):
    """NaN out of a layer, at the calls given by number."""

    def __enter__(self) -> "Spoilt":
        self.handle = self.layer.register_forward_hook(self._spoil)
        return self

    def _spoil(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        self.calls += 1
        return output * float("nan") if self.calls in self.failing else output
