"""make serve: ComfyUI with the pack and its templates, until Ctrl-C. Arguments go to ComfyUI, for example --cpu."""

import subprocess
import sys
from pathlib import Path

from server import command, free_port
from setup_host import SetupError, prepare


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available()


def main() -> int:
    try:
        paths = prepare()
    except SetupError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 1
    port = free_port()
    extra = sys.argv[1:] or ([] if has_gpu() else ["--cpu"])
    print(f"ComfyUI will answer at http://127.0.0.1:{port} ; the templates are under Templates > comfyui-posterior", flush=True)
    arguments = command(sys.executable, Path(paths["comfyui"]), Path(paths["base"]), port, *extra)
    try:
        return subprocess.run(arguments, check=False, cwd=paths["base"]).returncode
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
