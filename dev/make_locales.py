"""Write locales/en/nodeDefs.json from the nodes themselves. `python dev/make_locales.py` after changing a node.

The other languages are written by hand, with the same keys; a test compares. ComfyUI's front end reads them so: texts of nodes
are messages, in which | { } @ have a meaning and are quoted; tooltips are plain text.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dev.make_templates import Info  # noqa: E402
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


def render(object_info: Info) -> str:
    return json.dumps(english(object_info), indent=2) + "\n"


def main() -> int:
    log = ROOT / "output" / "locales.log"
    log.parent.mkdir(exist_ok=True)
    paths = prepare()
    with running(sys.executable, paths["comfyui"], paths["base"], log, "--cpu") as server:
        text = render(server.get_json("/object_info"))
    path = ROOT / "locales" / "en" / "nodeDefs.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
