"""The pack runs no code from data, talks to no network, and reads and writes in ComfyUI's folders only: by its source, and by its deeds.

One exception, in Compare: where the user has installed the package lpips and its weights, that package reads its network from
PyTorch's cache, as `nodes.readouts.lpips_distance` says. Nothing is downloaded then either; the last test does it.
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("__init__.py", "nodes", "operators", "samplers", "prior")
CALLS = {"eval", "exec", "compile", "__import__", "breakpoint", "input"}
MODULES = {
    "pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "code", "codeop", "runpy", "ctypes", "cffi", "socket",
    "ssl", "http", "urllib", "urllib3", "requests", "aiohttp", "httpx", "ftplib", "smtplib", "websocket", "websockets", "webbrowser",
    "subprocess", "pty", "builtins", "posix", "huggingface_hub", "torchvision", "lpips", "multiprocessing", "concurrent",
    "socketserver", "xmlrpc", "imaplib", "poplib", "telnetlib", "nntplib",
}  # fmt: skip
# By their full names; one that ends with a star stands for all that begin so.
USES = (
    "torch.load", "torch.save", "torch.compile", "torch.hub.load*", "torch.hub.download_url_to_file", "torch.jit.load",
    "torch.jit._load*", "torch.package.*", "torch.multiprocessing.*", "torch.distributed.*", "torch.ops.load_library",
    "torch.serialization.*", "os.system", "os.popen", "os.exec*", "os.spawn*", "os.posix_spawn*", "os.fork*", "os.startfile",
    "importlib.import_module", "importlib.reload", "importlib.util.spec_from*", "importlib.util.module_from_spec", "importlib.machinery.*",
    "asyncio.open_connection", "asyncio.open_unix_connection", "asyncio.start_server", "asyncio.create_subprocess*", "yaml.load",
    "yaml.unsafe_load", "numpy.frombuffer",
)  # fmt: skip
SCRIPT = re.compile(
    r"\beval\(|\bFunction\(|\bimport\(|\bfetch\(|XMLHttpRequest|WebSocket|EventSource|sendBeacon|https?://|innerHTML|document\.write"
)
EXCEPTION = ["nodes/readouts.py: imports lpips"]
# Training makes its pictures and steps in several processes. No published archive has it, and no node loads it: the deeds show that.
TRAINING = (
    "prior/training/data.py: imports multiprocessing",
    "prior/training/run.py: imports multiprocessing",
    "prior/training/run.py: uses torch.distributed.",
    "prior/training/loop.py: uses torch.distributed.",
)


def sources() -> list[Path]:
    paths = [
        path for name in SHIPPED for path in ([ROOT / name] if name.endswith(".py") else sorted((ROOT / name).rglob("*.py")))
    ]
    assert len(paths) > 60
    return paths


def scripts() -> list[Path]:
    paths = sorted(path for kind in ("js", "mjs", "html") for path in (ROOT / "web").rglob(f"*.{kind}"))
    assert paths
    return paths


def forbidden(name: str) -> bool:
    return any(name == use or (use.endswith("*") and name.startswith(use[:-1])) for use in USES)


def suspicious(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    found, meant = [], {}  # what a local name stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                meant[alias.asname or alias.name.split(".")[0]] = alias.name if alias.asname else alias.name.split(".")[0]
            found += [f"imports {name}" for name in {alias.name.split(".")[0] for alias in node.names} & MODULES]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            meant |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found += [f"imports {name}" for name in {node.module.split(".")[0]} & MODULES]
            found += [f"imports {name}" for alias in node.names if forbidden(name := f"{node.module}.{alias.name}")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in CALLS:
            found.append(f"uses {node.id}")
        if isinstance(node, ast.Attribute | ast.Call) and forbidden(name := full_name(node, meant)):
            found.append(f"uses {name}")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and getattr(node.value, "value", None) is not False:
            found.append("allows pickles")
    return [f"{path.relative_to(ROOT)}: {what}" for what in found]


def full_name(node: ast.expr, meant: dict[str, str]) -> str:
    """a.b.c of an expression, with a as it was imported, and of getattr(a.b, "c"); empty where there is another call or the like."""
    if isinstance(node, ast.Name):
        return meant.get(node.id, node.id)
    if isinstance(node, ast.Call) and full_name(node.func, meant) == "getattr" and len(node.args) > 1:
        owner, name = full_name(node.args[0], meant), getattr(node.args[1], "value", "")
        return f"{owner}.{name}" if owner else ""
    if isinstance(node, ast.Attribute) and (owner := full_name(node.value, meant)):
        return f"{owner}.{node.attr}"
    return ""


def test_no_source_runs_data_or_talks_to_a_network() -> None:
    found = [what for path in sources() for what in suspicious(path)]
    assert [what for what in found if not what.startswith(TRAINING)] == EXCEPTION


def test_no_script_runs_data_or_talks_to_a_network() -> None:
    assert {path.name: SCRIPT.findall(path.read_text()) for path in scripts()} == {path.name: [] for path in scripts()}


@pytest.mark.parametrize(
    "line",
    [
        "eval('1')",
        "run = exec",
        "import pickle",
        "from urllib.request import urlopen",
        "import torch\ntorch.load(x)",
        "import torch as t\nt.load(x)",
        "from torch import load",
        "from torch import hub\nhub.load(x)",
        "import torch.hub\ntorch.hub.load_state_dict_from_url(x)",
        "from os import system",
        "import os\nos.execvp(x, y)",
        "import os\nos.fork()",
        "import importlib\nimportlib.import_module(name)",
        "from importlib import import_module as load",
        "import asyncio\nasyncio.open_connection(x)",
        "import numpy as np\nnp.load(x, allow_pickle=True)",
        "from multiprocessing.connection import Client",
        "from concurrent.futures import ProcessPoolExecutor",
        "import xmlrpc.client",
        "import torch\ntorch.package.PackageImporter(x)",
        "from torch.package import PackageImporter",
        "import torch\ntorch.jit._load_for_lite_interpreter(x)",
        "import torch\ntorch.ops.load_library(x)",
        "import torch.distributed as dist\ndist.init_process_group(x)",
        'import torch\ngetattr(torch, "load")(x)',
        'import torch as t\ngetattr(t.hub, "load")(x)',
    ],
)
def test_the_search_finds_it(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bad.py"
    path.write_text(line)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert len(suspicious(path)) == 1


@pytest.mark.parametrize(
    "line", ["eval(x)", "new Function(x)", "await import(x)", 'fetch("/x")', 'src = "https://x"', "a.innerHTML = x"]
)
def test_the_search_of_scripts_finds_it(line: str) -> None:
    assert SCRIPT.search(line)


# In a process of its own: the hook cannot be taken off again. What ComfyUI and PyTorch do while they are imported is not ours.
# safetensors opens files where no hook sees it, so that its functions are wrapped, and the folders that a stray file would be in
# (home, temporary, current) are empty before and looked at afterwards.
PROGRAM = """
import json, os, sys, tempfile
from pathlib import Path
root, cache = Path(sys.argv[1]), sys.argv[2]
sys.path[:0] = [str(root), str(root / "tests")]
from support.in_process import load_pack, start_comfyui
base = start_comfyui("--cpu")
import torch, comfy.sd, comfy.samplers, comfy.controlnet, comfy_api.latest, folder_paths, latent_preview, server, PIL.PngImagePlugin
import comfy_extras.nodes_custom_sampler, torch.utils.checkpoint, torch._subclasses.fake_tensor
import safetensors, safetensors.torch
from comfy_api.latest import io

seen, alive, ready = [], True, {}
writable = [base.name, os.devnull]
readable = [*writable, str(root), os.path.dirname(folder_paths.__file__), sys.prefix, sys.base_prefix, "/proc", "/sys", "/etc", "/usr", "/dev/shm"]

def allowed(path, roots):
    if isinstance(path, int):
        return True
    path = os.path.realpath(os.fsdecode(path))
    if roots is readable and "__pycache__" in path:
        return True
    return any(path == top or path.startswith(top + os.sep) for top in map(os.path.realpath, roots))

def ours(depth):
    frame = sys._getframe(depth)
    return Path(frame.f_code.co_filename).is_relative_to(root)

def note(event, *arguments):
    seen.append(f"{event} {arguments!r:.200}")

def hook(event, arguments):
    if not alive:
        return
    if event.split(".")[0] in ("socket", "subprocess", "urllib", "http", "ftplib", "smtplib", "ctypes", "webbrowser", "pickle"):
        note(event, *arguments)
    elif event in ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.startfile", "shutil.rmtree"):
        note(event, *arguments)
    elif event in ("exec", "compile", "builtins.input", "marshal.loads") and ours(2):
        note(event, *arguments)
    elif event == "open":
        path, mode, flags = arguments[0], arguments[1] or "", arguments[2] or 0
        writes = any(letter in mode for letter in "wxa+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not allowed(path, writable if writes else readable):
            note(event, *arguments)
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.rename", "os.link", "os.symlink"):
        paths = arguments[:2] if event in ("os.rename", "os.link", "os.symlink") else arguments[:1]
        if not all(allowed(path, writable) for path in paths):
            note(event, *arguments)
    elif event in ("os.listdir", "os.scandir") and ours(2) and not allowed(arguments[0] or ".", readable):
        note(event, *arguments)

def watched(module, name, at, roots):
    before = getattr(module, name)
    def call(*args, **kwargs):
        if not allowed(args[at], roots):
            note(f"safetensors.{name}", args[at])
        return before(*args, **kwargs)
    setattr(module, name, call)

watched(safetensors, "safe_open", 0, readable)
watched(safetensors.torch, "load_file", 0, readable)
watched(safetensors.torch, "save_file", 1, writable)
sys.addaudithook(hook)
there = set(os.listdir(tempfile.gettempdir()))  # PyTorch makes a folder while it is imported
pack = load_pack()
nodes = {node.define_schema().node_id: node for node in pack.nodes.NODES}
refused = {}

def value(spec):
    if isinstance(spec, io.DynamicCombo.Input):
        option = spec.options[0]
        return {spec.id: option.key, **{inner.id: value(inner) for inner in option.inputs}}
    if spec.io_type in ready:
        return ready[spec.io_type]
    return spec.options[0] if spec.default is None else spec.default

def run(name, **given):
    node = nodes.pop(name)
    inputs = {spec.id: value(spec) for spec in node.define_schema().inputs if spec.id not in given and not spec.optional}
    try:
        return node.execute(**inputs, **given).args
    except ValueError as error:
        refused[name] = str(error)

with torch.inference_mode():
    model, clip, vae = run("PosteriorLoadDemoPrior")
    (picture,) = run("PosteriorDemoPictures")
    ready |= {"MODEL": model, "VAE": vae, "IMAGE": picture, "MASK": torch.zeros(1, 128, 128), "LATENT": {"samples": torch.zeros(1, 4, 16, 16)}}
    ready["MASK"][:, 40:80, 40:80] = 1
    ready["CONDITIONING"] = clip.encode_from_tokens_scheduled(clip.tokenize("a portrait"))
    (ready["LINEAR_OPERATOR"],) = run("PosteriorDownscale")
    (ready["MEASUREMENT"], _, _) = run("PosteriorMeasureSimulate")
    run("PosteriorSaveMeasurement", filename_prefix="measurements/audit")
    (ready["MEASUREMENT"], _, _) = run("PosteriorLoadMeasurement", file="measurements/audit_00001_.safetensors [output]")
    (image, *_) = run("PosteriorRestore", quality="fast")
    compare = nodes["PosteriorCompare"]
    edge = torch.sigmoid((torch.arange(128.0) - 64) / 2)[:, None].expand(1, 128, 128, 3) * 0.8 + 0.1
    lines = picture.clone()
    lines[:, 3::16] = 0
    run("PosteriorEstimateBlur", photo=edge)
    run("PosteriorEstimateStripes", photo=lines)
    run("PosteriorEstimateNoise", photo=edge + 0.03 * torch.randn(edge.shape, generator=torch.Generator().manual_seed(0)))
    run("PosteriorUncertainty", samples=torch.cat([picture, image]))
    run("PosteriorMemoryEstimate", measurement=ready["MEASUREMENT"], vae=ready["VAE"])
    for name in list(nodes):
        run(name)
assert image.shape == picture.shape
checks, alive = len(seen), False
files = sorted(str(path.relative_to(base.name)) for path in Path(base.name).rglob("*") if path.is_file())
strays = sorted(os.listdir()) + sorted(os.listdir(Path.home())) + sorted(set(os.listdir(tempfile.gettempdir())) - there)
alive = True
for blind in (lambda: open("probe", "w").close(), lambda: os.rename("probe", b"probe2"), lambda: os.remove("probe2"), lambda: open(cache + "/x").close(),
              lambda: open("__pycache__", "w").close(),
              lambda: safetensors.torch.save_file({}, "probe")):
    before = len(seen)
    blind()
    assert len(seen) == before + 1, f"the hook is blind: {seen[before:]}"
before = len(seen)
with torch.inference_mode():
    text = compare.execute(picture, picture, 0.2).ui["text"][0]
assert "LPIPS" not in text
sys.path.insert(0, cache)
torch.hub.set_dir(cache)
with torch.inference_mode():
    text = compare.execute(picture, picture, 0.2).ui["text"][0]
alive = False
training = [name for name in sys.modules if "prior.training" in name]
print(json.dumps({"seen": seen[:checks], "training": training, "refused": refused, "files": files, "strays": strays, "perceived": text, "then": seen[before:]}))
"""

LPIPS = """
import torch
class LPIPS(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.hub.load_state_dict_from_url("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth")  # as torchvision does
    def forward(self, a, b):
        return (a - b).abs()
"""


@pytest.fixture(scope="module")
def deeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What happened while every node ran once, and then Compare beside a package that stands in for lpips."""
    folder = tmp_path_factory.mktemp("audit").resolve()
    homes = {name: folder / name for name in ("home", "temporary", "current", "cache")}
    for path in homes.values():
        path.mkdir()
    (homes["cache"] / "x").touch()
    (homes["cache"] / "lpips.py").write_text(LPIPS)
    (homes["cache"] / "checkpoints").mkdir()
    torch.save({}, homes["cache"] / "checkpoints" / "alexnet-owt-7be5be79.pth")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(ROOT), str(homes["cache"])],
        capture_output=True,
        text=True,
        check=False,
        cwd=homes["current"],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "COMFYUI_DIR_FOR_TESTS": folder_of_comfyui(),
            "HOME": str(homes["home"]),
            "TMPDIR": str(homes["temporary"]),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def folder_of_comfyui() -> str:
    command = [sys.executable, str(ROOT / "dev" / "setup_host.py"), "comfyui"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return os.environ.get("COMFYUI_DIR_FOR_TESTS") or found.stdout.strip()


def test_nothing_is_done_that_the_source_does_not_show(deeds: dict[str, object]) -> None:
    """Import the pack and run every node, under an audit hook."""
    assert deeds["seen"] == []
    assert deeds["refused"] == {}
    assert deeds["training"] == []


def test_files_are_written_into_comfyuis_folders_only(deeds: dict[str, object]) -> None:
    assert deeds["strays"] == []
    assert [name for name in deeds["files"] if not name.startswith(("temp/", "user/"))] == [
        "output/measurements/audit_00001_.safetensors"
    ]


def test_lpips_reads_its_network_from_the_cache_and_downloads_nothing(deeds: dict[str, object]) -> None:
    """The one read outside of ComfyUI's folders; without package and weights there is none."""
    assert deeds["perceived"].endswith("LPIPS 0.0000")
    assert deeds["then"], "the cache was not read"
    assert [event for event in deeds["then"] if not ("lpips.py" in event or "checkpoints" in event)] == []
