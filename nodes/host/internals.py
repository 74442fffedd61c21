"""What this ComfyUI does not have. Found by looking for it, never by the version's number, and said by name."""

import contextlib
import logging
import re
import traceback
from collections.abc import Iterator

log = logging.getLogger("comfyui-posterior")
HOST = ("comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "latent_preview", "protocol", "server")
PACK = __name__.removesuffix(".nodes.host.internals")


@contextlib.contextmanager
def naming_what_is_missing() -> Iterator[None]:
    """Inside, what ComfyUI lacks is an error in words that fails this node or run and no other.

    Raises:
        ValueError: a module of ComfyUI, or a name in one, was renamed or removed.
    """
    try:
        yield
    except (ImportError, AttributeError) as error:
        name = missing(error)
        if name is None:
            raise
        raise ValueError(
            f"this ComfyUI has no {name}, which this node needs. Update ComfyUI and comfyui-posterior; if both are the newest, "
            "please report this line"
        ) from error


@contextlib.contextmanager
def without(feature: str) -> Iterator[None]:
    """Inside, what ComfyUI lacks costs only this feature: a line in the log, and it goes on."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        name = missing(error)
        if name is None:
            raise
        log.warning("this ComfyUI has no %s: it runs without %s", name, feature)


def missing(error: ImportError | AttributeError) -> str | None:
    """The name that ComfyUI does not have, or None for an error of another kind, or of code that is not this pack's."""
    if not _of_pack(error):
        return None
    if isinstance(error, ImportError):
        module = error.name or ""
        wanted = re.search(r"cannot import name '(\w+)'", str(error))
        return f"{module}.{wanted[1]}" if wanted and _of_host(module) else module if _of_host(module) else None
    owner = error.obj
    kind = owner if isinstance(owner, type) else type(owner)
    place = getattr(owner, "__name__", "") if kind.__name__ == "module" else f"{kind.__module__}.{kind.__qualname__}"
    return f"{place}.{error.name}" if _of_host(place) else None


def _of_pack(error: Exception) -> bool:
    """Whether the name was looked up by this pack, itself or through ComfyUI: what other nodes hang on a model runs in here too."""
    names = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [i for i, name in enumerate(names) if f"{name}.".startswith(f"{PACK}.")]
    return bool(ours) and all(_of_host(name) or name.split(".")[0] == "torch" for name in names[ours[-1] + 1 :])


def _of_host(module: str) -> bool:
    return module.split(".")[0] in HOST
