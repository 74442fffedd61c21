"""What shared workflows rely on: the ids of nodes, and the names, types and order of their inputs and outputs.

`python tests/support/schemas.py` writes tests/schemas.json anew, after a change that is meant. An input or output may be added
behind the others; one that is renamed, retyped, moved or taken away breaks the workflows that people have saved.
"""

import asyncio
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

FILE = Path(__file__).resolve().parents[1] / "schemas.json"
FROM_HOST = {
    ("PosteriorRestore", "scheduler"),
    ("PosteriorLoadMeasurement", "file"),
}  # their options are ComfyUI's and the user's


def nodes(pack: ModuleType) -> dict[str, Any]:
    """Node classes by id."""
    listed = asyncio.run(pack.nodes.PosteriorExtension().get_node_list())
    return {node.define_schema().node_id: node for node in listed}


def described(node_id: str, inputs: list[Any]) -> list[dict[str, Any]]:
    """Inputs in the order in which a saved workflow lists their values."""
    found = []
    for spec in inputs:
        entry = {"name": spec.id, "type": spec.io_type, "optional": bool(spec.optional)}
        options = getattr(spec, "options", None)
        if spec.io_type == "COMFY_DYNAMICCOMBO_V3":
            entry["options"] = {option.key: described(node_id, option.inputs) for option in options}
        elif options is not None and (node_id, spec.id) not in FROM_HOST:
            entry["options"] = list(options)
        found.append(entry)
    return found


def schemas(pack: ModuleType) -> dict[str, Any]:
    """Everything that the file holds."""
    result = {}
    for node_id, node in sorted(nodes(pack).items()):
        schema = node.define_schema()
        outputs = [
            {"name": output.display_name or output.id or output.io_type, "type": output.io_type} for output in schema.outputs
        ]
        result[node_id] = {"inputs": described(node_id, schema.inputs), "outputs": outputs}
    return result


def as_text(found: dict[str, Any]) -> str:
    return json.dumps(found, indent=1) + "\n"


def main() -> None:
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root), str(root / "tests")]
    from support.in_process import load_pack, start_comfyui

    base = start_comfyui("--cpu")
    FILE.write_text(as_text(schemas(load_pack())))
    base.cleanup()
    print(FILE.relative_to(root))


if __name__ == "__main__":
    main()
