"""Nodes as ComfyUI reads them: what shared workflows rely on stays, and every word for the user is there."""

import inspect
import json
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from support.schemas import FILE, nodes, schemas

KNOBS = 5  # that a node shows at most before "advanced" is opened


@pytest.fixture(scope="module")
def all_nodes(pack: ModuleType) -> dict[str, Any]:
    return nodes(pack)


def every_input(inputs: list[Any]) -> Iterator[Any]:
    """The inputs, and those behind every choice of a dynamic one."""
    for spec in inputs:
        yield spec
        for option in getattr(spec, "options", None) or ():
            if not isinstance(option, str):
                yield from every_input(option.inputs)


def test_schemas_are_those_that_shared_workflows_were_saved_with(pack: ModuleType) -> None:
    kept, found = json.loads(FILE.read_text()), schemas(pack)
    changed = {name for name in kept.keys() | found.keys() if kept.get(name) != found.get(name)}
    message = "changed against tests/schemas.json; if nothing that was there is renamed, retyped, moved or gone: run `python tests/support/schemas.py`"
    assert not changed, f"{sorted(changed)} {message}"


def test_execute_takes_what_the_schema_says(all_nodes: dict[str, Any]) -> None:
    for name, node in all_nodes.items():
        inputs = {spec.id: spec for spec in node.define_schema().inputs}
        parameters = inspect.signature(node.execute).parameters
        assert set(parameters) == set(inputs), name
        for key, spec in inputs.items():
            # ComfyUI leaves out an optional input that is not given.
            has_default = parameters[key].default is not inspect.Parameter.empty
            assert has_default == bool(spec.optional), f"{name}, {key}"
            if spec.optional and hasattr(spec, "default"):
                assert parameters[key].default == spec.default, (
                    f"{name}, {key}: one default on the node and another for scripts"
                )


def test_other_methods_take_inputs_of_the_schema(all_nodes: dict[str, Any]) -> None:
    for name, node in all_nodes.items():
        for method in ("fingerprint_inputs", "validate_inputs"):
            if method in vars(node):
                parameters = inspect.signature(getattr(node, method)).parameters.values()
                named = {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}
                assert named <= {spec.id for spec in node.define_schema().inputs}, name


def test_comfyui_accepts_every_schema(all_nodes: dict[str, Any]) -> None:
    for name, node in all_nodes.items():
        assert node.GET_SCHEMA().node_id == name  # it checks what it hands out


def test_every_node_says_what_it_is_for(all_nodes: dict[str, Any]) -> None:
    names = []
    for name, node in all_nodes.items():
        schema = node.define_schema()
        names.append(schema.display_name)
        assert name.startswith("Posterior"), name
        assert schema.category == "posterior" or schema.category.startswith("posterior/"), name
        assert schema.description.endswith("."), name
        assert schema.search_aliases, name
    assert len(set(names)) == len(names)


def test_every_input_and_output_has_a_tooltip(all_nodes: dict[str, Any]) -> None:
    for name, node in all_nodes.items():
        schema = node.define_schema()
        for spec in (*every_input(schema.inputs), *schema.outputs):
            assert spec.tooltip, f"{name}, {spec.id}"
            assert spec.tooltip.endswith("."), f"{name}, {spec.id}: {spec.tooltip}"


def test_the_words_people_search_for_lead_somewhere(all_nodes: dict[str, Any]) -> None:
    known = {alias.lower() for node in all_nodes.values() for alias in node.define_schema().search_aliases}
    wanted = {"deblur", "upscale", "super resolution", "inpaint", "destripe", "denoise", "colorize", "restore"}
    assert wanted <= known


def shown(inputs: list[Any]) -> int:
    """How many widgets a node shows, with the choice that has most of them."""
    count = 0
    for spec in inputs:
        if spec.io_type == "COMFY_DYNAMICCOMBO_V3":
            count += 1 + max(shown(option.inputs) for option in spec.options)
        elif hasattr(spec, "default"):  # a widget, not a socket
            count += not spec.advanced
    return count


def test_a_node_shows_few_knobs(all_nodes: dict[str, Any]) -> None:
    for name, node in all_nodes.items():
        assert shown(node.define_schema().inputs) <= KNOBS, name
