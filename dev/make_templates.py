"""Write workflows/*.json (templates, the front end's format) and workflows/api/*.json (for scripts) from one description.

The order of a node's widgets comes from the running server, so that both formats agree with the nodes as they are; a test
runs this again and compares. `python dev/make_templates.py` after changing a template or a node.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
# Pixels. GAP holds the title bar of the lower node and, above it, the badge with the name of its pack.
COLUMN, WIDTH, GAP, PICTURE = 280, 236, 62, 250
# What the front end needs for a slot and a widget, and at most for a text field.
SLOT, WIDGET, TEXT = 20, 24, 90


@dataclass(frozen=True)
class Node:
    """One node: its class, title, column, and inputs (a value, or ("title of another node", output index)).

    Nodes of a column are stacked in the order of the description; links run to a column further right. `extra` pixels of
    height are for what a node shows when it has run.
    """

    type: str
    title: str
    column: int
    inputs: dict[str, Any] = field(default_factory=dict)
    extra: int = 0


@dataclass(frozen=True)
class Template:
    name: str
    note: str
    nodes: list[Node]


def restoration(operator: list[Node], hole: list[Node], steps: int) -> list[Node]:
    """The graph every PSLD template shares; `operator` holds a node titled Operator, `hole` what shows the mask."""
    model, clip, vae = (("Load Demo Prior", i) for i in range(3))
    measurement, degraded = (("Measure (simulate)", i) for i in range(2))
    truth = ("Demo Pictures", 0)
    measure = {"image": truth, "operator": ("Operator", 0), "sigma": 0.0, "seed": 0}
    guider = {"model": model, "positive": ("Positive Prompt", 0), "negative": ("Negative Prompt", 0), "cfg": 1.0}
    scheduler = {"model": model, "scheduler": "ddim_uniform", "steps": steps, "denoise": 1.0}
    rule = {"rule": "line search", "rule.omega": 0.8, "rule.inner_steps": 1, "rule.last_steps": 10, "rule.eta": 0.0}
    psld = {"measurement": measurement, "vae": vae, **rule, "memory": "auto", "check_gradients": False}
    sample = {
        "noise": ("Noise", 0),
        "guider": ("Guider", 0),
        "sampler": ("PSLD Sampler", 0),
        "sigmas": ("Scheduler", 0),
        "latent_image": ("Start Latent", 0),
    }
    return [
        Node("PosteriorLoadDemoPrior", "Load Demo Prior", 0),
        Node("PosteriorDemoPictures", "Demo Pictures", 0, {"first": 0, "count": 4}),
        *operator,
        Node("CLIPTextEncode", "Positive Prompt", 1, {"clip": clip, "text": ""}),
        Node("CLIPTextEncode", "Negative Prompt", 1, {"clip": clip, "text": ""}),
        Node("PosteriorMeasureSimulate", "Measure (simulate)", 1, measure),
        Node("CFGGuider", "Guider", 2, guider),
        Node("RandomNoise", "Noise", 2, {"noise_seed": 0}),
        Node("BasicScheduler", "Scheduler", 2, scheduler),
        Node("PosteriorSamplerPSLD", "PSLD Sampler", 2, psld),
        Node("PosteriorStartLatent", "Start Latent", 2, {"measurement": measurement, "vae": vae, "start": "noise"}),
        Node("SamplerCustomAdvanced", "Sample", 3, sample),
        Node("VAEDecode", "Decode", 4, {"samples": ("Sample", 0), "vae": vae}),
        Node(
            "PosteriorFinish",
            "Finish",
            5,
            {"image": ("Decode", 0), "measurement": measurement, "error": 0.05, "feather": 4.0},
            120,
        ),
        Node("SaveImage", "Result", 6, {"images": ("Finish", 0), "filename_prefix": "posterior"}, PICTURE),
        Node("PreviewImage", "Measurement", 3, {"images": degraded}, PICTURE),
        Node("PreviewImage", "Truth", 3, {"images": truth}, PICTURE),
        *hole,
    ]


SWAP = """Runs as installed. For your own photo and model replace
* **Load Demo Prior** by **Load Checkpoint**,
* **Demo Pictures** by **Load Image**,
* **Measure (simulate)** by **Measurement from Photo**"""

TEMPLATES = [
    Template(
        "super_resolution_x8",
        "## x8 super-resolution with PSLD\n16 x 16 pixels become 128 x 128, and made smaller again they are the 16 x 16.\n\n"
        f"{SWAP}.",
        restoration(
            [Node("PosteriorDownscale", "Operator", 0, {"method": "area", "method.factor": 8})],
            [],
            steps=20,
        ),
    ),
    Template(
        "inpaint_box",
        f"## Box inpainting with PSLD\nThe box is invented, every other pixel comes back bit-exact.\n\n{SWAP},\n"
        "* the pattern of **Operator** by mask, with the mask of Load Image.",
        restoration(
            [
                Node(
                    "PosteriorMask",
                    "Operator",
                    0,
                    {"pattern": "box", "pattern.x": 36, "pattern.y": 40, "pattern.width": 56, "pattern.height": 48},
                    PICTURE,
                ),
            ],
            [
                Node("MaskToImage", "Hole Picture", 2, {"mask": ("Measure (simulate)", 2)}),
                Node("PreviewImage", "Hole", 4, {"images": ("Hole Picture", 0)}, PICTURE),
            ],
            steps=20,
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
    below: dict[int, int] = {}  # where the next node of a column goes
    for order, node in enumerate(template.nodes):
        info = object_info[node.type]
        inputs, widgets, height = [], [], node.extra
        for name, kind, options in flat_inputs(info["input"], node.inputs):
            value = node.inputs.get(name)
            if isinstance(value, tuple):
                source, slot = value
                links.append([len(links) + 1, ids[source], slot, ids[node.title], len(inputs), kind])
                outgoing.setdefault(value, []).append(len(links))
                inputs.append({"name": name, "type": kind, "link": len(links)})
            elif kind in WIDGETS:
                widgets.append(node.inputs[name])  # every widget is written out, optional ones too
                height += TEXT if options.get("multiline") else WIDGET
                if options.get("control_after_generate"):
                    widgets.append("fixed")
                    height += WIDGET
            else:
                inputs.append({"name": name, "type": kind, "link": None})
        top = below.get(node.column, 0)
        height += SLOT * max(len(inputs), len(info["output"])) + 16
        below[node.column] = top + height + GAP
        nodes.append(
            {
                "id": ids[node.title],
                "type": node.type,
                "title": node.title,
                "pos": [COLUMN * node.column, top],
                "size": [WIDTH, height],
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
        "pos": [0, -300],
        "size": [COLUMN + WIDTH, 220],
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

    paths, log = prepare(), ROOT / "output" / "templates.log"
    log.parent.mkdir(exist_ok=True)
    with running(sys.executable, paths["comfyui"], paths["base"], log, "--cpu") as server:
        for path, text in render(server.get_json("/object_info")).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
