"""`--full`: the counts that take long, and a report of what ran with how many."""

import platform
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "tests"  # report-<part>.md of the newest ComfyUI, report-<part>-<version>.md of others

_counts = pytest.StashKey[dict[str, int]]()
_notes = pytest.StashKey[dict[str, list[str]]]()
_start = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the counts that take long; writes a report into tests/")
    parser.addoption("--part", help="the report's name, where several processes run a part of the tests each")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_counts], config.stash[_notes], config.stash[_start] = {}, {}, time.monotonic()


@pytest.fixture
def count(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """`count(some, full)`: how many cases to run; the number goes into the report."""

    def choose(some: int, full: int) -> int:
        number = full if request.config.getoption("--full") else some
        request.config.stash[_counts][request.node.nodeid] = number
        return number

    return choose


@pytest.fixture
def ran(request: pytest.FixtureRequest) -> Callable[[int], None]:
    """`ran(number)`: how many cases there were in the end, where `count` only bounds it."""
    return lambda number: request.config.stash[_counts].__setitem__(request.node.nodeid, number)


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """`note(line)`: a line for the report, under the test's name."""
    return lambda line: request.config.stash[_notes].setdefault(request.node.nodeid, []).append(line)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.getoption("--full"):
        return
    from dev.setup_host import NEWEST, prepare

    part = config.getoption("--part")
    results = {kind: len(terminalreporter.stats.get(kind, [])) for kind in ("passed", "failed", "error", "skipped")}
    comfyui = (prepare()["comfyui"] / "comfyui_version.py").read_text().split('"')[-2]
    # The reports themselves, which the other process may have written just now, do not count as changes.
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--", ".", ":!tests/report*.md"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    commit = subprocess.run(["git", "describe", "--always"], cwd=ROOT, capture_output=True, text=True, check=False)
    pack = commit.stdout.strip() + ("-dirty" if changed.stdout else "")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "hypothesis", "pytest", "safetensors"))
    lines = [
        "# The last `make test-full`" + (f": {part}" if part else ""),
        "",
        f"* {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, {(time.monotonic() - config.stash[_start]) / 60:.0f} minutes",
        f"* ComfyUI {comfyui}, Python {platform.python_version()}, {packages}; {platform.machine()}, pack at {pack}",
        f"* {', '.join(f'{number} {kind}' for kind, number in results.items())}",
        "",
        "| test | cases |",
        "|---|---|",
        *(f"| {test.removeprefix('tests/')} | {number} |" for test, number in sorted(config.stash[_counts].items())),
        "",
        "## Failures",
        "",
        *(
            f"* {report.nodeid}: `{str(report.longrepr).strip().splitlines()[-1][:200]}`"
            for kind in ("failed", "error")
            for report in terminalreporter.stats.get(kind, [])
        ),
        *([] if results["failed"] or results["error"] else ["none"]),
    ]
    for test, notes in sorted(config.stash[_notes].items()):
        lines += ["", f"## {test.removeprefix('tests/')}", "", *(f"* {line}" for line in notes)]
    report = REPORTS / ("-".join(filter(None, ["report", part, comfyui if comfyui != NEWEST else None])) + ".md")
    report.write_text("\n".join(lines).encode("ascii", "replace").decode() + "\n")
    terminalreporter.write_line(f"report: {report}")
