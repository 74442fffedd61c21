"""What a user does with the shipped templates: open, look, run, cancel."""

import io
import json
import urllib.request
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser
from support.server_prompts import ROOT, TEMPLATES

from dev.browser import FrontEnd
from dev.server import PACK, Server


def template(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "workflows" / f"{name}.json").read_text())


def twin(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text())


def touching(nodes: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """Pairs of nodes whose boxes overlap."""
    boxes = [(title, node["box"]) for title, node in nodes.items()]
    return [
        (one, other)
        for i, (one, a) in enumerate(boxes)
        for other, b in boxes[:i]
        if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
    ]


def set_widget(front_end: FrontEnd, title: str, name: str, value: Any) -> None:
    """As a user does: the widget's own callback runs."""
    front_end.page.evaluate(
        """([title, name, value]) => {
            const node = window.app.rootGraph.nodes.find(n => n.title === title)
            const widget = node.widgets.find(w => w.name === name)
            widget.value = value
            widget.callback?.(value, window.app.canvas, node)
        }""",
        [title, name, value],
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_opens_and_is_its_api_twin(front_end: FrontEnd, name: str) -> None:
    front_end.errors.clear()
    front_end.load(template(name))
    nodes = front_end.nodes()
    assert sorted(nodes) == sorted(node["title"] for node in template(name)["nodes"])
    assert all(node["known"] for node in nodes.values())
    assert touching(nodes) == []
    assert front_end.prompt() == twin(name)
    assert front_end.errors == []
    note = next(node for node in template(name)["nodes"] if node["type"] == "MarkdownNote")
    front_end.look_at(1.0, 20 - note["pos"][0], 70 - note["pos"][1])
    text = front_end.page.locator(".comfy-markdown .tiptap")
    text.wait_for(state="visible")
    whole, shown = text.evaluate("text => [text.scrollHeight, text.clientHeight]")
    assert whole <= shown, "its note is cut off"


def test_run_brings_the_picture_into_the_page(front_end: FrontEnd) -> None:
    front_end.load(template("inpaint_free_form"))
    set_widget(front_end, "Restore", "quality", "fast")
    front_end.run()
    nodes = front_end.nodes()
    (shown,) = nodes["Result"]["pictures"]
    with urllib.request.urlopen(shown) as answer:
        result = np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB"))
    assert result.shape == (128, 128, 3)
    assert result.std() > 20
    for title in ("Operator", "Measure (simulate)", "Restore"):
        assert nodes[title]["pictures"], f"{title} shows no picture"
    assert touching(nodes) == []


def test_cancel_stops_the_run_and_the_next_one_works(front_end: FrontEnd) -> None:
    front_end.load(template("super_resolution_x8"))
    set_widget(front_end, "Demo Pictures", "count", 1)
    set_widget(front_end, "Scheduler", "steps", 900)
    front_end.page.evaluate(
        "() => { window.stepped = new Promise(done => window.app.api.addEventListener('progress', done, {once: true})) }"
    )
    front_end.start()
    front_end.page.evaluate("() => window.stepped.then(() => null)")
    front_end.page.get_by_role("button", name="Cancel current run").click()
    assert front_end.wait()["end"] == "execution_interrupted"
    set_widget(front_end, "Scheduler", "steps", 2)
    front_end.run()
    assert front_end.nodes()["Result"]["pictures"]


def test_dynamic_combo_switches_the_inputs(front_end: FrontEnd) -> None:
    front_end.load(template("inpaint_box"))
    fields = {
        "box": {"pattern.x", "pattern.y", "pattern.width", "pattern.height"},
        "stripes": {f"pattern.{name}" for name in ("period", "width", "offset", "direction", "fraction", "seed")},
        "mask": {"pattern.threshold"},
    }
    for pattern, widgets in fields.items():
        set_widget(front_end, "Operator", "pattern", pattern)
        node = front_end.nodes()["Operator"]
        assert set(node["widgets"]) - {"pattern"} == widgets
        assert ("pattern.mask" in node["inputs"]) == (pattern == "mask")
        sent = front_end.prompt()[str(node["id"])]["inputs"]
        assert {key for key in sent if key.startswith("pattern.")} - {"pattern.mask"} == widgets
        assert front_end.nodes()["Operator"]["box"][3] > front_end.nodes()["Operator"]["box"][1]


def connect(front_end: FrontEnd, source: str, output: str, target: str, name: str) -> None:
    """Draw a link from an output to an input."""
    front_end.page.evaluate(
        """([source, output, target, name]) => {
            const [from, to] = [source, target].map(title => window.app.rootGraph.nodes.find(n => n.title === title))
            from.connect(from.outputs.findIndex(o => o.name === output), to, to.inputs.findIndex(i => i.name === name))
        }""",
        [source, output, target, name],
    )


@pytest.mark.parametrize(("name", "widgets"), [("Deblur", 5), ("Upscale", 5), ("Inpaint", 4)])
def test_blueprint_is_found_and_placed(front_end: FrontEnd, name: str, widgets: int) -> None:
    front_end.errors.clear()
    front_end.load(template("denoise"))
    place_blueprint(front_end, f"Posterior {name}")
    node = front_end.nodes()[f"Posterior {name}"]
    sockets = {"photo", "model", "vae", "positive", "negative"} | ({"mask"} if name == "Inpaint" else set())
    assert set(node["inputs"]) >= sockets
    assert len(node["widgets"]) == widgets
    inside = [entry["class_type"] for key, entry in front_end.prompt().items() if ":" in key]
    assert sorted(inside)[1:] == ["PosteriorMeasurementFromPhoto", "PosteriorRestore"]
    assert front_end.errors == []


FREE = (1000, 880)  # in the window; no node of a template is there when place_blueprint looks at it


def place_blueprint(front_end: FrontEnd, name: str) -> None:
    """As a user does: the search for nodes, the name, Enter, and a click where it is to go."""
    page = front_end.page
    front_end.look_at(0.5, 100, 600)
    page.evaluate("() => window.app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    search = page.get_by_placeholder("Add a node...")
    search.fill(name)
    page.locator("#results-list").get_by_text(name).first.wait_for()
    search.press("Enter")
    search.wait_for(state="detached")
    placed = "title => window.app.rootGraph.nodes.some(n => n.title === title && !n.flags.ghost)"
    page.wait_for_function(placed.replace("!n.flags", "n.flags"), arg=name)  # it hangs on the pointer
    page.mouse.move(FREE[0] - 50, FREE[1] - 20)
    page.mouse.move(*FREE, steps=5)
    page.mouse.click(*FREE, delay=50)
    page.wait_for_function(placed, arg=name)


def test_blueprint_runs(front_end: FrontEnd) -> None:
    front_end.load(template("deblur_gaussian"))
    place_blueprint(front_end, "Posterior Deblur")
    for source, output, name in (
        ("Measure (simulate)", "degraded", "photo"),
        ("Load Demo Prior", "MODEL", "model"),
        ("Load Demo Prior", "VAE", "vae"),
        ("Positive Prompt", "CONDITIONING", "positive"),
        ("Positive Prompt", "CONDITIONING", "negative"),
    ):
        connect(front_end, source, output, "Posterior Deblur", name)
    connect(front_end, "Posterior Deblur", "image", "Result", "images")
    set_widget(front_end, "Posterior Deblur", "quality", "fast")
    set_widget(front_end, "Restore", "quality", "fast")
    front_end.run()
    (shown,) = front_end.nodes()["Result"]["pictures"]
    with urllib.request.urlopen(shown) as answer:
        assert Image.open(io.BytesIO(answer.read())).size == (128, 128)


def test_help_panel_shows_the_page_and_its_picture(front_end: FrontEnd) -> None:
    front_end.load(template("deblur_gaussian"))
    front_end.look_at(0.7, 200, 600)
    page, box = front_end.page, front_end.on_screen()["Operator"]
    page.mouse.click(box[0] + 40, box[1] + 8)
    page.get_by_test_id("info-button").click()
    page.get_by_text("what a single bright point becomes. Estimate Blur reads it").wait_for()
    picture = page.locator("img[src*='docs/pictures/PosteriorBlur.webp']")
    page.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=picture.element_handle())


def test_names_are_translated(browser: Browser, server: Server) -> None:
    front_end = FrontEnd(browser, server, Comfy_Locale="ja")
    try:
        texts = json.loads((ROOT / "locales" / "ja" / "nodeDefs.json").read_text())["PosteriorFinish"]
        found = front_end.page.evaluate(
            """() => {
                const node = window.LiteGraph.createNode("PosteriorFinish")
                return [node.title, ...node.inputs.slice(0, 2).map(i => i.label ?? i.localized_name)]
            }"""
        )
        assert found == [texts["display_name"], *(texts["inputs"][name]["name"] for name in ("image", "measurement"))]
    finally:
        front_end.page.close()
        server.post("/settings", {"Comfy.Locale": "en"})


def test_templates_are_offered_with_their_thumbnails(front_end: FrontEnd) -> None:
    page = front_end.page
    page.get_by_role("button", name="Templates").first.click()
    page.get_by_test_id("template-workflows-content").wait_for()
    page.get_by_text(PACK, exact=True).first.click()
    card = page.get_by_test_id(f"template-workflow-{TEMPLATES[0]}")
    card.wait_for()
    for name in TEMPLATES:
        picture = page.get_by_test_id(f"template-workflow-{name}").locator("img").first
        page.get_by_test_id(f"template-workflow-{name}").scroll_into_view_if_needed()
        picture.wait_for()
        page.wait_for_function("image => image.complete && image.naturalWidth === 320", arg=picture.element_handle())
    card.scroll_into_view_if_needed()
    card.click()
    page.get_by_test_id("template-workflows-content").wait_for(state="detached")
    assert front_end.prompt() == twin(TEMPLATES[0])
