"""The real ComfyUI, on the CPU, inside the test process.

Its folder goes in front of sys.path and its command line is parsed here, at import, before any test module can import
something of it: this repository has a folder `nodes` too, and ComfyUI reads its command line when it is first imported.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.tiny_checkpoints import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
PACK = "comfyui_posterior"


def _comfyui() -> str:
    given = os.environ.get("COMFYUI_DIR_FOR_TESTS")
    if given:
        return str(Path(given).resolve())
    command = [sys.executable, str(ROOT / "dev" / "setup_host.py"), "comfyui"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise pytest.UsageError(f"the host tests need ComfyUI:\n{found.stderr}")
    return found.stdout.strip()


def _prepare() -> tempfile.TemporaryDirectory:
    """Returns ComfyUI's base directory (models, input, output): nothing is written into its checkout."""
    sys.path.insert(0, _comfyui())
    base = tempfile.TemporaryDirectory(prefix="comfyui-posterior-tests-")
    own = sys.argv
    sys.argv = ["main.py", "--cpu", "--base-directory", base.name]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args
    finally:
        sys.argv = own
    return base


BASE = _prepare()  # removed when the process ends
torch.set_num_threads(1)  # on networks this small, more threads only wait for each other


@pytest.fixture(scope="session")
def comfy() -> ModuleType:
    """The package `comfy`, with the submodules that tests use; ComfyUI's `nodes` can be imported too."""
    import comfy.controlnet
    import comfy.model_base
    import comfy.samplers
    import comfy.sd
    import comfy.utils

    return comfy


@pytest.fixture(scope="session")
def pack(comfy: ModuleType) -> ModuleType:
    """This pack, loaded as ComfyUI loads a custom node; afterwards `import comfyui_posterior.nodes.host` works.

    Its `comfyui_posterior.samplers` and `.operators` are other modules than the `samplers` and `operators` that pure tests
    import: take classes from here in host tests.
    """
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """`tiny(arch, **options)`: path of a checkpoint of `support.tiny_checkpoints`, written once for the session."""
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {}

    def write(arch: str, **options: Any) -> Path:
        key = (arch, *sorted(options.items()))
        if key not in paths:
            paths[key] = write_checkpoint(folder / f"{len(paths)}_{arch}.safetensors", arch, **options)
        return paths[key]

    yield write
    for path in paths.values():
        path.unlink()  # pytest keeps the folders of three runs, and these files are large


@pytest.fixture(scope="session")
def load(comfy: ModuleType) -> Callable[[Path], tuple[Any, Any, Any]]:
    """`model, clip, vae = load(path)`, as Load Checkpoint does; clip or vae is None where the file has none.

    ComfyUI runs every node under inference mode, so the weights are inference tensors here as they are there.
    """

    def run(path: Path) -> tuple[Any, Any, Any]:
        with torch.inference_mode():
            return comfy.sd.load_checkpoint_guess_config(str(path))[:3]

    return run
