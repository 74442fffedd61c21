"""Run every template in the real front end, and keep what it looks like. `python dev/make_pictures.py [template ...]`

docs/templates/<name>.webp       the workflow when it has run
workflows/<name>.jpg             its thumbnail in ComfyUI's template dialog: before | after
web/docs/pictures/<NodeId>.webp  each node of the pack, for its help page
"""

import io
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from dev.browser import FrontEnd, running_browser  # noqa: E402
from dev.graphs import Template  # noqa: E402
from dev.make_templates import ui_format  # noqa: E402
from dev.server import PACK, running  # noqa: E402
from dev.setup_host import prepare  # noqa: E402
from dev.templates import DEMO_TEMPLATES, GALLERY, OWN_TEMPLATES, TEMPLATES  # noqa: E402

SIDE = 320  # of a thumbnail
LARGEST = 150_000  # bytes of a file
QUIET = {"Comfy_Minimap_Visible": False, "Comfy_Graph_CanvasInfo": False, "Comfy_Graph_CanvasMenu": False}


def save(picture: Image.Image, path: Path) -> None:
    """At the best quality that stays under LARGEST."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for quality in (90, 80, 70, 60, 50):
        data = io.BytesIO()
        picture.save(data, path.suffix[1:].replace("jpg", "jpeg"), quality=quality)
        if len(data.getvalue()) < LARGEST:
            break
    path.write_bytes(data.getvalue())
    print(f"{path.relative_to(ROOT)}: {picture.width} x {picture.height}, {len(data.getvalue()) // 1000} kB", flush=True)


def shown(node: dict[str, Any]) -> Image.Image:
    """The first picture of a node that has run, as large as a thumbnail."""
    with urllib.request.urlopen(node["pictures"][0]) as answer:
        picture = Image.open(io.BytesIO(answer.read())).convert("RGB")
    return picture.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def thumbnail(template: Template, nodes: dict[str, Any]) -> Image.Image:
    """One picture, its left half before and its right half after."""
    before, after = (shown(nodes[title]) for title in (template.before, template.after))
    half = SIDE // 2
    after.paste(before.crop((0, 0, half, SIDE)), (0, 0))
    after.paste("white", (half - 1, 0, half + 1, SIDE))
    return after


def beginning(picture: Image.Image) -> Image.Image:
    """The left end of a workflow."""
    side = min(picture.size)
    return picture.crop((0, 0, side, side)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def screenshot(front_end: FrontEnd) -> Image.Image:
    front_end.show()
    return Image.open(io.BytesIO(front_end.page.screenshot())).convert("RGB")


def node_pictures(front_end: FrontEnd, whole: Image.Image) -> dict[str, Image.Image]:
    """By type: the nodes of the pack, cut out of a screenshot."""
    boxes = front_end.on_screen()
    return {
        node["type"]: whole.crop(tuple(round(side) for side in boxes[title]))
        for title, node in front_end.nodes().items()
        if node["type"].startswith("Posterior")
    }


def main() -> int:
    wanted = sys.argv[1:] or [template.name for template in (*TEMPLATES, GALLERY)]
    comfyui, found = prepare()["comfyui"], {}
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        for name in ("models/checkpoints", "input", "output", "user", "custom_nodes"):
            (base / name).mkdir(parents=True)
        (base / "custom_nodes" / PACK).symlink_to(ROOT, target_is_directory=True)
        for template in OWN_TEMPLATES:
            loader = next(node for node in template.nodes if node.type == "CheckpointLoaderSimple")
            (base / "models" / "checkpoints" / loader.inputs["ckpt_name"]).touch()  # offered by the loader, and never loaded
        (base / "input" / "example.png").write_bytes((comfyui / "input" / "example.png").read_bytes())
        with running(sys.executable, comfyui, base, base / "log", "--cpu") as server, running_browser() as browser:
            front_end = FrontEnd(browser, server, **QUIET)
            front_end.page.add_style_tag(content="button:has(> .pi-bars) { display: none }")
            for template in (*TEMPLATES, GALLERY):
                if template.name not in wanted:
                    continue
                front_end.load(ui_format(template, server.get_json("/object_info")))
                runs = template in DEMO_TEMPLATES or template is GALLERY
                if runs:
                    print(template.name, "...", flush=True)
                    front_end.run()
                picture = screenshot(front_end)
                if runs:
                    found = {**node_pictures(front_end, picture), **found}
                if template is GALLERY:
                    continue
                save(picture, ROOT / "docs" / "templates" / f"{template.name}.webp")
                # Their checkpoints are not here: what they look like stands for what they do.
                small = thumbnail(template, front_end.nodes()) if runs else beginning(picture)
                save(small, ROOT / "workflows" / f"{template.name}.jpg")
    for name, picture in found.items():
        save(picture, ROOT / "web" / "docs" / "pictures" / f"{name}.webp")
    return 0


if __name__ == "__main__":
    sys.exit(main())
