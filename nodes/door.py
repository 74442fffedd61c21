"""The door of every node: what no node can use is refused here, in words, before it runs.

ComfyUI compares the widgets of a node with their ranges, but nothing that comes over a link.
"""

import functools
import inspect
import logging
from collections.abc import Iterator
from typing import Any

from comfy_api.latest import io

from .host import naming_what_is_missing

log = logging.getLogger("comfyui-posterior")


def guarded(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """Let a node refuse numbers out of range, and say what this ComfyUI lacks."""
    execute = node.execute.__func__
    names = inspect.signature(execute)

    @functools.wraps(execute)
    def checked(cls: type[io.ComfyNode], *args: Any, **kwargs: Any) -> io.NodeOutput:
        given = names.bind_partial(cls, *args, **kwargs).arguments
        with naming_what_is_missing():
            inputs = (cls.SCHEMA or cls.define_schema()).inputs
            for spec in inputs:
                if isinstance(spec, io.DynamicCombo.Input) and spec.id not in given and not spec.optional:
                    choices = ", ".join(option.key for option in spec.options)  # the host drops a choice that it does not know
                    raise ValueError(f"{spec.id}: is missing or not one of {choices}")
            for name, value, low, high in numbers(inputs, given):
                if not low <= value <= high:
                    raise ValueError(f"{name}: got {value}, expected a number from {low} to {high}")
            return execute(cls, *args, **kwargs)

    node.execute = classmethod(checked)
    return node


def numbers(inputs: list[io.Input], given: dict[str, Any]) -> Iterator[tuple[str, float, float, float]]:
    """Name, value and range of every number among what was given, also behind the choices of dynamic inputs."""
    for spec in inputs:
        value = given.get(spec.id)
        if isinstance(spec, io.DynamicCombo.Input):
            for option in spec.options:
                if isinstance(value, dict) and option.key == value.get(spec.id):
                    yield from numbers(option.inputs, value)
        elif isinstance(spec, io.Int.Input | io.Float.Input) and value is not None:
            infinite = float("inf")
            yield spec.id, value, -infinite if spec.min is None else spec.min, infinite if spec.max is None else spec.max


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
