"""ComfyUI's front end in a real Chromium, for the browser tests and for the pictures of the documentation."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, sync_playwright

from dev.server import Server
from dev.setup_host import chromium

Workflow = dict[str, Any]
START_MS = 180_000  # a busy machine needs a minute for the front end alone
READY = "() => window.app?.vueAppReady && window.app.canvas?.graph && window.app.extensionManager"


@contextlib.contextmanager
def running_browser() -> Iterator[Browser]:
    """Chromium without a window.

    Raises:
        dev.setup_host.SetupError: there is none, and none can be installed from here; says how.
    """
    path = chromium()
    with sync_playwright() as playwright:
        # Containers have neither the user namespaces nor the shared memory that its sandbox and its tabs want.
        arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


class FrontEnd:
    """A window with ComfyUI.

    Attributes:
        page: Playwright's page.
        errors: what the console reported as an error since the front end was ready.
    """

    def __init__(self, browser: Browser, server: Server, size: tuple[int, int] = (1600, 1000), **settings: Any) -> None:
        """Open it.

        Args:
            settings: of the front end, with _ for the dots in their names, for example Comfy_Locale="ja".
        """
        named = {name.replace("_", "."): value for name, value in settings.items()}
        # Else a new user is greeted by a dialog.
        server.post("/settings", {"Comfy.TutorialCompleted": True, **named})
        self.server, self.errors = server, []
        self.page = browser.new_page(viewport={"width": size[0], "height": size[1]})
        self.page.set_default_timeout(START_MS)
        self.page.goto(f"http://{server.address}/")
        self.page.wait_for_function(READY)
        self.page.wait_for_load_state("networkidle")
        self.page.set_default_timeout(60_000)
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _console(self, message: ConsoleMessage) -> None:
        # The front end opens with a workflow of its own and looks, now or later, whether its models can be downloaded.
        if message.type == "error" and "z_image_turbo" not in message.text:
            self.errors.append(message.text)

    def load(self, workflow: Workflow) -> None:
        """Open a workflow, as a file that is dragged into the window."""
        self.page.evaluate("() => { window.app.extensionManager.focusMode = false }")
        self.page.evaluate("workflow => window.app.loadGraphData(workflow)", workflow)

    def prompt(self) -> dict[str, Any]:
        """The open workflow in API format, as the front end would send it."""
        return json.loads(self.page.evaluate("async () => JSON.stringify((await window.app.graphToPrompt()).output)"))

    def start(self) -> None:
        """Press Run."""
        self.page.evaluate(
            """() => {
                window.ended = new Promise(resolve => {
                    for (const end of ["execution_success", "execution_error", "execution_interrupted"])
                        window.app.api.addEventListener(end, event => resolve({end, ...event.detail}), {once: true})
                })
            }"""
        )
        self.page.get_by_test_id("queue-button").click()

    def wait(self) -> dict[str, Any]:
        """The end of what `start` began: {"end": "execution_success", "execution_error" or "execution_interrupted", ...}."""
        return self.page.evaluate("() => window.ended")

    def run(self) -> None:
        """Press Run and wait until the pictures are there."""
        self.start()
        result = self.wait()
        if result["end"] != "execution_success":
            raise RuntimeError(f"{result['end']}: {result.get('node_type')}: {result.get('exception_message')}")
        self.look_at(0.3, 200, 600)  # the front end fetches the pictures of nodes that it draws, and no others
        self.page.wait_for_function(
            """() => window.app.rootGraph.nodes.every(n => {
                const pictures = n.imgs ?? []
                const expected = window.app.nodeOutputs[n.id]?.images?.length > 0
                return (pictures.length > 0 || !expected) && pictures.every(i => i.complete && i.naturalWidth > 0)
            })"""
        )

    def nodes(self) -> dict[str, dict[str, Any]]:
        """By title: type, whether it is known, box [left, top, right, bottom] with its title bar, widgets, inputs, pictures."""
        return self.page.evaluate(
            """() => Object.fromEntries(window.app.rootGraph.nodes.map(n => [n.title, {
                id: n.id,
                type: n.type,
                known: n.type in window.LiteGraph.registered_node_types,
                box: [n.pos[0], n.pos[1] - window.LiteGraph.NODE_TITLE_HEIGHT, n.pos[0] + n.size[0], n.pos[1] + n.size[1]],
                widgets: Object.fromEntries((n.widgets ?? []).map(w => [w.name, w.value])),
                inputs: (n.inputs ?? []).map(i => i.name),
                pictures: (n.imgs ?? []).map(i => i.src),
            }]))"""
        )

    def show(self, margin: int = 20, widest: int = 1800) -> None:
        """Fit the window to the whole workflow and leave nothing else in it."""
        self.page.evaluate("() => { window.app.extensionManager.focusMode = true }")
        boxes = [node["box"] for node in self.nodes().values()]
        left, top = (min(box[i] for box in boxes) - margin for i in (0, 1))
        width, height = (max(box[i + 2] for box in boxes) + margin - start for i, start in ((0, left), (1, top - 20)))
        scale = min(1.0, widest / width)
        self.page.set_viewport_size({"width": round(scale * width), "height": round(scale * height)})
        self.look_at(scale, -left, 20 - top)
        self.page.wait_for_timeout(700)  # the fields over the canvas follow it a few frames later

    def look_at(self, scale: float, x: float, y: float) -> None:
        """Show the workflow with its origin at scale * (x, y)."""
        self.page.evaluate(
            """([scale, x, y]) => {
                const canvas = window.app.canvas
                canvas.deselectAll()
                canvas.resize()
                canvas.ds.scale = scale
                canvas.ds.offset = [x, y]
                canvas.setDirty(true, true)
            }""",
            [scale, x, y],
        )

    def on_screen(self) -> dict[str, list[float]]:
        """By title: the box of a node with its title bar in pixels of the window."""
        scale, x, y = self.page.evaluate("() => [window.app.canvas.ds.scale, ...window.app.canvas.ds.offset]")
        return {
            title: [scale * (value + (x, y)[i % 2]) for i, value in enumerate(node["box"])]
            for title, node in self.nodes().items()
        }
