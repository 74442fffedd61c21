"""What the server says about the pack: its nodes, their texts, its templates."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from support.host_versions import needs
from support.server_prompts import ROOT, TEMPLATES

from dev.make_templates import WIDGETS, flat_inputs, render
from dev.server import PACK, Server

Info = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def object_info(server: Server) -> Info:
    return server.get_json("/object_info")


@pytest.fixture(scope="module")
def own(object_info: Info) -> Info:
    return {name: node for name, node in object_info.items() if node["python_module"] == f"custom_nodes.{PACK}"}


def described(specs: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every input with its options, and those behind every choice of a dynamic one; not ComfyUI's hidden ones."""
    for group in ("required", "optional"):
        for name, spec in specs.get(group, {}).items():
            options = spec[1] if len(spec) > 1 else {}
            yield name, options
            if spec[0] == "COMFY_DYNAMICCOMBO_V3":
                for choice in options["options"]:
                    yield from described(choice["inputs"])


def test_loads(server: Server) -> None:
    failures = [line for line in server.log.read_text().splitlines() if "IMPORT FAILED" in line or "Cannot import" in line]
    assert not any(f"custom_nodes/{PACK}" in line for line in failures), failures


def test_every_node_is_there(own: Info) -> None:
    written = re.findall(r'node_id="(\w+)"', "".join(path.read_text() for path in (ROOT / "nodes").rglob("*.py")))
    assert len(written) >= 9
    assert sorted(own) == sorted(written)


def test_every_text_is_there(own: Info) -> None:
    for name, node in own.items():
        assert node["display_name"] != name
        assert node["description"], name
        assert node["category"].split("/")[0] == "posterior", name
        assert node["search_aliases"], name
        for title, options in described(node["input"]):
            assert options.get("tooltip"), f"{name}, input {title}"
        assert len(node["output_tooltips"]) == len(node["output"]), name
        for title, tooltip in zip(node["output_name"], node["output_tooltips"], strict=True):
            assert tooltip, f"{name}, output {title}"


def test_templates_are_offered(server: Server) -> None:
    assert sorted(server.get_json("/workflow_templates")[PACK]) == TEMPLATES
    for name in TEMPLATES:
        offered = server.get_json(f"/api/workflow_templates/{PACK}/{name}.json")
        assert offered == json.loads((ROOT / "workflows" / f"{name}.json").read_text())


def test_templates_are_up_to_date(object_info: Info) -> None:
    needs(bool(object_info["PreviewImage"]["output"]), "such stock nodes as the templates were drawn with")
    files = render(object_info)
    written = {path for folder in ("workflows", "workflows/api", "subgraphs") for path in (ROOT / folder).glob("*.json")}
    assert set(files) == written
    for path, text in files.items():
        assert path.read_text() == text, f"{path.relative_to(ROOT)}: run `python dev/make_templates.py`"


@pytest.mark.parametrize("workflow", TEMPLATES)
def test_api_twins_fit_the_nodes(workflow: str, object_info: Info) -> None:
    prompt = json.loads((ROOT / "workflows" / "api" / f"{workflow}.json").read_text())
    for node in prompt.values():
        place = f"{workflow}, {node['_meta']['title']}"
        assert node["class_type"] in object_info, place
        specs = object_info[node["class_type"]]["input"]
        known = {name: kind for name, kind, _ in flat_inputs(specs, node["inputs"])}
        assert set(specs.get("required", {})) <= set(node["inputs"]) <= set(known), place
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                source = object_info[prompt[value[0]]["class_type"]]
                assert source["output"][value[1]] == known[name], f"{place}, {name}"
            else:
                assert known[name] in WIDGETS, f"{place}, {name}: must be linked"


@pytest.mark.parametrize("workflow", TEMPLATES)
def test_templates_are_laid_out(workflow: str) -> None:
    """Links run from left to right, and nodes with their title bars do not touch."""
    graph = json.loads((ROOT / "workflows" / f"{workflow}.json").read_text())
    nodes = {node["id"]: node for node in graph["nodes"]}
    for _, source, _, target, _, _ in graph["links"]:
        assert nodes[source]["pos"][0] + nodes[source]["size"][0] < nodes[target]["pos"][0]
    title = 30
    boxes = [(x, y - title, x + w, y + h) for (x, y), (w, h) in ((node["pos"], node["size"]) for node in graph["nodes"])]
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


def test_a_checkpoint_can_stand_in_for_the_demo_prior(object_info: Info) -> None:
    """Swapping the loader keeps every link: the same outputs in the same order."""
    demo, checkpoint = (object_info[name] for name in ("PosteriorLoadDemoPrior", "CheckpointLoaderSimple"))
    assert demo["output"] == checkpoint["output"]
    assert demo["output_name"] == checkpoint["output_name"]
