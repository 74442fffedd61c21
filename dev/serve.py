"""make serve: ComfyUI with the pack and its templates, until Ctrl-C; `make serve PORT=8200` for a port of your own.

Arguments go to ComfyUI, for example --cpu.
"""

import errno
import os
import shutil
import socket
import sys
from pathlib import Path

from server import THREADS_SLEEP, command, free_port
from setup_host import SetupError, prepare

USUAL_PORT = 8188  # ComfyUI's own, when nobody has it


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available()


def pick_port() -> int:
    """The environment's PORT, else a free one.

    Raises:
        SetupError: PORT is no port, or not free.
    """
    wanted = os.environ.get("PORT")
    if not wanted:
        return free_port() if unusable(USUAL_PORT) else USUAL_PORT
    if not (wanted.isdecimal() and 0 < int(wanted) < 65536):
        raise SetupError(f"PORT={wanted} is no port: give a number from 1 to 65535.")
    if why := unusable(int(wanted)):
        raise SetupError(f"PORT={wanted} cannot be used ({why}): give another, or none for one that is free.")
    return int(wanted)


def unusable(port: int) -> str | None:
    """Why nothing can listen there."""
    with socket.socket() as s:
        if s.connect_ex(("127.0.0.1", port)) == 0:
            return os.strerror(errno.EADDRINUSE)
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as ComfyUI does: one that has just ended is no hindrance
        try:
            s.bind(("127.0.0.1", port))
        except OSError as error:
            return error.strerror
    return None


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
    # Of its own for each port: ComfyUI locks it, and two servers may run at once. None is kept for a port that comes by chance.
    name = "comfyui.db" if port == USUAL_PORT else f"comfyui-{port}.db"
    kept = port == USUAL_PORT or os.environ.get("PORT")
    extra += ["--database-url", f"sqlite:///{base / 'user' / name}" if kept else "sqlite:///:memory:"]
    photo = base / "input" / "example.png"  # ComfyUI's own, which three of the templates name
    photo.parent.mkdir(exist_ok=True)
    theirs = paths["comfyui"] / "input" / "example.png"
    if theirs.exists() and not photo.exists():
        shutil.copyfile(theirs, photo)
    models = [base / "models"]
    if os.environ.get("COMFYUI_DIR"):
        extra += model_folders(paths["comfyui"], base)
        models.insert(0, paths["comfyui"] / "models")
    print(f"ComfyUI will answer at http://127.0.0.1:{port} ; the templates are under Templates > comfyui-posterior.")
    print(f"Models go into {' or '.join(map(str, models))}, results into {base / 'output'}. Ctrl-C stops it.", flush=True)
    os.chdir(base)
    # Replaced, not started beside: a signal then reaches ComfyUI itself.
    arguments = command(sys.executable, paths["comfyui"], base, port, *extra)
    return os.execve(arguments[0], arguments, {**THREADS_SLEEP, **os.environ})


if __name__ == "__main__":
    sys.exit(main())
