"""make serve: ComfyUI with the pack and its templates, until Ctrl-C; `make serve PORT=8200` for a port of your own.

Arguments go to ComfyUI, for example --cpu.
"""

import os
import socket
import sys
from pathlib import Path

from server import command, free_port
from setup_host import SetupError, prepare

USUAL_PORT = 8188  # ComfyUI's own, when nobody has it


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available()


def pick_port() -> int:
    """The environment's PORT, else a free one.

    Raises:
        SetupError: PORT is no port.
    """
    wanted = os.environ.get("PORT")
    if wanted:
        if not (wanted.isdecimal() and 0 < int(wanted) < 65536):
            raise SetupError(f"PORT={wanted} is no port: give a number from 1 to 65535.")
        return int(wanted)
    with socket.socket() as s:
        return USUAL_PORT if s.connect_ex(("127.0.0.1", USUAL_PORT)) else free_port()


def model_folders(comfyui: Path, base: Path) -> list[str]:
    """Let the server see the models of a checkout the user named, which --base-directory would hide."""
    folders = sorted(path.name for path in (comfyui / "models").glob("*/"))
    lines = ["theirs:", f"  base_path: {comfyui}", *(f"  {name}: models/{name}" for name in folders)]
    config = base / "extra_model_paths.yaml"
    config.write_text("\n".join(lines) + "\n")
    return ["--extra-model-paths-config", str(config)]


def main() -> int:
    try:
        port = pick_port()
        paths = prepare()
    except SetupError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 1
    base = paths["base"]
    extra = sys.argv[1:] or ([] if has_gpu() else ["--cpu"])
    extra += ["--database-url", f"sqlite:///{base / 'user' / 'comfyui.db'}"]
    if os.environ.get("COMFYUI_DIR"):
        extra += model_folders(paths["comfyui"], base)
    print(f"ComfyUI will answer at http://127.0.0.1:{port} ; the templates are under Templates > comfyui-posterior.")
    print(f"Models go into {base / 'models'}, results into {base / 'output'}. Ctrl-C stops it.", flush=True)
    os.chdir(base)
    # Replaced, not started beside: a signal then reaches ComfyUI itself.
    arguments = command(sys.executable, paths["comfyui"], base, port, *extra)
    return os.execv(arguments[0], arguments)


if __name__ == "__main__":
    sys.exit(main())
