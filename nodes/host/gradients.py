"""Autograd inside ComfyUI: leaving inference mode, normal weights, and model calls that have a gradient."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .internals import without


@contextlib.contextmanager
def gradients(wanted: bool = True) -> Iterator[None]:
    """Run with autograd inside ComfyUI's inference mode; some model families also switch off fused in-place kernels.

    Args:
        wanted: False, inside another, for what has no gradient: ComfyUI as it is for its own samplers.
    """
    import comfy.model_management as mm

    switch = {name: getattr(mm, name) for name in ("in_training",) if hasattr(mm, name)}
    vars(mm).update(dict.fromkeys(switch, wanted))
    try:
        with torch.inference_mode(not wanted), torch.set_grad_enabled(wanted):
            yield
    finally:
        vars(mm).update(switch)


def normal_weights(module: torch.nn.Module, role: str = "model") -> int:
    """Replace inference-mode parameters and buffers by normal tensors on the same storage; no copy is made.

    Must run outside inference mode, after the last model load of a run (patching a LoRA makes inference tensors again).
    The shared module stays usable everywhere else: the numbers are the same memory.

    Args:
        role: the input that the module came in by, for the error.

    Returns:
        How many tensors were replaced.

    Raises:
        ValueError: quantised weights, whose gradient is wrong.
    """
    quantised: tuple[type, ...] = ()
    with without("telling quantised weights, whose gradient is wrong"):
        from comfy.quant_ops import QuantizedTensor

        quantised = (QuantizedTensor,)
    assert not torch.is_inference_mode_enabled(), "aliases made in inference mode would be inference tensors again"
    replaced = 0
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, old in tensors.items():
                if isinstance(old, quantised):
                    raise ValueError(
                        f"{role}: the weights of {type(module).__name__} are quantised ({type(old).__name__}, at {name}), which has no "
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
    replacements = transformer.get("patches_replace", {})
    transformer["patches_replace"] = {
        kind: {place: _with_gradient(f"{kind} {place}", patch) for place, patch in patches.items()}
        for kind, patches in replacements.items()
    }
    return options


def _with_gradient(name: str, patch: Callable[..., Any]) -> Callable[..., Any]:
    """A replacement of an attention or a block by some other node, which must not cut the gradient off."""

    def call(*args: Any, **kwargs: Any) -> Any:
        result = patch(*args, **kwargs)
        needed = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _tensors((args, kwargs)))
        if needed and not any(tensor.requires_grad for tensor in _tensors(result)):
            raise ValueError(
                f"model: a node replaces {name} by {getattr(patch, '__qualname__', type(patch).__name__)}, which has no "
                "gradient; remove that node"
            )
        return result

    return call


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _tensors(value)
