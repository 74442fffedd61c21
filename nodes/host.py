"""Everything that touches ComfyUI's internals, and nothing else does.

ComfyUI runs a whole prompt under `torch.inference_mode()`, may page weights in and out while a network runs, and has attention
kernels without a gradient. Below is what it takes to differentiate through its models all the same, in small functions; what
cannot be differentiated correctly is refused by name before the first step, because a wrong gradient is a wrong picture that
nobody notices. ComfyUI is imported inside functions: a renamed internal then fails one node, with a message, not the pack.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..samplers import State

log = logging.getLogger("comfyui-posterior")


# Leaving inference mode ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def gradients() -> Iterator[None]:
    """Run with autograd inside ComfyUI's inference mode; some model families also switch off fused in-place kernels."""
    import comfy.model_management as mm

    before = mm.in_training
    mm.in_training = True
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        mm.in_training = before


def normal_weights(module: torch.nn.Module) -> int:
    """Replace inference-mode parameters and buffers by normal tensors on the same storage; no copy is made.

    Must run outside inference mode, after the last model load of a run (patching a LoRA makes inference tensors again).
    The shared module stays usable everywhere else: the numbers are the same memory.

    Returns:
        How many tensors were replaced.
    """
    from comfy.quant_ops import QuantizedTensor

    assert not torch.is_inference_mode_enabled(), "aliases made in inference mode would be inference tensors again"
    replaced = 0
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, old in tensors.items():
                if isinstance(old, QuantizedTensor):
                    raise ValueError(
                        f"the weights of {type(module).__name__} are quantised ({type(old).__name__}, at {name}), which has no "
                        "gradient here; load a float16, bfloat16 or float32 checkpoint of this model"
                    )
                if old is None:
                    continue
                if old.is_inference():
                    alias = torch.empty(0, dtype=old.dtype, device=old.device)
                    alias.set_(old.untyped_storage(), old.storage_offset(), old.size(), old.stride())
                    # A new Parameter, never `.data`: that only hides the flag, and autograd still refuses the tensor.
                    tensors[name] = alias if tensors is owner._buffers else torch.nn.Parameter(alias, requires_grad=False)
                    replaced += 1
                elif old.requires_grad:
                    old.requires_grad_(False)  # the VAE's weights ask for gradients nobody wants, and would save activations
    return replaced


def normal_tensors(tree: Any) -> Any:
    """Clone the inference tensors in a nest of dicts, lists, tuples and ComfyUI conds; the containers are rebuilt."""
    if isinstance(tree, Tensor):
        return tree.clone() if tree.is_inference() else tree
    if isinstance(tree, dict):
        return {key: normal_tensors(value) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(normal_tensors(value) for value in tree)
    if hasattr(tree, "_copy_with") and hasattr(tree, "cond"):  # comfy.conds.CONDRegular and its family
        return tree._copy_with(normal_tensors(tree.cond))
    return tree


# What a model call must look like to have a gradient -------------------------------------------------------------------


def differentiable_options(model_options: dict[str, Any], has_control: bool) -> dict[str, Any]:
    """A copy of the model options in which attention has a gradient and ControlNets leave saved tensors alone."""
    import comfy.ldm.modules.attention as attention
    from comfy.model_patcher import create_model_options_clone

    options = create_model_options_clone(model_options)
    transformer = options.setdefault("transformer_options", {})
    # Sage has no gradient and says nothing, flash and chunked sub-quadratic raise: PyTorch's own is right on every device.
    transformer["optimized_attention_override"] = lambda _chosen, *args, **kwargs: attention.attention_pytorch(*args, **kwargs)
    if has_control:
        # The UNet adds control to its skips in place; what goes on after a skip is taken must be a copy.
        patches = transformer["patches"] = dict(transformer.get("patches", {}))
        clone = [lambda h, _options: h.clone()]
        patches["input_block_patch_after_skip"] = clone + list(patches.get("input_block_patch_after_skip", []))
    return options


def refuse_unsupported(guider: Any, x: Tensor, model_options: dict[str, Any]) -> None:
    """Refuse, before the first step, what would give a wrong gradient or an obscure error."""
    if x.ndim != 4:
        raise ValueError(
            f"the latent has {x.ndim} dimensions {tuple(x.shape)}; only pictures, (batch, channels, height, width), work"
        )
    conds = [cond for group in guider.conds.values() for cond in group]
    if len({cond.get("hooks") for cond in conds}) > 1:
        raise ValueError(
            "the conditionings carry different hooks (for example a LoRA on the positive prompt only). Their weights are swapped "
            "between the two network passes, which makes the gradient wrong. Apply the LoRA to the model, or the same hook to "
            "every conditioning"
        )
    if len(model_options.get("multigpu_clones", {})) > 1:
        raise ValueError(
            "the model is split over several GPUs, where ComfyUI computes without gradients; remove the multi-GPU node"
        )
    if "easycache" in model_options.get("transformer_options", {}):  # LazyCache goes by the same name
        raise ValueError(
            "EasyCache or LazyCache is on the model: it skips network calls, and with them the gradient; remove it"
        )
    if model_options.get("context_handler") is not None:
        raise ValueError(
            "context windows are active on the model, and have not been proved to have a gradient; remove that node"
        )
    transformer = model_options.get("transformer_options", {})
    patches = [patch for group in transformer.get("patches", {}).values() for patch in group]
    if any("tomesd" in (getattr(patch, "__module__", None) or "") for patch in patches):
        log.warning("Token merging is active: its choice of tokens is not differentiable, so the guidance is only approximate.")


# The state ----------------------------------------------------------------------------------------------------------------


def state_of(model_sampling: Any) -> State:
    """Which state a model's sampling uses, by its parametrisation; an unknown one is refused by name."""
    import comfy.model_sampling as families

    def is_a(*names: str) -> bool:
        known = tuple(getattr(families, name) for name in names if hasattr(families, name))
        return isinstance(model_sampling, known)

    if is_a("EPS", "V_PREDICTION", "EDM", "X0") and not is_a("IMG_TO_IMG"):
        return State(flow=False)
    if is_a("CONST") and not is_a("IMG_TO_IMG_FLOW") and getattr(model_sampling, "noise_scale", 1.0) == 1.0:
        return State(flow=True)
    names = ", ".join(c.__name__ for c in type(model_sampling).__mro__[1:] if c.__module__ == families.__name__)
    raise ValueError(f"the model's parametrisation ({names}) is not supported; eps, v-prediction, EDM and rectified flow are")


# Models in memory ------------------------------------------------------------------------------------------------------


def static_patcher(patcher: Any, what: str) -> Any:
    """The patcher itself, or a twin whose weights stay where they are when the host pages them in and out.

    A paged weight may be gone or overwritten when the backward pass reads it. The host keeps the twin for its next use.
    """
    if not patcher.is_dynamic():
        return patcher
    try:
        return patcher.get_non_dynamic_delegate()
    except RuntimeError as error:
        raise ValueError(
            f"the {what} is under dynamic VRAM and its loader cannot load it again without ({error}). Use ComfyUI's own loader "
            "node, or start ComfyUI with --disable-dynamic-vram"
        ) from error


def backward_memory(model: Any, vae: Any, x: Tensor, image_shape: tuple[int, ...]) -> float:
    """Bytes to ask the host for: its own estimates know nothing of a backward pass.

    Measured on the real architectures: what backward keeps is about 3 times the VAE's estimate for decoding plus twice that
    for encoding, and 10 times the UNet's estimate for one pass; both are never kept at once.
    """
    unet = 10 * model.memory_required([2 * len(x), *x.shape[1:]])
    if vae is None:
        return unet
    autoencoder = 3 * vae.memory_used_decode(tuple(x.shape), vae.vae_dtype) + 2 * vae.memory_used_encode(
        image_shape, vae.vae_dtype
    )
    return max(unet, autoencoder)


@contextlib.contextmanager
def resident(guider: Any, vae: Any, x: Tensor, image_shape: tuple[int, ...]) -> Iterator[torch.nn.Module | None]:
    """Load the diffusion model and the VAE side by side, whole, with normal weights; yield the VAE's network."""
    import comfy.model_management as mm

    before = guider.model_patcher, guider.inner_model
    patcher = static_patcher(guider.model_patcher, "diffusion model")
    # Guider_DualModel leaves its second model out at cfg 1.
    second = guider.uncond_model_patcher if getattr(guider, "uncond_inner", None) is not None else None
    others = [p for p in (second, *control_patchers(guider)) if p is not None]
    if any(p.is_dynamic() for p in others):
        raise ValueError("a second model or ControlNet is under dynamic VRAM; start ComfyUI with --disable-dynamic-vram")
    vae_patcher = None if vae is None else static_patcher(vae.patcher, "VAE")
    patchers = [p for p in (patcher, vae_patcher, *others) if p is not None]
    memory = backward_memory(patcher.model, vae, x, image_shape)
    mm.load_models_gpu(patchers, memory_required=memory, force_full_load=True)
    for network in (*(loaded.model for loaded in patchers), *control_networks(guider)):
        normal_weights(network)
    try:
        if patcher is not before[0]:
            guider.model_patcher, guider.inner_model = patcher, patcher.model
            patcher.pre_run()
        yield None if vae_patcher is None else vae_patcher.model
    finally:
        if patcher is not before[0]:
            patcher.cleanup()
        guider.model_patcher, guider.inner_model = before


def controls(guider: Any) -> set[Any]:
    """The controls on the guider's conditionings, each the head of a chain."""
    return {cond["control"] for group in guider.conds.values() for cond in group if cond.get("control") is not None}


def control_patchers(guider: Any) -> list[Any]:
    """The model patchers of every ControlNet on the guider's conditionings."""
    return [patcher for control in controls(guider) for patcher in control.get_models()]


def control_networks(guider: Any) -> Iterator[torch.nn.Module]:
    """Networks of controls that have no patcher of their own (T2I-Adapter, Control-LoRA), along each chain of controls."""
    for control in controls(guider):
        while control is not None:
            for name in ("control_model", "t2i_model"):
                if isinstance(getattr(control, name, None), torch.nn.Module):
                    yield getattr(control, name)
            control = control.previous_controlnet


# The autoencoder between scaled latents and images in [-1, 1] ----------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Codec:
    """A VAE's network called directly, in the scaled latents the diffusion model works in.

    `VAE.decode` and `VAE.encode` must not be used here: they clamp in place (no gradient where it matters), move the result
    to the CPU, and on lack of memory fall back to tiles without a gradient and without a word.
    """

    network: torch.nn.Module
    latent_format: Any
    device: torch.device
    dtype: torch.dtype

    def decode(self, z: Tensor) -> Tensor:
        """(B, c, h, w) scaled latents -> (B, 3, H, W) in [-1, 1], not clamped."""
        image = self.network.decode(self.latent_format.process_out(z).to(self.device, self.dtype))
        return image.to(z)

    def encode(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, c, h, w) scaled latents: the mean, without sampling."""
        z = self.network.encode(image.to(self.device, self.dtype))
        return self.latent_format.process_in(z.to(image))


def check_vae(vae: Any, latent_format: Any = None) -> None:
    """Refuse a VAE that is missing, is not a picture VAE in [-1, 1], or belongs to another model family."""
    if getattr(vae, "first_stage_model", None) is None:
        raise ValueError("vae: there is no VAE in it; the checkpoint carries none. Load one with Load VAE")
    ratio = getattr(vae, "upscale_ratio", None)
    if vae.latent_dim != 2 or not isinstance(ratio, int):
        raise ValueError("vae: it is a video or audio VAE; a picture VAE (SD 1.x, SD 2.x, SDXL, SD3, Flux) is needed")
    ends = [float(vae.process_input(torch.tensor(value))) for value in (0.0, 1.0)]
    if vae.output_channels != 3 or ends != [-1.0, 1.0]:
        raise ValueError(
            "vae: it does not work on RGB pictures in [-1, 1]; a picture VAE (SD 1.x, SD 2.x, SDXL, SD3, Flux) is needed"
        )
    if latent_format is not None and vae.latent_channels != latent_format.latent_channels:
        raise ValueError(
            f"vae: its latents have {vae.latent_channels} channels, the model's have {latent_format.latent_channels}; "
            "use the VAE that belongs to this model"
        )


def latent_size(vae: Any, in_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(channels, height, width) of the latent whose decoded picture has shape in_shape; refuse a size no latent has."""
    check_vae(vae)
    channels, height, width = in_shape
    ratio = vae.upscale_ratio
    if channels != 3:
        raise ValueError(f"measurement: the restored picture has {channels} channels; this VAE makes RGB pictures, with 3")
    if height % ratio or width % ratio:
        raise ValueError(
            f"measurement: the restored picture would be {width} x {height}, but this VAE makes pictures whose sides are multiples of "
            f"{ratio}. Crop or pad the photo so that they become so, for example {-(-width // ratio) * ratio} x "
            f"{-(-height // ratio) * ratio}; with a downscale operator the photo's own sides are that divided by the factor"
        )
    return vae.latent_channels, height // ratio, width // ratio


def check_sizes(x: Tensor, measurement: Any, vae: Any) -> None:
    """Refuse a latent whose decoded picture is not the one the measurement was made of."""
    in_shape = measurement.operator.in_shape
    expected = tuple(in_shape) if vae is None else latent_size(vae, in_shape)
    if tuple(x.shape[1:]) != expected:
        wanted = (
            f"without a VAE the model must work on pixels, as {expected}. Connect the VAE to the sampler node"
            if vae is None
            else f"the measurement needs {expected}. Take the latent from the Start Latent node"
        )
        raise ValueError(f"latent_image: got {tuple(x.shape[1:])} (channels, height, width), but {wanted}")
    if len(measurement.y) not in (1, len(x)):
        raise ValueError(f"latent_image: got a batch of {len(x)} for a measurement of {len(measurement.y)}; they must be equal")


# The plug-in -----------------------------------------------------------------------------------------------------------


def stock_sampler(solve: Callable[..., Tensor], measurement: Any, vae: Any, **options: Any) -> Any:
    """A ComfyUI SAMPLER that runs `solve`, a sampler of samplers/, on any guider, scheduler and noise.

    Args:
        solve: a k-diffusion function with keywords `measurement` and `autoencoder`.
        measurement: what was observed, on any device.
        vae: a ComfyUI VAE, or None when the model works on pixels.
        options: further keywords of `solve`.
    """
    from comfy.samplers import KSAMPLER

    return KSAMPLER(run_on_host, {"solve": solve, "measurement": measurement, "vae": vae, "options": options})


def run_on_host(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any],
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    *,
    solve: Callable[..., Tensor],
    measurement: Any,
    vae: Any,
    options: dict[str, Any],
) -> Tensor:
    """What KSAMPLER calls: prepare the host, run `solve` in the k-state, give the state back as the host wants it."""
    guider = model.inner_model
    model_options = extra_args["model_options"]
    refuse_unsupported(guider, x, model_options)
    state = state_of(guider.inner_model.model_sampling)
    if vae is not None:
        check_vae(vae, guider.inner_model.latent_format)
    check_sizes(x, measurement, vae)
    image_shape = (len(x), *measurement.operator.in_shape)

    with gradients(), resident(guider, vae, x, image_shape) as network:
        autoencoder = None
        if network is not None:
            autoencoder = Codec(network, guider.inner_model.latent_format, vae.device, vae.vae_dtype)
        for name in ("conds", "_uncond_conds"):  # the second is Guider_DualModel's
            if getattr(guider, name, None) is not None:
                setattr(guider, name, normal_tensors(getattr(guider, name)))
        model.latent_image, model.noise = normal_tensors((model.latent_image, model.noise))
        extra_args = normal_tensors({key: value for key, value in extra_args.items() if key != "model_options"})
        extra_args["model_options"] = differentiable_options(model_options, bool(controls(guider)))
        sigmas_k = state.sigmas_to_k(normal_tensors(sigmas))
        result = solve(
            denoiser(model, state),
            state.to_k(normal_tensors(x), sigmas_k[0]),
            sigmas_k,
            extra_args=extra_args,
            callback=host_callback(callback, state),
            disable=disable,
            measurement=measurement.to(x.device, torch.float32, copy=True),
            autoencoder=autoencoder,
            **options,
        )
        return state.from_k(result, sigmas_k[-1])


def denoiser(model: Any, state: State) -> Callable[..., Tensor]:
    """`model(x, sigma, **extra_args)` -> x0 in the k-state, around the host's model; without a gradient it is an error."""

    def denoise(x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        x_host = state.from_k(x, sigma.reshape(-1, 1, 1, 1))
        denoised = model(x_host, state.sigma_from_k(sigma), **extra_args)
        if x.requires_grad and torch.is_grad_enabled() and not denoised.requires_grad:
            raise ValueError(
                "the model's output has no gradient: a patch or wrapper on the model computes without one; remove it"
            )
        if not bool(torch.isfinite(denoised).all()):
            raise RuntimeError(
                f"the model returned NaN or infinite values at sigma {float(sigma[0]):.4g}; try a lower cfg or another precision"
            )
        return denoised

    return denoise


def host_callback(callback: Callable[[dict[str, Any]], None] | None, state: State) -> Callable[[dict[str, Any]], None]:
    """Progress and previews in the host's state, and a stop within one step when the user cancels."""
    import comfy.model_management as mm

    def report(step: dict[str, Any]) -> None:
        mm.throw_exception_if_processing_interrupted()
        if callback is not None:
            callback({**step, "x": state.from_k(step["x"], step["sigma"])})

    return report


def show_text(node: Any, text: str) -> None:
    """Show a line or more on the node that is running; nothing happens where there is no server (in-process use)."""
    from server import PromptServer

    unique_id = getattr(getattr(node, "hidden", None), "unique_id", None)
    instance = getattr(PromptServer, "instance", None)
    if instance is not None and unique_id is not None:
        instance.send_progress_text(text, unique_id)


# The demo prior --------------------------------------------------------------------------------------------------------


def slim_sd15(unet_state: dict[str, Tensor]) -> Any:
    """A MODEL around ComfyUI's own SD 1.x UNet at another width, with nothing registered in ComfyUI.

    Args:
        unet_state: keys and shapes of an SD 1.x UNet, without a prefix.
    """
    import comfy.model_detection as detection
    import comfy.model_management as mm
    from comfy.model_patcher import ModelPatcher
    from comfy.supported_models import SD15

    class Slim(SD15):
        unet_config = {**SD15.unet_config, "model_channels": unet_state["input_blocks.0.0.weight"].shape[0]}

    config = Slim(detection.detect_unet_config(unet_state, ""))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(unet_state, "", device=mm.unet_offload_device())
    model.load_model_weights(dict(unet_state), "")
    # Never paged: it is small, and then it needs no twin.
    return ModelPatcher(model, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())


def picture_vae(network: torch.nn.Module, taesd_state: dict[str, Tensor]) -> Any:
    """A VAE, float32, around a network with `encode` and `decode` between RGB in [-1, 1] and raw latents.

    Args:
        network: used in place of the one ComfyUI builds.
        taesd_state: a stock TAESD of the same latents, from which ComfyUI sets up everything around the network.
    """
    import comfy.model_management as mm
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

    vae = VAE(sd=taesd_state, dtype=torch.float32)
    # Convolutions this narrow run a third faster in channels_last.
    vae.first_stage_model = network.to(vae.patcher.offload_device, torch.float32, memory_format=torch.channels_last)
    mm.archive_model_dtypes(network)
    vae.patcher = ModelPatcher(network, load_device=vae.device, offload_device=vae.patcher.offload_device)
    return vae


def null_clip(channels: int = 768) -> Any:
    """A CLIP that takes any text and gives zeros: for a model that was trained without text."""
    from comfy.sd import CLIP
    from comfy.sd1_clip import SD1Tokenizer

    class NullText(torch.nn.Module):
        def __init__(self, device: Any, dtype: Any, model_options: dict[str, Any]) -> None:
            super().__init__()
            self.dtypes = {torch.float32}

        def set_clip_options(self, options: dict[str, Any]) -> None:
            pass

        def reset_clip_options(self) -> None:
            pass

        def encode_token_weights(self, tokens: dict[str, list]) -> tuple[Tensor, Tensor]:
            length = sum(len(chunk) for chunk in tokens["l"])
            return torch.zeros((1, length, channels)), torch.zeros((1, channels))

    class Target:
        params: dict[str, Any] = {}
        clip = NullText
        tokenizer = SD1Tokenizer

    return CLIP(Target, model_options={"dtype": torch.float32})
