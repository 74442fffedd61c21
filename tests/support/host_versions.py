"""Tests of what older ComfyUIs do not have."""

import inspect
import os
from types import ModuleType

import pytest


def needs(present: bool, what: str) -> None:
    """Skip a test of something that this ComfyUI does not have yet. The one that `make test` takes has everything."""
    if not present:
        named = os.environ.get("COMFYUI_VERSION") or os.environ.get("COMFYUI_DIR")
        (pytest.skip if named else pytest.fail)(f"this ComfyUI has no {what}")


def narrow_decoders() -> bool:
    """Whether the loader finds the width of a KL decoder, and does not take the stock one for granted."""
    import comfy.ldm.models.autoencoder as autoencoders

    return "decoder_ddconfig" in inspect.getsource(autoencoders)


def nodes_custom_sampler() -> ModuleType:
    import comfy_extras.nodes_custom_sampler

    return comfy_extras.nodes_custom_sampler
