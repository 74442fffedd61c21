"""Run a sampler function of ours through the real guider, as SamplerCustomAdvanced does, and look at what it is given."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from support.host_versions import needs
from support.tiny_checkpoints import SPECS, conditioning
from torch import Tensor

SIZE = 64  # pixels; 8 x 8 latents


@dataclass
class Host:
    """One loaded tiny model and what it takes to sample from it through nodes/host.

    Attributes:
        pack: the pack, loaded as ComfyUI loads it.
    """

    pack: Any
    arch: str
    model: Any
    vae: Any

    def measurement(self, batch: int = 1, factor: int = 8) -> Any:
        operator = self.pack.operators.AreaDownscale((3, SIZE, SIZE), factor)
        y = torch.rand(batch, *operator.out_shape, generator=torch.Generator().manual_seed(9)) - 0.5
        return self.pack.operators.Measurement(y, operator)

    def latent(self, batch: int = 1) -> Tensor:
        return torch.zeros(batch, SPECS[self.arch].latent_channels, SIZE // 8, SIZE // 8)

    def sampler(self, solve: Callable[..., Tensor], **options: Any) -> Any:
        return self.pack.nodes.host.stock_sampler(solve, self.measurement(), self.vae, **options)

    def guider(self, cfg: float = 3.0, positive: list | None = None, negative: list | None = None) -> Any:
        import comfy.samplers

        guider = comfy.samplers.CFGGuider(self.model)
        guider.set_conds(positive or conditioning(self.arch, 1), negative or conditioning(self.arch, 2))
        guider.set_cfg(cfg)
        return guider

    def sample(
        self,
        sampler: Any,
        guider: Any = None,
        steps: int = 3,
        latent: Tensor | None = None,
        noise_mask: Tensor | None = None,
        seed: int = 0,
        sigmas: Tensor | None = None,
        callback: Callable | None = None,
    ) -> Tensor:
        """Everything inside inference mode, as in a prompt."""
        import comfy.sample
        import comfy.samplers

        with torch.inference_mode():
            latent = (self.latent() if latent is None else latent).clone()
            noise = comfy.sample.prepare_noise(latent, seed)
            if sigmas is None:
                sigmas = comfy.samplers.calculate_sigmas(self.model.get_model_object("model_sampling"), "normal", steps)
            mask = None if noise_mask is None else noise_mask.clone()
            guider = guider or self.guider()
            return guider.sample(
                noise, latent, sampler, sigmas.clone(), denoise_mask=mask, callback=callback, disable_pbar=True, seed=seed
            )


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


def psld(h: Host, memory: str = "auto", **options: Any) -> Any:
    return h.sampler(h.pack.samplers.sample_psld, memory=memory, **options)


def own_forwards(*networks: torch.nn.Module) -> list[str]:
    """The parts of these networks on which a `forward` of their own hangs, by name."""
    return [name for network in networks for name, module in network.named_modules() if "forward" in vars(module)]


class Probe:
    """A sampler function that takes no step: it hands what it is given to `look` and keeps the answer."""

    def __init__(self, look: Callable[..., Any]) -> None:
        self.look, self.seen = look, None

    def __call__(self, model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, **given: Any) -> Tensor:
        self.seen = self.look(lambda v: model(v, sigmas[0].expand(len(v)), **extra_args), x, **given)
        return x


def pull_back(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """A seeded random v of the shape of function(x), and autograd's gradient of <v, function(x)>."""
    x = x.detach().requires_grad_()
    output = function(x)
    v = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    (gradient,) = torch.autograd.grad((v * output).sum(), x)
    return v, gradient


def directional_derivatives(function: Callable[[Tensor], Tensor], x: Tensor, step: float = 2e-3) -> tuple[list, list, float]:
    """Finite differences and autograd of <v, function(x)>, for a random v, along the gradient and along a random direction.

    Returns:
        finite differences, autograd's, and the norm of autograd's gradient, by which errors are to be judged.
    """
    v, gradient = pull_back(function, x)
    random = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    differences, products = [], []
    with torch.no_grad():
        for direction in (gradient, random):
            direction = direction / direction.norm()
            h = step * x.norm()
            ends = [(v.double() * function(x + sign * h * direction).double()).sum() for sign in (1, -1)]
            differences.append(float(ends[0] - ends[1]) / (2 * float(h)))
            products.append(float((gradient * direction).sum()))
    return differences, products, float(gradient.norm())


class Scarce:
    """Raises PyTorch's own out-of-memory error inside a network, at the calls of one of its layers given by number.

    With `back` at the layer's turns in backward passes.
    """

    def __init__(self, layer: torch.nn.Module, failing: set[int], error: Exception | None = None, back: bool = False) -> None:
        self.layer, self.failing, self.back, self.calls = layer, failing, back, 0
        self.error = error or torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def __enter__(self) -> "Scarce":
        if self.back:
            self.handle = self.layer.register_forward_hook(self._watch)
        else:
            self.handle = self.layer.register_forward_pre_hook(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def _watch(self, _module: torch.nn.Module, _inputs: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self._count)

    def _count(self, *_: object) -> None:
        self.calls += 1
        if self.calls in self.failing:
            raise self.error


def layer_of(h: Host, where: str) -> torch.nn.Module:
    if where == "network":
        network = h.model.model.diffusion_model
        return network.out[2] if hasattr(network, "out") else network.final_layer.linear
    vae = h.vae.first_stage_model
    return {"decode": vae.taesd_decoder[-1], "encode": vae.taesd_encoder[-1]}[where]
