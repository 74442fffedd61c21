"""Files of the user in ComfyUI's own input and output folders, and nowhere else."""

import os
from pathlib import Path


def stored(suffix: str) -> list[str]:
    """Files with this suffix, as ComfyUI names them: those of the output folder have " [output]" behind."""
    import folder_paths

    found = []
    for folder, mark in ((folder_paths.get_input_directory(), ""), (folder_paths.get_output_directory(), " [output]")):
        root = Path(folder).resolve()
        paths = (path for path in root.rglob(f"*{suffix}") if path.is_file() and path.resolve().is_relative_to(root))
        found += sorted(f"{path.relative_to(root).as_posix()}{mark}" for path in paths)
    return found


def find(argument: str, name: str, suffix: str) -> Path:
    """The path behind such a name.

    Args:
        argument: whose value it is, for messages.

    Raises:
        ValueError: it leads out of the two folders, has another suffix, or there is no such file.
    """
    import folder_paths

    plain, folder = folder_paths.annotated_filepath(name)
    root = Path(folder or folder_paths.get_input_directory()).resolve()
    if root == Path(folder_paths.get_temp_directory()).resolve() or not _inside(root, plain):
        raise ValueError(f"{argument}: {name!r} is outside ComfyUI's input and output folders; choose a file from the list")
    path = (root / plain).resolve()
    if path.suffix != suffix or not path.is_file():
        raise ValueError(f"{argument}: there is no file {name!r} of kind {suffix} in {root}; choose one from the list")
    return path


def new(argument: str, prefix: str, suffix: str) -> tuple[Path, dict[str, str]]:
    """The path of a file to be written into the output folder, numbered on, and how ComfyUI names it.

    Args:
        argument: whose value `prefix` is, for messages.
        prefix: subfolder and begin of the name; %year% and the like are filled in.

    Raises:
        ValueError: the prefix is empty, too long, or leads out of the output folder.
    """
    import folder_paths

    root = Path(folder_paths.get_output_directory()).resolve()
    if not prefix.strip() or not _inside(root, prefix):
        raise ValueError(
            f"{argument}: got {prefix!r}, expected a name within ComfyUI's output folder, for example measurements/posterior"
        )
    try:
        folder, name, number, subfolder, _ = folder_paths.get_save_image_path(os.path.normpath(prefix), str(root))
        # The host counts files of other kinds otherwise.
        while (Path(folder) / (file := f"{name}_{number:05}_{suffix}")).exists():
            number += 1
    except OSError as error:
        raise ValueError(
            f"{argument}: {prefix[:80]!r} cannot be made a file ({error.strerror}); choose another name"
        ) from error
    return Path(folder) / file, {"filename": file, "subfolder": subfolder, "type": "output"}


def _inside(root: Path, name: str) -> bool:
    try:
        path = (root / name).resolve()
    except (ValueError, OSError, RuntimeError):  # a null character, a name too long, a loop of links
        return False
    return path != root and path.is_relative_to(root)
