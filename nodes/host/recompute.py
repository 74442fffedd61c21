"""Trading time for memory: activations computed again in the backward pass instead of kept.

Three modes, from quick to small, with the same gradient:

    fastest   every activation of network, decoder and encoder is kept until the backward pass
    balanced  only what goes into each of their blocks is kept; a block is computed again when its turn comes
    lowest    not even that: one network at a time is computed again, block by block
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

MODES = ("fastest", "balanced", "lowest")


def blocks(network: nn.Module) -> list[nn.Module]:
    """The modules worth computing again one at a time: residual blocks, transformer blocks, resamplings.

    They are what containers are made of, in any architecture: a module with parts of its own, none of them a ModuleList.
    """
    found = []
    for child in network.children():
        has_list = any(isinstance(part, nn.ModuleList) for part in child.modules())
        group = isinstance(child, nn.Sequential | nn.ModuleList) or type(child).forward is nn.Module.forward
        if group or has_list:
            found += blocks(child)
        elif any(True for _ in child.children()):
            found.append(child)
    return found


@contextlib.contextmanager
def replaced_forwards(modules: list[nn.Module], wrap: Callable[[Callable], Callable]) -> Iterator[None]:
    """Give these instances another `forward`, for a while; classes stay as they are."""
    before = {module: module.__dict__.get("forward") for module in modules}
    try:
        for module in before:
            module.forward = wrap(module.forward)
        yield
    finally:
        for module, own in before.items():
            module.__dict__.pop("forward", None)
            if own is not None:  # some other extension's
                module.forward = own


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function; with a gradient it keeps its inputs only, and runs again in the backward pass.

    Networks write into the dicts they are given ("block_index" in transformer_options) and take controls off their lists, so
    each run gets a copy of its own.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        args, kwargs = _own(args), _own(kwargs)
        first, failure = True, None

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal first, failure
            if not first:
                return function(*_own(args), **_own(kwargs))
            first = False
            try:
                return function(*_own(args), **_own(kwargs))
            except BaseException as error:
                # PyTorch takes its hooks off only after a return; left on, they would spoil every later graph.
                failure = error
                return None

        result = checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        try:
            if failure is not None:
                raise failure
            return result
        finally:
            failure = None  # its traceback holds this frame, and with it tensors

    return call


def _own(arguments: Any) -> Any:
    """A copy of the tuple or dict of arguments, of the dicts among them, and of the lists in these."""
    if isinstance(arguments, tuple):
        return tuple(_own(value) if isinstance(value, dict) else value for value in arguments)
    copied = {}
    for key, value in arguments.items():
        if isinstance(value, dict):
            value = {k: list(v) if type(v) is list else v for k, v in value.items()}
        copied[key] = list(value) if type(value) is list else value
    return copied


@contextlib.contextmanager
def recomputing(mode: str, networks: list[nn.Module], vae: nn.Module | None) -> Iterator[None]:
    """Inside, calls of these networks keep what `mode` says.

    Args:
        networks: diffusion networks and controls, called as modules.
        vae: its network, whose `encode` and `decode` are for the codec to wrap.
    """
    modules: list[nn.Module] = []
    if mode != "fastest":
        modules = [block for network in (*networks, vae) if network is not None for block in blocks(network)]
    if mode == "lowest":
        modules += networks
    with replaced_forwards(modules, recomputed):
        yield
