"""Models in memory: what has a gradient whole, with normal weights, and as a twin where the host pages it; the rest as ever."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .faults import of_main_memory
from .gradients import normal_weights
from .memory import GIB, out_of_memory


@dataclass(frozen=True)
class Loaded:
    """What a run works with.

    Attributes:
        vae: the VAE's network, or None.
        networks: diffusion networks and ControlNets, as they are called.
    """

    vae: torch.nn.Module | None
    networks: list[torch.nn.Module]


def static_patcher(patcher: Any, what: str) -> Any:
    """The patcher itself, or a twin whose weights stay where they are when the host pages them in and out.

    A paged weight may be gone or overwritten when the backward pass reads it. The host keeps the twin for its next use.
    """
    if not paged(patcher):
        return patcher
    try:
        return patcher.get_non_dynamic_delegate()
    except RuntimeError as error:
        raise ValueError(
            f"{what}: is under dynamic VRAM and its loader cannot load it again without ({error}). Use ComfyUI's own loader "
            "node, or start ComfyUI with --disable-dynamic-vram"
        ) from error


def paged(patcher: Any) -> bool:
    """Whether the host pages the weights of a patcher."""
    return hasattr(patcher, "is_dynamic") and patcher.is_dynamic()


def static_control(control: Any, model: Any) -> Any:
    """The control itself, or when the host pages its weights, or those of one it follows, a copy of the chain that stays."""
    import comfy.model_management as mm

    if control is None or not any(paged(patcher) for patcher in control.get_models()):
        return control
    stuck = ValueError(
        f"the {type(control).__name__} is under dynamic VRAM and cannot be copied out of it; start ComfyUI with "
        "--disable-dynamic-vram"
    )
    if not hasattr(control, "deepclone_multigpu"):
        raise stuck
    previous = static_control(control.previous_controlnet, model)
    twin = control.copy()
    for patcher in filter(paged, control.get_models_only_self()):
        # No loader remembers where a ControlNet came from. The host's own copy for another device has a plain patcher.
        mm.unload_model_and_clones(patcher)
        twin = control.deepclone_multigpu(patcher.load_device)
        if any(paged(patcher) or _incomplete(patcher.model) for patcher in twin.get_models_only_self()):
            raise stuck
    twin.set_previous_controlnet(previous)
    twin.pre_run(model, model.model_sampling.percent_to_sigma)
    return twin


def _incomplete(network: torch.nn.Module) -> bool:
    return any(weight.is_meta for weight in network.parameters())


@contextlib.contextmanager
def resident(guider: Any, vae: Any, memory: float, least: float, network_gradient: bool = True) -> Iterator[Loaded]:
    """Load everything that a guider and a VAE run, side by side; whole, with normal weights, what must have a gradient.

    Args:
        memory: bytes that the run would like beside the weights, for the host to make room.
        least: bytes that it needs beside them, and that a diffusion model which may be in parts leaves free.
        network_gradient: False where only the VAE must have one. The host then loads the diffusion model as for any sampler: it
            may be quantised, paged, or in parts on the device.
    """
    import comfy.model_management as mm

    before = {name: value for name, value in vars(guider).items() if name in _SWAPPED}
    twins: list[Any] = []

    def stay(patcher: Any, what: str) -> Any:
        twin = static_patcher(patcher, what) if network_gradient else patcher
        if twin is not patcher:
            twins.append(twin)
        return twin

    stays: dict[Any, Any] = {}
    try:
        patchers = [stay(guider.model_patcher, "model")]
        guider.model_patcher, guider.inner_model = patchers[0], patchers[0].model
        # Guider_DualModel leaves its second model out at cfg 1.
        if getattr(guider, "uncond_inner", None) is not None:
            patchers.append(stay(guider.uncond_model_patcher, "model (the second one)"))
            guider.uncond_model_patcher, guider.uncond_inner = patchers[1], patchers[1].model
        called = [patcher.model.diffusion_model for patcher in patchers]
        for control in controls(guider):
            stays[control] = static_control(control, guider.inner_model) if network_gradient else control
            patchers += stays[control].get_models()
        _replace_controls(guider, stays)
        vae_patcher = None if vae is None else static_patcher(vae.patcher, "vae")
        whole = [] if vae_patcher is None else [vae_patcher]
        if network_gradient:
            whole = patchers + whole
        else:
            # Before the VAE, and leaving the room that the host counts for it: a load may put out what is there, and the VAE must
            # end whole.
            beside = 1.1 * sum(patcher.model_size() for patcher in whole) + max(least, mm.minimum_inference_memory())
            mm.load_models_gpu(patchers, memory_required=memory + beside, minimum_memory_required=beside)
        if whole:
            _load_whole(whole, memory if network_gradient else least)
        for twin in twins:
            twin.pre_run()
        of_controls = list(control_networks(guider))
        called += of_controls
        for network in (*(patcher.model for patcher in whole), *(called if network_gradient else [])):
            of_vae = vae_patcher is not None and network is vae_patcher.model
            normal_weights(network, "vae" if of_vae else "positive, negative" if network in of_controls else "model")
        yield Loaded(None if vae_patcher is None else vae_patcher.model, list(dict.fromkeys(called)))
    finally:
        for twin in twins:
            twin.cleanup()
        for control, stay_control in stays.items():
            if stay_control is not control:
                stay_control.cleanup()
        vars(guider).update(before)


def _load_whole(patchers: list[Any], memory: float) -> None:
    import comfy.model_management as mm

    try:
        mm.load_models_gpu(patchers, memory_required=memory, force_full_load=True)
    except Exception as error:
        if not out_of_memory(error) or of_main_memory(error):
            raise
        weights = sum(patcher.model_size() for patcher in patchers) / GIB
        remedy = "C-PiGDM loads only the VAE so; " if len(patchers) > 1 else ""
        raise torch.cuda.OutOfMemoryError(
            f"memory: what has a gradient must be loaded whole, here {weights:.1f} GB of weights, for which there is no room ({error}). "
            f"{remedy}smaller models, or such in float16, need less"
        ) from error


_SWAPPED = ("model_patcher", "inner_model", "uncond_model_patcher", "uncond_inner", "conds", "_uncond_conds")


def controls(guider: Any) -> set[Any]:
    """The controls on the guider's conditionings, each the head of a chain."""
    return {cond["control"] for group in guider.conds.values() for cond in group if cond.get("control") is not None}


def control_networks(guider: Any) -> Iterator[torch.nn.Module]:
    """The networks of the guider's controls, along each chain; some (T2I-Adapter, Control-LoRA) have no patcher of their own."""
    for control in controls(guider):
        while control is not None:
            for name in ("control_model", "t2i_model"):
                if isinstance(getattr(control, name, None), torch.nn.Module):
                    yield getattr(control, name)
            control = control.previous_controlnet


def _replace_controls(guider: Any, stays: dict[Any, Any]) -> None:
    def replaced(group: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**cond, "control": stays[cond["control"]]} if cond.get("control") in stays else cond for cond in group]

    guider.conds = {kind: replaced(group) for kind, group in guider.conds.items()}
    if getattr(guider, "_uncond_conds", None) is not None:
        guider._uncond_conds = replaced(guider._uncond_conds)
