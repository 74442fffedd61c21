"""What cannot be differentiated correctly, refused by name before the first step: a wrong gradient is a wrong picture."""

import itertools
import logging
import sys
from typing import Any

import torch
from torch import Tensor

from ...samplers import State

log = logging.getLogger("comfyui-posterior")


def refuse_unsupported(guider: Any, x: Tensor, model_options: dict[str, Any], network_gradient: bool) -> None:
    """Refuse, before the first step, what would give a wrong gradient or an obscure error.

    Args:
        network_gradient: whether a gradient goes through the diffusion network. Without it the host's own way to call it will do.
    """
    if x.ndim != 4:
        raise ValueError(
            f"latent_image: has {x.ndim} dimensions {tuple(x.shape)}; only pictures, (batch, channels, height, width), work"
        )
    if not bool(torch.isfinite(x).all()):
        raise ValueError("latent_image: has NaN or infinite values, or its noise has; the node before it went wrong")
    check_prompts(guider)
    if not network_gradient:
        return
    conds = [cond for group in guider.conds.values() for cond in group]
    if len({cond.get("hooks") for cond in conds}) > 1:
        raise ValueError(
            "positive, negative: they carry different hooks (for example a LoRA on the positive prompt only). Their weights are swapped "
            "between the two network passes, which makes the gradient wrong. Apply the LoRA to the model, or the same hook to "
            "every conditioning"
        )
    if len(model_options.get("multigpu_clones", {})) > 1:
        raise ValueError(
            "model: it is split over several GPUs, where ComfyUI computes without gradients; remove the multi-GPU node"
        )
    if "easycache" in model_options.get("transformer_options", {}):  # LazyCache goes by the same name
        raise ValueError(
            "model: EasyCache or LazyCache is on it, which skips network calls, and with them the gradient; remove it"
        )
    if model_options.get("context_handler") is not None:
        raise ValueError(
            "model: context windows are active on it, and have not been proved to have a gradient; remove that node"
        )
    transformer = model_options.get("transformer_options", {})
    patches = [patch for group in transformer.get("patches", {}).values() for patch in group]
    if any("tomesd" in (getattr(patch, "__module__", None) or "") for patch in patches):
        log.warning("Token merging is active: its choice of tokens is not differentiable, so the guidance is only approximate.")


def check_falling(sigmas: Tensor) -> None:
    """Refuse noise levels that rise, as the host has them: the samplers go down."""
    if bool((sigmas[:-1] < sigmas[1:]).any()):
        raise ValueError(f"sigmas: got {[round(s, 4) for s in sigmas.tolist()]}, expected noise levels that fall; flip them")


def check_prompts(guider: Any) -> None:
    """Refuse a prompt with NaN, or of another family's text encoder, as far as the model's configuration tells its own."""
    for kind, group in guider.conds.items():
        # Guider_DualModel gives its second model, which it leaves out at cfg 1, the negative prompt.
        second = getattr(guider, "uncond_model_patcher", None) if kind == "negative" else None
        config = (guider.inner_model if second is None else second.model).model_config.unet_config
        embedder = (config.get("context_embedder_config") or {}).get("params", {})
        width = config.get("context_dim") or embedder.get("in_features")
        for cond in group:
            conds = {name: getattr(part, "cond", None) for name, part in cond.get("model_conds", {}).items()}
            # Masks of attention hold -inf on purpose.
            if any(bool(torch.isnan(part).any()) for part in conds.values() if isinstance(part, Tensor)):
                raise ValueError(f"{kind}: has NaN values; the node that encoded the prompt, or its CLIP, went wrong")
            text = conds.get("c_crossattn")
            if isinstance(width, int) and isinstance(text, Tensor) and text.shape[-1] != width:
                raise ValueError(
                    f"{kind}: the prompt was encoded for another family of models: its vectors have {text.shape[-1]} numbers, this "
                    f"model's have {width}. Encode it with the CLIP that belongs to the model"
                )


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
    raise ValueError(f"model: its parametrisation ({names}) is not supported; eps, v-prediction, EDM and rectified flow are")


def check_attention(network: torch.nn.Module, options: dict[str, Any]) -> None:
    """Refuse a diffusion network whose attention has no gradient even under the override, trying each kernel that it calls.

    Args:
        options: transformer_options of the run.
    """
    homes = {type(module).__module__ for module in network.modules()}
    for home, name in itertools.product(sorted(homes), ("optimized_attention", "optimized_attention_masked")):
        kernel = getattr(sys.modules.get(home), name, None)
        if not callable(kernel):
            continue
        q, k, v = (torch.ones(1, 4, 8, requires_grad=True) for _ in range(3))
        try:
            found = kernel(q, k, v, 1, transformer_options=dict(options)).requires_grad
            why = "has no gradient"
        # As a kernel that takes nothing but half precision on a GPU; what the host lacks is named elsewhere.
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            found, why = False, f"fails on three small tensors ({error})"
        if not found:
            raise ValueError(
                f"model: its attention ({getattr(kernel, '__qualname__', kernel)}, in {home}) {why} and cannot be overridden. Remove the "
                "node that patched it, or start ComfyUI with --use-pytorch-cross-attention"
            )
