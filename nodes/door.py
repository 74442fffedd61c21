"""The door of every node: what no node can use is refused here, in words, before it runs.

ComfyUI compares the widgets of a node with their ranges, but nothing that comes over a link.
"""

import functools
import inspect
import logging
import math
import numbers
from collections.abc import Iterator
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..operators import Measurement
from .host import naming_lack_of_memory, naming_what_is_missing
from .types import OperatorRecipe

log = logging.getLogger("comfyui-posterior")
KINDS = {  # of what comes over a link; ComfyUI lets outputs of any type be connected, and a name of a type is anybody's
    "IMAGE": Tensor,
    "MASK": Tensor,
    "LATENT": dict,
    "CONDITIONING": list,
    "LINEAR_OPERATOR": OperatorRecipe,
    "MEASUREMENT": Measurement,
}
LISTED_ANEW = ("file", "scheduler")  # choices that grow while ComfyUI runs; their nodes look at them themselves


def guarded(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """Let a node refuse what no node can use, and say what this ComfyUI lacks."""
    execute = node.execute.__func__
    names = inspect.signature(execute)

    @functools.wraps(execute)
    def checked(cls: type[io.ComfyNode], *args: Any, **kwargs: Any) -> io.NodeOutput:
        given = names.bind_partial(cls, *args, **kwargs).arguments
        with naming_what_is_missing(), naming_lack_of_memory():
            for spec, value in each((cls.SCHEMA or cls.define_schema()).inputs, given):
                refuse_unusable(spec, value)
            return execute(cls, *args, **kwargs)

    node.execute = classmethod(checked)
    return node


def each(inputs: list[io.Input], given: dict[str, Any]) -> Iterator[tuple[io.Input, Any]]:
    """Every input with its value, among what was given, also behind the choices of dynamic inputs."""
    for spec in inputs:
        value = given.get(spec.id)
        if isinstance(spec, io.DynamicCombo.Input):
            choices = {option.key: option for option in spec.options}
            chosen = value.get(spec.id) if isinstance(value, dict) else None
            if chosen in choices:
                yield from each(choices[chosen].inputs, value)
            elif spec.id in given or not spec.optional:  # the host drops a choice that it does not know
                raise ValueError(f"{spec.id}: is missing or not one of {', '.join(choices)}")
        elif spec.id in given:
            yield spec, value


def refuse_unusable(spec: io.Input, value: Any) -> None:
    """Refuse nothing where something is needed, an empty prompt, a choice that there is not, and a number out of range."""
    widget = isinstance(spec, io.WidgetInput)
    if value is None:
        # A VAE's own check says where to get one.
        if widget or not (spec.optional or isinstance(spec, io.Vae.Input)):
            start = "Set" if widget else "Connect"
            raise ValueError(f"{spec.id}: got nothing. {start} it; if it is connected, the node before it gave nothing")
    elif (kind := KINDS.get(spec.io_type)) and not isinstance(value, kind):
        raise ValueError(
            f"{spec.id}: got a {type(value).__name__}, expected {spec.io_type}; connect an output of that kind, another pack may use its name"
        )
    elif spec.io_type == "MODEL" and not hasattr(value, "get_model_object"):
        raise ValueError(
            f"{spec.id}: got a {type(value).__name__}, expected MODEL; connect Load Checkpoint or Load Diffusion Model"
        )
    elif spec.io_type == "LATENT" and not isinstance(value.get("samples"), Tensor):
        raise ValueError(f"{spec.id}: has no samples; connect Start Latent or another node that gives a LATENT")
    elif isinstance(spec, io.Conditioning.Input) and len(value) == 0:
        raise ValueError(f"{spec.id}: is empty, the node before it gave no prompt. Connect a CLIP Text Encode node")
    elif isinstance(spec, io.Combo.Input) and spec.id not in LISTED_ANEW and value not in spec.options:
        raise ValueError(f"{spec.id}: got {str(value)[:80]!r}, expected one of {', '.join(map(str, spec.options))}")
    elif isinstance(spec, io.Int.Input | io.Float.Input):
        whole = isinstance(spec, io.Int.Input)
        if not isinstance(value, numbers.Integral if whole else numbers.Real):
            raise ValueError(f"{spec.id}: got {str(value)[:80]!r}, expected a {'whole ' if whole else ''}number")
        low, high = (-math.inf if spec.min is None else spec.min), (math.inf if spec.max is None else spec.max)
        if not low <= value <= high:
            raise ValueError(f"{spec.id}: got {value}, expected a number from {low} to {high}")


def usable(nodes: list[type[io.ComfyNode]]) -> list[type[io.ComfyNode]]:
    """The nodes that this ComfyUI can describe; the others are left out, with a line in the log."""
    found = []
    for node in nodes:
        try:
            with naming_what_is_missing():
                node.define_schema()
        except ValueError as error:
            log.error("node %s is not available: %s", node.__name__, error)
        else:
            found.append(node)
    return found
