"""The real ComfyUI server, started once, with this checkout as its only pack and a base directory of its own."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.server_prompts import ROOT, SHORT, run, with_psld

from dev.server import PACK, Server, running
from dev.setup_host import SetupError, prepare


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's base directory: models, input, output, user, and custom_nodes with a link to this checkout."""
    base = tmp_path_factory.mktemp("comfyui")
    for name in ("models/checkpoints", "input", "output", "user", "custom_nodes"):
        (base / name).mkdir(parents=True)
    (base / "custom_nodes" / PACK).symlink_to(ROOT, target_is_directory=True)
    return base


@pytest.fixture(scope="session")
def server(base: Path) -> Iterator[Server]:
    try:
        comfyui = prepare()["comfyui"]
    except SetupError as error:
        pytest.fail(f"the server tests need ComfyUI: {error}")
    with pytest.MonkeyPatch.context() as patch:
        # On networks this small a second thread only waits, and on a busy machine costs many times the whole run.
        patch.setitem(os.environ, "OMP_NUM_THREADS", "1")
        with running(sys.executable, comfyui, base, base / "server.log", "--cpu") as server:
            yield server


@pytest.fixture(scope="session")
def reference(server: Server) -> np.ndarray:
    """What PSLD gives on the box when nothing disturbs it."""
    return run(server, with_psld("inpaint_box", SHORT))
