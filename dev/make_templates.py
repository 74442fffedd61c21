"""Write workflows/*.json (templates, the front end's format) and workflows/api/*.json (for scripts) from one description.

The order of a node's widgets comes from the running server, so that both formats agree with the nodes as they are; a test
runs this again and compares. `python dev/make_templates.py` after changing a template or a node.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from setup_host import ROOT

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")


@dataclass(frozen=True)
class Node:
    """One node: its class, title, inputs (a value, or ("title of another node", output index)), and place.

    `column` and `row` are in grid cells of 320 x 40 pixels; `height` in rows.
    """

    type: str
    title: str
    column: float
    row: float
    inputs: dict[str, Any] = field(default_factory=dict)
    height: float = 3


@dataclass(frozen=True)
class Template:
    name: str
    note: str
    nodes: list[Node]


def restoration(operator: list[Node], hole: list[Node], steps: int, omega: float, gamma: float) -> list[Node]:
    """The graph every PSLD template shares; `operator` holds a node titled Operator, `hole` what shows the mask."""
    return [
        Node("PosteriorLoadDemoPrior", "Load Demo Prior", 0, 0),
        Node("PosteriorDemoPictures", "Demo Pictures", 0, 4, {"first": 0, "count": 4}),
        *operator,
        Node("CLIPTextEncode", "Positive Prompt", 1, 0, {"clip": ("Load Demo Prior", 1), "text": ""}, 3),
        Node("CLIPTextEncode", "Negative Prompt", 1, 4, {"clip": ("Load Demo Prior", 1), "text": ""}, 3),
        Node(
            "PosteriorMeasureSimulate",
            "Measure (simulate)",
            1,
            8,
            {"image": ("Demo Pictures", 0), "operator": ("Operator", 0), "sigma": 0.0, "seed": 0},
            4,
        ),
        Node(
            "CFGGuider",
            "Guider",
            2,
            0,
            {
                "model": ("Load Demo Prior", 0),
                "positive": ("Positive Prompt", 0),
                "negative": ("Negative Prompt", 0),
                "cfg": 1.0,
            },
        ),
        Node("RandomNoise", "Noise", 2, 4, {"noise_seed": 0}, 2),
        Node(
            "BasicScheduler",
            "Scheduler",
            2,
            7,
            {"model": ("Load Demo Prior", 0), "scheduler": "ddim_uniform", "steps": steps, "denoise": 1.0},
        ),
        Node(
            "PosteriorSamplerPSLD",
            "PSLD Sampler",
            2,
            11,
            {
                "measurement": ("Measure (simulate)", 0),
                "vae": ("Load Demo Prior", 2),
                "omega": omega,
                "gamma": gamma,
                "eta": 0.0,
                "glue": "pinv",
            },
            5,
        ),
        Node(
            "PosteriorStartLatent",
            "Start Latent",
            2,
            17,
            {"measurement": ("Measure (simulate)", 0), "vae": ("Load Demo Prior", 2), "start": "noise"},
        ),
        Node(
            "SamplerCustomAdvanced",
            "Sample",
            3,
            0,
            {
                "noise": ("Noise", 0),
                "guider": ("Guider", 0),
                "sampler": ("PSLD Sampler", 0),
                "sigmas": ("Scheduler", 0),
                "latent_image": ("Start Latent", 0),
            },
            4,
        ),
        Node("VAEDecode", "Decode", 3, 5, {"samples": ("Sample", 0), "vae": ("Load Demo Prior", 2)}, 2),
        Node(
            "PosteriorFinish",
            "Finish",
            3,
            8,
            {"image": ("Decode", 0), "measurement": ("Measure (simulate)", 0), "error": 0.05},
            4,
        ),
        Node("SaveImage", "Result", 4, 0, {"images": ("Finish", 0), "filename_prefix": "posterior"}, 9),
        Node("PreviewImage", "Measurement", 4, 10, {"images": ("Measure (simulate)", 1)}, 8),
        Node("PreviewImage", "Truth", 4, 19, {"images": ("Demo Pictures", 0)}, 8),
        *hole,
    ]


SWAP = (
    "Runs as installed. For your own photo and model: replace Load Demo Prior by Load Checkpoint, Demo Pictures by Load Image, and "
    "Measure (simulate) by Measurement from Photo."
)

TEMPLATES = [
    Template(
        "super_resolution_x8",
        f"x8 super-resolution with PSLD: 16 x 16 pixels become 128 x 128, and made smaller again they are the 16 x 16. {SWAP}",
        restoration(
            [Node("PosteriorDownscale", "Operator", 0, 8, {"method": "area", "method.factor": 8}, 3)], [], 100, 1.0, 0.1
        ),
    ),
    Template(
        "inpaint_box",
        f"Box inpainting with PSLD: the box is invented, every other pixel comes back bit-exact. {SWAP}",
        restoration(
            [
                Node("SolidMask", "Nothing Lost", 0, 8, {"value": 0.0, "width": 128, "height": 128}),
                Node("SolidMask", "Box", 0, 12, {"value": 1.0, "width": 56, "height": 48}),
                Node(
                    "MaskComposite",
                    "Hole Mask",
                    0,
                    16,
                    {"destination": ("Nothing Lost", 0), "source": ("Box", 0), "x": 36, "y": 40, "operation": "add"},
                    4,
                ),
                Node("PosteriorMask", "Operator", 1, 13, {"mask": ("Hole Mask", 0), "threshold": 0.5}, 2),
            ],
            [
                Node("MaskToImage", "Hole Picture", 1, 17, {"mask": ("Hole Mask", 0)}, 1),
                Node("PreviewImage", "Hole", 3, 13, {"images": ("Hole Picture", 0)}, 8),
            ],
            100,
            1.0,
            0.1,
        ),
    ),
]


def api_format(template: Template) -> dict[str, Any]:
    ids = {node.title: str(i + 1) for i, node in enumerate(template.nodes)}
    assert len(ids) == len(template.nodes), "titles must be unique: scripts find nodes by them"

    def value(v: Any) -> Any:
        return [ids[v[0]], v[1]] if isinstance(v, tuple) else v

    return {
        ids[node.title]: {
            "inputs": {name: value(v) for name, v in node.inputs.items()},
            "class_type": node.type,
            "_meta": {"title": node.title},
        }
        for node in template.nodes
    }


def flat_inputs(specs: dict[str, Any], values: dict[str, Any], prefix: str = "") -> list[tuple[str, str, dict[str, Any]]]:
    """(name, type, options) of every input in the order the front end shows them, following the chosen dynamic options."""
    flat = []
    for group in ("required", "optional"):
        for name, spec in specs.get(group, {}).items():
            kind = "COMBO" if isinstance(spec[0], list) else spec[0]
            options = spec[1] if len(spec) > 1 else {}
            flat.append((prefix + name, kind, options))
            if kind == "COMFY_DYNAMICCOMBO_V3":
                chosen = next(o for o in options["options"] if o["key"] == values[prefix + name])
                flat += flat_inputs(chosen["inputs"], values, f"{prefix}{name}.")
    return flat


def ui_format(template: Template, object_info: dict[str, Any]) -> dict[str, Any]:
    ids = {node.title: i + 1 for i, node in enumerate(template.nodes)}
    links, nodes = [], []
    outgoing: dict[tuple[str, int], list[int]] = {}
    for order, node in enumerate(template.nodes):
        inputs, widgets = [], []
        for name, kind, options in flat_inputs(object_info[node.type]["input"], node.inputs):
            value = node.inputs.get(name)
            if isinstance(value, tuple):
                source, slot = value
                links.append([len(links) + 1, ids[source], slot, ids[node.title], len(inputs), kind])
                outgoing.setdefault(value, []).append(len(links))
                inputs.append({"name": name, "type": kind, "link": len(links)})
            elif kind in WIDGETS:
                widgets.append(value)
                if options.get("control_after_generate"):
                    widgets.append("fixed")
            else:
                inputs.append({"name": name, "type": kind, "link": None})
        nodes.append(
            {
                "id": ids[node.title],
                "type": node.type,
                "title": node.title,
                "pos": [40 + 340 * node.column, 120 + 44 * node.row],
                "size": [300, 44 * node.height - 10],
                "flags": {},
                "order": order,
                "mode": 0,
                "inputs": inputs,
                "outputs": [],
                "properties": {"Node name for S&R": node.type},
                "widgets_values": widgets,
            }
        )
    for entry in nodes:
        info = object_info[entry["type"]]
        title = entry["title"]
        for slot, (kind, name) in enumerate(zip(info["output"], info["output_name"], strict=True)):
            entry["outputs"].append({"name": name, "type": kind, "links": outgoing.get((title, slot), []), "slot_index": slot})
    note = {
        "id": len(nodes) + 1,
        "type": "MarkdownNote",
        "title": "What this does",
        "pos": [40, 0],
        "size": [980, 90],
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


def render(object_info: dict[str, Any]) -> dict[Path, str]:
    """Every workflow file and its text."""
    files = {}
    for template in TEMPLATES:
        files[ROOT / "workflows" / f"{template.name}.json"] = ui_format(template, object_info)
        files[ROOT / "workflows" / "api" / f"{template.name}.json"] = api_format(template)
    return {path: json.dumps(content, indent=2) + "\n" for path, content in files.items()}


def main() -> int:
    from server import running
    from setup_host import prepare

    paths = prepare()
    with running(sys.executable, paths["comfyui"], paths["base"], ROOT / "output" / "templates.log", "--cpu") as server:
        for path, text in render(server.get_json("/object_info")).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
