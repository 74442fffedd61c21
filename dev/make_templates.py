"""Write workflows/*.json (templates, the front end's format), workflows/api/*.json (for scripts) and subgraphs/*.json (blueprints).

All of them come from one description, dev/templates.py. The inputs of a node, their order and defaults come from the running
server, so that every format agrees with the nodes as they are; a test runs this again and compares.
`python dev/make_templates.py` after changing a template or a node.
"""

import itertools
import json
import sys
import uuid
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from dev.graphs import Blueprint, Node, Template  # noqa: E402
from dev.templates import BLUEPRINTS, TEMPLATES  # noqa: E402

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
# Pixels. GAP holds the title bar of the lower node and, above it, the badge with the name of its pack.
SPACE, GAP = 50, 62
WIDTH, WIDE = 250, {"PosteriorConsistency": 400, "PosteriorCompare": 400}  # these show three pictures side by side
# What the front end needs for a slot and a widget, and at most for a text field.
SLOT, WIDGET, TEXT = 20, 24, 90
# What a node grows by when it has run: a picture of its own, or a picture with a text over it.
PICTURE, SHOWN, READOUT = 250, 215, 275
GROWS = {
    **dict.fromkeys(("LoadImage", "PreviewImage", "SaveImage"), PICTURE),
    **{f"Posterior{name}": SHOWN for name in ("Mask", "Downscale", "Blur", "Grayscale", "Identity", "Uncertainty")},
    **{f"PosteriorEstimate{name}": READOUT for name in ("Noise", "Stripes", "Blur")},
    **{f"Posterior{name}": READOUT for name in ("MeasureSimulate", "MeasurementFromPhoto", "CombineMeasurements")},
    **{f"Posterior{name}": READOUT for name in ("LoadMeasurement", "SamplerPSLD", "SamplerCPiGDM", "Restore")},
    **{f"Posterior{name}": READOUT for name in ("Finish", "Consistency", "Compare", "MemoryEstimate", "SaveMeasurement")},
    "PreviewAny": SHOWN,
}
SUBGRAPH_INPUT, SUBGRAPH_OUTPUT = -10, -20  # the front end's ids for the two edges of a subgraph

Info = dict[str, Any]


def flat_inputs(specs: Info, values: dict[str, Any], prefix: str = "") -> list[tuple[str, str, dict[str, Any]]]:
    """(name, type, options) of every input in the order the front end shows them, following the chosen dynamic options."""
    flat = []
    for group in ("required", "optional"):
        for name, spec in specs.get(group, {}).items():
            kind, options = spec[0], spec[1] if len(spec) > 1 else {}
            if isinstance(kind, list):
                kind, options = "COMBO", {"options": kind, **options}
            flat.append((prefix + name, kind, options))
            if kind == "COMFY_DYNAMICCOMBO_V3":
                chosen = values.get(prefix + name, options["options"][0]["key"])
                inner = next(option["inputs"] for option in options["options"] if option["key"] == chosen)
                flat += flat_inputs(inner, values, f"{prefix}{name}.")
    return flat


def default(kind: str, options: dict[str, Any]) -> Any:
    if kind == "COMFY_DYNAMICCOMBO_V3":
        return options["options"][0]["key"]
    if kind == "COMBO":
        return options["default"] if "default" in options else options["options"][0]
    return options.get("default", {"STRING": "", "BOOLEAN": False}.get(kind, 0))


def complete(node: Node, info: Info) -> dict[str, Any]:
    """A node's links and the values of all its widgets, in the order of its schema."""
    known = flat_inputs(info["input"], node.inputs)
    unknown = set(node.inputs) - {name for name, _, _ in known}
    assert not unknown, f"{node.title}: {node.type} has no input {unknown}"
    given = {}
    for name, kind, options in known:
        if name in node.inputs:
            given[name] = node.inputs[name]
        elif kind in WIDGETS:
            given[name] = default(kind, options)
    return given


def numbered(nodes: list[Node]) -> dict[str, int]:
    ids = {node.title: i + 1 for i, node in enumerate(nodes)}
    assert len(ids) == len(nodes), "titles must be unique: scripts find nodes by them"
    return ids


def api_format(template: Template, object_info: Info) -> dict[str, Any]:
    ids = numbered(template.nodes)

    def value(v: Any) -> Any:
        return [str(ids[v[0]]), v[1]] if isinstance(v, tuple) else v

    return {
        str(ids[node.title]): {
            "inputs": {name: value(v) for name, v in complete(node, object_info[node.type]).items()},
            "class_type": node.type,
            "_meta": {"title": node.title},
        }
        for node in template.nodes
    }


def laid_out(nodes: list[Node], object_info: Info, sockets: tuple[str, ...] = ()) -> tuple[list[Info], list[list[Any]]]:
    """Nodes and links in the front end's format. `sockets` are the inputs of the subgraph around them."""
    ids = numbered(nodes)
    entries, links = [], []
    outgoing: dict[tuple[int, int], list[int]] = {}
    columns = [
        [WIDE.get(node.type, WIDTH) for node in nodes if node.column == i] for i in range(1 + max(n.column for n in nodes))
    ]
    left = list(itertools.accumulate((max(widths) + SPACE for widths in columns), initial=0))
    below: dict[int, int] = {}  # where the next node of a column goes
    for order, node in enumerate(nodes):
        info = object_info[node.type]
        inputs, widgets, height = [], [], GROWS.get(node.type, 0)
        given = complete(node, info)
        for name, kind, options in flat_inputs(info["input"], node.inputs):
            value = given.get(name)
            if isinstance(value, tuple):
                title, slot = value
                source = (SUBGRAPH_INPUT, sockets.index(title)) if title in sockets else (ids[title], slot)
                links.append([len(links) + 1, *source, ids[node.title], len(inputs), kind])
                outgoing.setdefault(source, []).append(len(links))
                inputs.append({"name": name, "type": kind, "link": len(links)})
            elif kind in WIDGETS:
                widgets.append(value)
                height += TEXT if options.get("multiline") else WIDGET
                if options.get("control_after_generate"):
                    widgets.append("fixed")
                    height += WIDGET
            else:
                inputs.append({"name": name, "type": kind, "link": None})
        top = below.get(node.column, 0)
        height += SLOT * max(len(inputs), len(info["output"])) + 16
        below[node.column] = top + height + GAP
        entries.append(
            {
                "id": ids[node.title],
                "type": node.type,
                "title": node.title,
                "pos": [left[node.column], top],
                "size": [WIDE.get(node.type, WIDTH), height],
                "flags": {},
                "order": order,
                "mode": 0,
                "inputs": inputs,
                "outputs": [
                    {"name": name, "type": kind} for name, kind in zip(info["output_name"], info["output"], strict=True)
                ],
                "properties": {"Node name for S&R": node.type},
                "widgets_values": widgets,
            }
        )
    for entry in entries:
        for slot, output in enumerate(entry["outputs"]):
            output.update(links=outgoing.get((entry["id"], slot), []), slot_index=slot)
    return entries, links


def note_height(text: str) -> int:
    """That shows the whole of a note as wide as two columns, by the look of it."""
    lines = sum(-(-len(line) // 88) if line else 0.7 for line in text.split("\n"))
    return max(200, 50 + round(14 * lines))


def ui_format(template: Template, object_info: Info) -> Info:
    nodes, links = laid_out(template.nodes, object_info)
    height = note_height(template.note)
    note = {
        "id": len(nodes) + 1,
        "type": "MarkdownNote",
        "title": "What this does",
        "pos": [0, -80 - height],
        "size": [2 * WIDTH + SPACE, height],
        "flags": {},
        "order": len(nodes),
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [template.note],
    }
    return {
        "last_node_id": len(nodes) + 1,
        "last_link_id": len(links),
        "nodes": [*nodes, note],
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def blueprint_format(blueprint: Blueprint, object_info: Info) -> Info:
    """A workflow of one node, the subgraph."""

    def identity(*parts: str) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join(("comfyui-posterior", blueprint.name, *parts))))

    ids = numbered(blueprint.nodes)
    nodes, links = laid_out(blueprint.nodes, object_info, tuple(blueprint.sockets))
    inner = {entry["id"]: entry for entry in nodes}
    outputs = []
    for slot, (name, (title, source)) in enumerate(blueprint.outputs.items()):
        output = inner[ids[title]]["outputs"][source]
        links.append([len(links) + 1, ids[title], source, SUBGRAPH_OUTPUT, slot, output["type"]])
        output["links"].append(len(links))
        outputs.append({"id": identity("output", name), "name": name, "type": output["type"], "linkIds": [len(links)]})
    inputs = [
        {
            "id": identity("input", name),
            "name": name,
            "type": kind,
            "linkIds": [link[0] for link in links if link[1:3] == [SUBGRAPH_INPUT, slot]],
        }
        for slot, (name, kind) in enumerate(blueprint.sockets.items())
    ]
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    right = max(entry["pos"][0] + entry["size"][0] for entry in nodes) + SPACE
    outer = {
        "id": 1,
        "type": identity(),
        "title": blueprint.name,
        "pos": [0, 0],
        "size": [WIDTH, SLOT * len(inputs) + WIDGET * len(blueprint.widgets) + 16],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [{"name": name, "type": kind, "link": None} for name, kind in blueprint.sockets.items()],
        "outputs": [{"name": output["name"], "type": output["type"], "links": []} for output in outputs],
        "properties": {"proxyWidgets": [[str(ids[title]), widget] for title, widget in blueprint.widgets]},
        "widgets_values": [],
    }
    subgraph = {
        "id": identity(),
        "version": 1,
        "state": {"lastGroupId": 0, "lastNodeId": len(nodes), "lastLinkId": len(links), "lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": blueprint.name,
        "inputNode": {"id": SUBGRAPH_INPUT, "bounding": [-180, 0, 120, 40 + SLOT * len(inputs)]},
        "outputNode": {"id": SUBGRAPH_OUTPUT, "bounding": [right, 0, 120, 40 + SLOT * len(outputs)]},
        "inputs": inputs,
        "outputs": outputs,
        "widgets": [],
        "nodes": nodes,
        "groups": [],
        "links": [dict(zip(keys, link, strict=True)) for link in links],
        "extra": {},
        "category": "posterior",
        "description": blueprint.description,
    }
    return {
        "revision": 0,
        "last_node_id": len(nodes) + 1,
        "last_link_id": 0,
        "nodes": [outer],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [subgraph]},
        "extra": {},
    }


def render(object_info: Info) -> dict[Path, str]:
    """Every file and its text."""
    files = {}
    for template in TEMPLATES:
        files[ROOT / "workflows" / f"{template.name}.json"] = ui_format(template, object_info)
        files[ROOT / "workflows" / "api" / f"{template.name}.json"] = api_format(template, object_info)
    for blueprint in BLUEPRINTS:
        files[ROOT / "subgraphs" / f"{blueprint.name}.json"] = blueprint_format(blueprint, object_info)
    return {path: json.dumps(content, indent=2) + "\n" for path, content in files.items()}


def main() -> int:
    from dev.server import running
    from dev.setup_host import prepare

    paths, log = prepare(), ROOT / "output" / "templates.log"
    log.parent.mkdir(exist_ok=True)
    with running(sys.executable, paths["comfyui"], paths["base"], log, "--cpu") as server:
        files = render(server.get_json("/object_info"))
    for folder in ("workflows", "workflows/api", "subgraphs"):
        for path in set((ROOT / folder).glob("*.json")) - set(files):
            path.unlink()
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
