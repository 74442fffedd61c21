"""The real front end in a real Chromium, on a ComfyUI server of its own: the browser changes settings that other tests rely on."""

import os
import shutil
import sys
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from dev.browser import FrontEnd, running_browser
from dev.server import PACK, Server, running
from dev.setup_host import ROOT, SetupError, prepare


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("comfyui")
    for name in ("models/checkpoints", "input", "output", "user", "custom_nodes"):
        (base / name).mkdir(parents=True)
    (base / "custom_nodes" / PACK).symlink_to(ROOT, target_is_directory=True)
    comfyui = prepare()["comfyui"]
    shutil.copy(comfyui / "input" / "example.png", base / "input")  # as in every ComfyUI; templates for a user's photo show it
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "OMP_NUM_THREADS", "1")
        with running(sys.executable, comfyui, base, base / "server.log", "--cpu") as server:
            yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Closed before other tests run: Playwright keeps an event loop, within which asyncio.run refuses to work."""
    try:
        with running_browser() as browser:
            yield browser
    except SetupError as error:
        pytest.fail(f"the browser tests need Chromium: {error}")


@pytest.fixture(scope="module")
def front_end(browser: Browser, server: Server) -> Iterator[FrontEnd]:
    """One window for all tests; each opens a workflow of its own."""
    front_end = FrontEnd(browser, server)
    yield front_end
    front_end.page.close()
