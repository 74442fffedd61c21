"""The real ComfyUI, on the CPU, inside the test process: `support.in_process` says how, and why before everything else."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.fault_runs import unharmed
from support.host_runs import Host
from support.host_versions import narrow_decoders
from support.in_process import NoComfyUI, load_pack, start_comfyui
from support.tiny_checkpoints import conditioning, write_checkpoint
from torch import Tensor

try:
    BASE = start_comfyui("--cpu")  # removed when the process ends
except NoComfyUI as error:
    raise pytest.UsageError(str(error)) from error
torch.set_num_threads(1)  # on networks this small, more threads only wait for each other


@pytest.fixture(scope="session")
def comfy() -> ModuleType:
    """The package `comfy`, with the submodules that tests use; ComfyUI's `nodes` can be imported too."""
    import comfy.controlnet
    import comfy.model_base
    import comfy.samplers
    import comfy.sd
    import comfy.utils

    return comfy


@pytest.fixture(scope="session")
def pack(comfy: ModuleType) -> ModuleType:
    """This pack; afterwards `import comfyui_posterior.nodes.host` works. Take classes from here in host tests."""
    return load_pack()


@pytest.fixture(scope="session")
def nodes(pack: ModuleType) -> ModuleType:
    """The pack's nodes, to be executed without a graph."""
    import comfyui_posterior.nodes  # noqa: F401

    return pack.nodes


@pytest.fixture
def start_levels(nodes: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """The levels that Restore's runs start from, in their order; None is the model's highest."""
    exact, levels = nodes.host.sigmas_of, []

    def noted(*given: Any) -> Tensor:
        levels.append(given[3])
        return exact(*given)

    monkeypatch.setattr(nodes.host, "sigmas_of", noted)
    return levels


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """`tiny(arch, **options)`: path of a checkpoint of `support.tiny_checkpoints`, written once for the session."""
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {}

    def write(arch: str, **options: Any) -> Path:
        if options.get("vae") == "kl" and not narrow_decoders():
            options.setdefault("kl_width", 128)
        key = (arch, *sorted(options.items()))
        if key not in paths:
            paths[key] = write_checkpoint(folder / f"{len(paths)}_{arch}.safetensors", arch, **options)
        return paths[key]

    yield write
    for path in paths.values():
        path.unlink()  # pytest keeps the folders of three runs, and these files are large


@pytest.fixture(scope="session")
def load(comfy: ModuleType) -> Callable[[Path], tuple[Any, Any, Any]]:
    """`model, clip, vae = load(path)`, as Load Checkpoint does; clip or vae is None where the file has none.

    ComfyUI runs every node under inference mode, so the weights are inference tensors here as they are there.
    """

    def run(path: Path) -> tuple[Any, Any, Any]:
        with torch.inference_mode():
            return comfy.sd.load_checkpoint_guess_config(str(path))[:3]

    return run


@pytest.fixture(scope="session")
def hosts(pack: ModuleType, tiny: Callable[..., Path], load: Callable) -> Callable[..., Host]:
    """`hosts(arch, **options)`: a loaded tiny checkpoint, ready to sample from; loaded once for the session."""
    made: dict[Path, Host] = {}

    def get(arch: str, **options: Any) -> Host:
        path = tiny(arch, **options)
        if path not in made:
            model, _, vae = load(path)
            made[path] = Host(pack, arch, model, vae)
        return made[path]

    return get


@pytest.fixture(scope="session")
def host(hosts: Callable[..., Host]) -> ModuleType:
    return hosts("sd15").pack.nodes.host


@pytest.fixture
def h(hosts: Callable[..., Host]) -> Iterator[Host]:
    """A host that the test must leave as it was."""
    with unharmed(hosts("sd15")) as host:
        yield host


@pytest.fixture
def restore(h: Host, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """Runs the Restore node on it, in two calls of the network."""
    node = h.pack.nodes.restore
    monkeypatch.setitem(node.CALLS["C-PiGDM"], "fast", 2)

    def run(**options: Any) -> Tensor:
        with torch.inference_mode():
            given = (h.model, h.vae, conditioning("sd15", 1), h.measurement(), "C-PiGDM", "fast", 0, 1.0)
            return node.Restore.execute(*given, memory="fastest", **options).args[0]

    return run
