"""The pack runs no code from data, talks to no network, and writes into ComfyUI's folders only: by its source, and by its deeds."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("__init__.py", "nodes", "operators", "samplers", "prior")
CALLS = {"eval", "exec", "compile", "__import__", "breakpoint", "input"}
MODULES = {
    "pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "code", "codeop", "runpy", "ctypes", "cffi", "socket", "ssl",
    "http", "urllib", "urllib3", "requests", "aiohttp", "httpx", "ftplib", "smtplib", "websocket", "websockets", "webbrowser",
    "subprocess", "pty", "huggingface_hub",
}  # fmt: skip
METHODS = {
    ("torch", "load"), ("torch", "save"), ("hub", "load"), ("hub", "load_state_dict_from_url"), ("hub", "download_url_to_file"), ("torch", "compile"), ("os", "system"), ("os", "popen"),
    ("os", "spawnv"), ("os", "execv"), ("yaml", "load"), ("np", "frombuffer"),
}  # fmt: skip


def sources() -> list[Path]:
    paths = [
        path for name in SHIPPED for path in ([ROOT / name] if name.endswith(".py") else sorted((ROOT / name).rglob("*.py")))
    ]
    assert len(paths) > 60
    return paths


def suspicious(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "").split(".")[0]} if node.level == 0 else set()
        else:
            names = set()
        found += [f"imports {name}" for name in names & MODULES]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
            found.append(f"calls {node.func.id}")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and (node.value.id, node.attr) in METHODS:
            found.append(f"uses {node.value.id}.{node.attr}")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and getattr(node.value, "value", None) is not False:
            found.append("allows pickles")
    return [f"{path.relative_to(ROOT)}: {what}" for what in found]


def test_no_source_runs_data_or_talks_to_a_network() -> None:
    assert [what for path in sources() for what in suspicious(path)] == []


@pytest.mark.parametrize(
    "line",
    ["eval('1')", "import pickle", "from urllib.request import urlopen", "torch.load(x)", "np.load(x, allow_pickle=True)"],
)
def test_the_search_finds_it(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bad.py"
    path.write_text(line)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert len(suspicious(path)) == 1


# In a process of its own: the hook cannot be taken off again. What ComfyUI and PyTorch do while they are imported is not ours.
PROGRAM = """
import json, os, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from support.in_process import load_pack, start_comfyui
base = start_comfyui("--cpu")
import torch, comfy.sd, comfy.samplers, comfy.controlnet, comfy_api.latest, folder_paths, latent_preview, server, PIL.PngImagePlugin
import comfy_extras.nodes_custom_sampler, torch.utils.checkpoint, torch._subclasses.fake_tensor

root, seen, alive = Path(sys.argv[1]), [], True
allowed = (base.name, "/dev/null")

def ours(depth):
    frame = sys._getframe(depth)
    return Path(frame.f_code.co_filename).is_relative_to(root)

def hook(event, arguments):
    if not alive:
        return
    if event.split(".")[0] in ("socket", "subprocess", "urllib", "http", "ftplib", "smtplib", "ctypes", "webbrowser", "pickle"):
        seen.append(f"{event} {arguments!r:.200}")
    elif event in ("os.system", "os.exec", "os.posix_spawn", "os.fork", "shutil.rmtree"):
        seen.append(f"{event} {arguments!r:.200}")
    elif event in ("exec", "compile", "builtins.input", "marshal.loads") and ours(2):
        seen.append(f"{event} {arguments!r:.200}")
    elif event == "open" and isinstance(arguments[0], str):
        mode, flags = arguments[1] or "", arguments[2] or 0
        writes = any(letter in mode for letter in "wxa+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and not os.path.abspath(arguments[0]).startswith(allowed) and "__pycache__" not in arguments[0]:
            seen.append(f"open {arguments!r:.200}")
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") and not str(arguments[0]).startswith(allowed):
        if "__pycache__" not in str(arguments[0]):
            seen.append(f"{event} {arguments!r:.200}")

sys.addaudithook(hook)
pack = load_pack()
nodes = {node.define_schema().node_id: node for node in pack.nodes.NODES}
with torch.inference_mode():
    model, clip, vae = nodes["PosteriorLoadDemoPrior"].execute().args
    prompt = clip.encode_from_tokens_scheduled(clip.tokenize("a portrait"))
    picture = nodes["PosteriorDemoPictures"].execute(0, 1).args[0]
    x = (2 * picture - 1).movedim(-1, 1).double()
    operator = pack.operators.AreaDownscale((3, 128, 128), 8)
    measurement = pack.operators.Measurement(operator.A(x), operator)
    nodes["PosteriorSaveMeasurement"].execute(measurement, "measurements/audit")
    loaded = nodes["PosteriorLoadMeasurement"].execute("measurements/audit_00001_.safetensors [output]").args[0]
    given = {"method": "C-PiGDM", "quality": "fast", "seed": 0, "cfg": 1.0}
    image = nodes["PosteriorRestore"].execute(model, vae, prompt, loaded, **given).args[0]
assert image.shape == picture.shape
checks = len(seen)
try:
    open(sys.argv[1] + "/audit-probe", "w").close()  # the hook sees: this one is refused by nobody, so it is taken away again
finally:
    os.unlink(sys.argv[1] + "/audit-probe")
assert len(seen) == checks + 2, "the hook is blind"
alive = False
print(json.dumps(seen[:checks]))
"""


def test_nothing_is_done_that_the_source_does_not_show() -> None:
    """Import the pack, load the demo prior, save and load a measurement and restore it, under an audit hook."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []
