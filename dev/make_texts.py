"""Write what follows from the nodes' own texts. `python dev/make_texts.py` after changing a node.

    locales/en/nodeDefs.json  The other languages are written by hand, with the same keys; a test compares.
    web/docs/<NodeId>.md      the lists of inputs and outputs, from the first "## " on; what stands before is written by hand

In locales ComfyUI's front end takes names and descriptions as messages, in which | { } @ have a meaning and are quoted, and
tooltips as plain text.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from dev.make_templates import WIDGETS, Info  # noqa: E402
from dev.server import PACK, running  # noqa: E402
from dev.setup_host import prepare  # noqa: E402


def quoted(text: str) -> str:
    """A text as a message of vue-i18n."""
    return re.sub(r"[|{}@]", lambda found: "{'" + found[0] + "'}", text)


def all_inputs(specs: Info, prefix: str = "", choice: str = "") -> list[tuple[str, str, str]]:
    """(name, choice of the dynamic input it belongs to, tooltip) of every input, behind every choice."""
    found = []
    for group in ("required", "optional"):
        for name, spec in specs.get(group, {}).items():
            options = spec[1] if len(spec) > 1 else {}
            found.append((prefix + name, choice, options["tooltip"]))
            if spec[0] == "COMFY_DYNAMICCOMBO_V3":
                for option in options["options"]:
                    found += all_inputs(option["inputs"], f"{prefix}{name}.", option["key"])
    return found


def tooltips(specs: Info) -> dict[str, str]:
    """By name. The front end has one tooltip for all choices that have an input of this name."""
    by_name: dict[str, dict[str, list[str]]] = {}
    for name, choice, tooltip in all_inputs(specs):
        by_name.setdefault(name, {}).setdefault(tooltip, []).append(choice)
    return {
        name: next(iter(texts)) if len(texts) == 1 else " ".join(f"{', '.join(choices)}: {t}" for t, choices in texts.items())
        for name, texts in by_name.items()
    }


def english(object_info: Info) -> dict[str, Any]:
    """The texts of the pack's nodes, by the front end's keys."""
    return {
        node_id: {
            "display_name": quoted(node["display_name"]),
            "description": quoted(node["description"]),
            "inputs": {
                name.replace(".", "_"): {"name": name.rpartition(".")[2], "tooltip": tooltip}
                for name, tooltip in tooltips(node["input"]).items()
            },
            "outputs": {
                str(i): {"name": name, "tooltip": tooltip}
                for i, (name, tooltip) in enumerate(zip(node["output_name"], node["output_tooltips"], strict=True))
            },
        }
        for node_id, node in sorted(object_info.items())
        if node["python_module"] == f"custom_nodes.{PACK}"
    }


def limits(kind: str, options: dict[str, Any]) -> str:
    """Default and range of a widget, in words."""
    if kind not in WIDGETS or options.get("multiline"):
        return ""
    parts = [f"default {options['default']}"] if kind == "COMBO" and "default" in options else []
    if kind in ("INT", "FLOAT"):
        most = "" if options["max"] >= 2**31 else f" to {options['max']:g}"
        parts = [f"{options['min']:g}{most or ' and more'}, default {options['default']:g}"]
    if kind == "BOOLEAN":
        parts = [f"default {'on' if options['default'] else 'off'}"]
    if options.get("advanced"):
        parts.append("advanced")
    return f" ({', '.join(parts)})" if parts else ""


def listed(specs: Info, indent: str = "") -> list[str]:
    """Inputs as lines of a Markdown list, those of a dynamic choice below it."""
    lines = []
    for group in ("required", "optional"):
        for name, (kind, options) in ((name, (spec[0], spec[1])) for name, spec in specs.get(group, {}).items()):
            open_end = ", may stay open" if group == "optional" and kind not in WIDGETS else ""
            lines.append(f"{indent}* **{name}**{open_end}{limits(kind, options)}: {options['tooltip']}")
            if kind == "COMFY_DYNAMICCOMBO_V3":
                for option in options["options"]:
                    lines.append(f"{indent}    * {option['key']}")
                    lines += listed(option["inputs"], f"{indent}        ")
    return lines


def lists(node: Info) -> str:
    """Inputs and outputs of a node in Markdown."""
    inputs = listed(node["input"])
    outputs = [f"* **{name}**: {text}" for name, text in zip(node["output_name"], node["output_tooltips"], strict=True)]
    parts = [("Inputs", inputs), ("Outputs", outputs)]
    return "\n\n".join(f"## {title}\n\n" + "\n".join(lines) for title, lines in parts if lines) + "\n"


def render(object_info: Info) -> dict[Path, str]:
    """Every file and its text."""
    files = {ROOT / "locales" / "en" / "nodeDefs.json": json.dumps(english(object_info), indent=2) + "\n"}
    for node_id, node in object_info.items():
        if node["python_module"] == f"custom_nodes.{PACK}":
            page = ROOT / "web" / "docs" / f"{node_id}.md"
            written = page.read_text().partition("\n## ")[0] if page.exists() else f"# {node['display_name']}\n"
            files[page] = f"{written.rstrip()}\n\n{lists(node)}"
    return files


def main() -> int:
    log = ROOT / "output" / "texts.log"
    log.parent.mkdir(exist_ok=True)
    paths = prepare()
    with running(sys.executable, paths["comfyui"], paths["base"], log, "--cpu") as server:
        files = render(server.get_json("/object_info"))
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
