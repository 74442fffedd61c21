"""The walls of the house: who may import whom, and what an import may need."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STANDARD = set(sys.stdlib_module_names)


def imports(path: Path, everywhere: bool) -> set[str]:
    """Dotted names a file imports; `everywhere` includes imports inside functions. Relative ones start with dots."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else tree.body
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", ["operators", "samplers"])
def test_mathematics_imports_torch_only(folder: str) -> None:
    for path in sources(folder):
        outside = {name.split(".")[0] for name in imports(path, everywhere=True) if not name.startswith(".")} - STANDARD
        allowed = {"torch", "safetensors"} if path.name == "io.py" else {"torch"}
        assert outside <= allowed, (path, outside)
        assert not any(name.startswith("..") for name in imports(path, everywhere=True)), f"{path} leaves its folder"


def test_only_host_touches_comfyui_and_only_inside_functions() -> None:
    internals = ("comfy", "comfy_extras", "execution", "folder_paths", "latent_preview", "node_helpers", "nodes", "server")
    for path in sources("nodes"):
        inside = "host" in path.relative_to(ROOT / "nodes").parts
        found = {name for name in imports(path, everywhere=not inside) if name.split(".")[0] in internals}
        assert not found, (path, found)


def test_prior_needs_no_comfyui() -> None:
    for path in sources("prior"):
        outside = {name.split(".")[0] for name in imports(path, everywhere=True) if not name.startswith(".")} - STANDARD
        assert outside <= {"torch", "numpy", "PIL", "safetensors"}, (path, outside)


def test_root_imports_with_the_standard_library_alone() -> None:
    """In an interpreter that sees no installed package."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('pack', {str(ROOT / '__init__.py')!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "assert callable(module.comfy_entrypoint)\n"
        f"assert not any('site-packages' in p for p in sys.path), sys.path\n"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_mathematics_imports_where_there_is_no_comfyui(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import operators, samplers; assert 'comfy' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_sources_are_ascii_and_without_machine_paths() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(lambda n: n.endswith((".py", ".toml", ".json", ".txt")) or n in ("Makefile", ".ci/run"), tracked):
        if (ROOT / name).is_file():
            text = (ROOT / name).read_bytes()
            assert text.isascii(), name


def test_no_runtime_dependency_is_declared() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == []
