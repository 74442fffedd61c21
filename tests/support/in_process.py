"""The real ComfyUI inside this process, and this pack in it, loaded as ComfyUI loads a custom node.

ComfyUI's folder goes in front of sys.path and its command line is parsed once, before anything of it is imported: this
repository has a folder `nodes` too, and ComfyUI reads its command line when it is first imported.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
PACK = "comfyui_posterior"


class NoComfyUI(RuntimeError):
    """ComfyUI is not there and cannot be set up."""


def start_comfyui(*arguments: str) -> tempfile.TemporaryDirectory:
    """Make `import comfy` work. Returns ComfyUI's base directory (models, input, output): its checkout is not written to."""
    sys.path.insert(0, _folder())
    base = tempfile.TemporaryDirectory(prefix="comfyui-posterior-tests-")
    own = sys.argv
    sys.argv = ["main.py", *arguments, "--base-directory", base.name]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args

        # As main.py does: later, in older versions, `utils` would be the module in ComfyUI's folder comfy/.
        importlib.import_module("utils.install_util")
    finally:
        sys.argv = own
    return base


def load_pack(pack: str = PACK) -> ModuleType:
    """The pack under this name, with its nodes, operators and samplers.

    These are other modules than the `samplers` and `operators` that pure tests import.
    """
    spec = importlib.util.spec_from_file_location(pack, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[pack] = module
    spec.loader.exec_module(module)
    for name in ("nodes", "operators", "samplers"):
        importlib.import_module(f"{pack}.{name}")
    return module


def _folder() -> str:
    given = os.environ.get("COMFYUI_DIR_FOR_TESTS")
    if given:
        return str(Path(given).resolve())
    command = [sys.executable, str(ROOT / "dev" / "setup_host.py"), "comfyui"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise NoComfyUI(f"ComfyUI is needed:\n{found.stderr}")
    return found.stdout.strip()
