"""What a gradient step needs in each mode of recompute.py, what there is, and how the lack of it shows."""

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn

from .codec import works_on_pixels
from .gradients import differentiable_options, gradients
from .internals import missing, without
from .recompute import MODES, blocks, replaced_forwards

USABLE = 0.9  # of free memory: allocators fragment
GIB = 2**30


# Estimating -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """Bytes that one network's forward pass leaves for the backward pass.

    Attributes:
        saved: all of them.
        kept: what is left when its blocks are computed again.
        block: the most that one block needs when its turn comes.
        largest: the largest single tensor among them.
    """

    saved: int = 0
    kept: int = 0
    block: int = 0
    largest: int = 0


@dataclass(frozen=True)
class Estimate:
    """Bytes on the compute device for one gradient step.

    What is saved is exact. The peak at which it is freed is bounded: 1.04 (fastest), 1.2 and 1.3 (lowest) times what one step was
    seen to take on a CPU (benchmarks/results/psld_cost.md). A GPU's own workspaces are not known to it.

    Attributes:
        weights: of diffusion model, VAE and ControlNets.
        stages: network, decoder, encoder, as far as a gradient goes through them.
        forward: what a pass of the network (or of the VAE) takes without a gradient, by the host's own estimate; 0 where it has one.
        copies: largest tensors that the backward pass of one layer holds beside what was saved (in, out, and workspace).
    """

    weights: int
    stages: tuple[Stage, ...]
    forward: int = 0
    copies: int = 2

    def activations(self, mode: str) -> int:
        """Bytes beside the weights at the peak of a step."""
        if not self.stages:
            return self.forward
        if mode == "fastest":
            peak = sum(stage.saved for stage in self.stages)
        elif mode == "balanced":  # the backward pass has done with the later stages when it comes to an earlier one
            kept = itertools.accumulate(stage.kept for stage in self.stages)
            peak = max(before + stage.block for before, stage in zip(kept, self.stages, strict=True))
        else:
            peak = max(stage.kept + stage.block for stage in self.stages)
        return max(self.forward, peak + self.copies * max(stage.largest for stage in self.stages))

    def gigabytes(self, mode: str) -> float:
        """Weights and activations, in GiB."""
        return (self.weights + self.activations(mode)) / GIB

    def best(self, free: float) -> str:
        """The quickest mode whose activations go into `free` bytes, or the lowest."""
        return next((mode for mode in MODES if self.fits(mode, free)), MODES[-1])

    def fits(self, mode: str, free: float) -> bool:
        """Whether the activations of a mode go into `free` bytes."""
        return self.activations(mode) <= USABLE * free

    def advice(self, size: tuple[int, int], free: float, device: torch.device) -> str:
        """What would fit: a size for which the lowest mode goes into the `free` bytes of a device, and other ways out."""
        main = device.type == "cpu"
        height, width = size
        scale = (USABLE * free / self.activations(MODES[-1])) ** 0.5
        if scale >= 1:
            return f"close other programs{'' if main else ' that use the GPU'}, or restart ComfyUI"
        fits = [int(side * scale) // 64 * 64 for side in (width, height)]
        smaller = f"a picture of about {fits[0]} x {fits[1]} would fit; so may " if min(fits) else ""
        return f"{smaller}a smaller batch{'' if main else ', or a float16 or bfloat16 model and VAE instead of float32'}"


@dataclass
class Plan:
    """What the runs of one node share, whose shapes and models are the same.

    Attributes:
        need: of each of them; None before the first, and where there is no estimate.
        unknown: why there is none.
        mode: that one of them had to fall back to; the next ones begin in it.
        lighter: whether one had to fall back to the lighter options; the next ones begin with them.
    """

    need: Estimate | None = None
    unknown: str = ""
    mode: str | None = None
    lighter: bool = False


def estimate(
    model: Any,
    vae: Any,
    shape: tuple[int, ...],
    passes: int = 2,
    controls: tuple[nn.Module, ...] = (),
    network_gradient: bool = True,
    decoder_gradient: bool = True,
    beside: tuple[nn.Module, ...] = (),
) -> Estimate:
    """What a step needs, from the networks themselves: they run on fake tensors, which have shapes and no memory.

    Args:
        model: a ComfyUI BaseModel.
        vae: a ComfyUI VAE, or None.
        shape: of the latent, (B, c, h, w).
        passes: network passes for each step, 2 with classifier-free guidance.
        controls: ControlNets, counted in proportion to their size.
        network_gradient: whether a gradient goes through the network, or only through the VAE's decoder.
        decoder_gradient: False where none goes through the decoder either.
        beside: other models in memory, whose passes are among those above.

    Raises:
        RuntimeError: the network needs inputs that only its own conditioning can give.
    """
    try:
        from comfy.model_management import InterruptProcessingException, module_size
    except ImportError as error:
        raise RuntimeError(f"memory cannot be estimated: this ComfyUI has no {missing(error)}") from error
    from torch._subclasses.fake_tensor import FakeTensorMode

    if works_on_pixels(vae):
        vae = None
    with gradients():  # quantised weights cannot be listed in inference mode
        sizes = [module_size(network) for network in (model, *controls)]
        weights = sum((*sizes, *map(module_size, beside))) + (0 if vae is None else module_size(vae.first_stage_model))
    share = sum(sizes) / sizes[0]
    stages: list[Stage] = []
    wide, forward = (passes * shape[0], *shape[1:]), 0
    try:
        with gradients(), FakeTensorMode(allow_non_fake_inputs=True):
            if network_gradient:
                stage = _measure_network(model, wide)
                stages.append(dataclasses.replace(stage, saved=int(share * stage.saved), kept=int(share * stage.kept)))
            else:
                forward = int(share * _forward_memory(model, wide))
            if vae is not None:
                network, device = vae.first_stage_model, vae.device
                latent = torch.empty(shape, dtype=vae.vae_dtype, device=device)
                side = vae.upscale_ratio
                image = latent.new_empty((shape[0], 3, shape[2] * side, shape[3] * side))
                if not (network_gradient or decoder_gradient):
                    passes_of_vae = (
                        vae.memory_used_decode(latent.shape, vae.vae_dtype),
                        vae.memory_used_encode(image.shape, vae.vae_dtype),
                    )
                    return Estimate(int(weights), (), max(forward, *map(int, passes_of_vae)))
                stages.append(_measure(network, lambda network, z: network.decode(z), latent))
                if network_gradient:
                    stages.append(_measure(network, lambda network, image: network.encode(image), image))
    except InterruptProcessingException:  # the layers look out for it here too
        raise
    except Exception as error:
        raise RuntimeError(f"the memory that {type(model).__name__} needs cannot be estimated ({error})") from error
    return Estimate(int(weights), tuple(stages), forward)


def _measure_network(model: Any, shape: tuple[int, ...]) -> Stage:
    return _measure(model.diffusion_model, lambda network, x, **given: network(x, **given), *_network_inputs(model, shape))


def _forward_memory(model: Any, shape: tuple[int, ...]) -> float:
    """Bytes of a pass without a gradient: the host's rule of thumb, but never more than a pass takes that keeps everything."""
    from comfy.model_management import InterruptProcessingException

    rule = model.memory_required(shape)
    try:
        stage = _measure_network(model, shape)
    except InterruptProcessingException:
        raise
    except Exception:  # quantised weights have no skeleton
        return rule
    return min(rule, stage.saved + 2 * stage.largest)


def _network_inputs(model: Any, shape: tuple[int, ...]) -> tuple[Tensor, dict[str, Any]]:
    """Fake inputs of a diffusion network, as its conditionings would make them: noisy latent, and the rest by name."""
    config = model.model_config.unet_config
    device, dtype = _device_of(model), model.get_dtype_inference()

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype)

    batch, channels = shape[:2]
    embedder = (config.get("context_embedder_config") or {}).get("params", {})
    context = config.get("context_dim") or embedder.get("in_features") or config.get("context_in_dim")
    vector = model.adm_channels or config.get("vec_in_dim")
    given = {
        "timesteps": torch.empty(batch, device=device),
        "context": None if context is None else empty(batch, 77, context),
        "y": None if not vector else empty(batch, vector),
        "transformer_options": differentiable_options({}, False)["transformer_options"],
    }
    return empty(batch, config.get("in_channels") or channels, *shape[2:]), given


def _device_of(model: Any) -> torch.device:
    from comfy.model_management import get_torch_device

    patcher = getattr(model, "current_patcher", None)
    return get_torch_device() if patcher is None else patcher.load_device


def _measure(network: nn.Module, run: Callable[..., Any], x: Tensor, given: dict[str, Any] | None = None) -> Stage:
    """Run a skeleton of the network on fake tensors and add up what autograd saves, in all and block by block."""
    twin = _skeleton(network, x.device)
    weights = {tensor.untyped_storage()._cdata for tensor in (*twin.parameters(), *twin.buffers())}
    # Storages, and not tensors: a tensor that a hook hands back holds the graph that holds the tensor, and nobody frees the two.
    everything: dict[int, UntypedStorage] = {}
    outside: dict[int, UntypedStorage] = {}
    inside: list[dict[int, UntypedStorage]] = []
    current = outside

    def save(tensor: Tensor, *places: dict[int, UntypedStorage]) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            for place in places:
                place[storage._cdata] = storage

    def recorded(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal current
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor):
                    save(value, outside)
            inside.append({})
            current = inside[-1]
            try:
                return forward(*args, **kwargs)
            finally:
                current = outside

        return call

    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: save(t, everything, current), lambda _: None)
    with replaced_forwards(blocks(twin), recorded), hooks:
        run(twin, x.requires_grad_(), **(given or {}))

    def size(storages: dict[int, UntypedStorage]) -> int:
        return sum(storage.nbytes() for storage in storages.values())

    return Stage(
        saved=size(everything),
        kept=size(outside),
        block=max((size(block) for block in inside), default=0),
        largest=max((storage.nbytes() for storage in everything.values()), default=0),
    )


def _skeleton(module: nn.Module, device: torch.device) -> nn.Module:
    """The same network on new tensors of the same shapes; with fake tensors it costs nothing."""

    def like(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    twin = object.__new__(type(module))
    # A method that somebody hung on the instance would run the real network.
    twin.__dict__ = {name: value for name, value in module.__dict__.items() if getattr(value, "__self__", None) is not module}
    # Not what is hung on the real layers: their weights' places in memory and patches, hooks, and others' `forward`.
    twin.__dict__ |= {name: type(value)() for name, value in twin.__dict__.items() if name.endswith("_hooks")}
    twin.__dict__ |= {name: [] for name in ("weight_function", "bias_function") if name in twin.__dict__}
    for name in ("_v", "forward"):
        twin.__dict__.pop(name, None)
    twin._parameters = {
        name: None if p is None else nn.Parameter(like(p), requires_grad=False) for name, p in module._parameters.items()
    }
    twin._buffers = {name: like(buffer) for name, buffer in module._buffers.items()}
    twin._modules = {name: None if part is None else _skeleton(part, device) for name, part in module._modules.items()}
    return twin


# Free memory, and none --------------------------------------------------------------------------------------------------


def free_memory(device: torch.device) -> int:
    """Bytes free on the compute device."""
    import comfy.model_management as mm

    with without("knowing how much memory is free"):
        return int(mm.get_free_memory(device))
    return 0  # then as little is kept as can be


def room(device: torch.device, weights: int) -> int:
    """Bytes for activations once these weights are loaded and the host has moved other models out."""
    import comfy.model_management as mm

    if device.type == "cpu":  # where loading a model takes nothing more
        return free_memory(device)
    loaded = sum(model.model_loaded_memory() for model in mm.current_loaded_models if model.device == device)
    return max(0, free_memory(device) + loaded - weights)


def release_memory() -> None:
    """Give what is cached and unused back to the device."""
    import comfy.model_management as mm

    with without("giving cached memory back"):
        mm.soft_empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device is out of memory."""
    import comfy.model_management as mm

    if isinstance(error, mm.InterruptProcessingException):
        return False
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    # CPU, MPS and other back ends have no class of their own for it.
    return isinstance(error, RuntimeError) and any(
        words in str(error).lower() for words in ("out of memory", "not enough memory", "can't allocate memory")
    )
