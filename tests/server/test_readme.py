"""The README's script, as it stands there."""

import re
import runpy
from pathlib import Path

import pytest
from support.server_prompts import ROOT

from dev.server import Server


def test_script_of_the_readme_runs(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "workflows").symlink_to(ROOT / "workflows", target_is_directory=True)
    (tmp_path / "script.py").write_text(script.replace("127.0.0.1:8188", server.address))
    monkeypatch.chdir(tmp_path)
    runpy.run_path("script.py")
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
