"""The drawn pictures of the training, kept in files: blocks of uint8, made once."""

import hashlib
import multiprocessing
import os
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..draw import VALIDATION_SEED, draw

BLOCK = 256


@cache
def fingerprint() -> str:
    """Names what this version of the drawing code (and of Pillow) draws."""
    return hashlib.sha256(np.stack([draw(seed) for seed in range(4)]).tobytes()).hexdigest()[:12]


def draw_block(folder: Path, count: int, first: int) -> None:
    """Write the pictures of `count` seeds from `first` on; a killed run leaves no broken block."""
    path = folder / f"{first:07d}.npy"
    part = path.with_suffix(f".{os.getpid()}.part")
    with part.open("wb") as file:
        np.save(file, np.stack([draw(seed) for seed in range(first, first + count)]))
    os.replace(part, path)


def blocks(folder: Path, first: int, count: int, processes: int = 2) -> list[Path]:
    """The files with the pictures of `count` seeds from `first` on; what is missing is drawn."""
    block = min(BLOCK, count)
    if count % block:
        raise ValueError(f"the number of pictures must be below {BLOCK} or a multiple of it, got {count}")
    if first < VALIDATION_SEED < first + count:
        raise ValueError(f"seeds from {VALIDATION_SEED} on are for validation only, got {first} to {first + count - 1}")
    folder = folder / f"pictures-{fingerprint()}"
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(first, first + count, block)
    paths = [folder / f"{start:07d}.npy" for start in starts]
    missing = [start for start, path in zip(starts, paths, strict=True) if not path.exists()]
    if missing:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            for done, _ in enumerate(pool.imap_unordered(partial(draw_block, folder, block), missing), 1):
                print(f"drawn {done * block} of {len(missing) * block} pictures", file=sys.stderr, flush=True)
    return paths


def load(paths: list[Path]) -> Tensor:
    """(N, 3, 128, 128) uint8, stored channels last."""
    return torch.from_numpy(np.concatenate([np.load(path) for path in paths])).permute(0, 3, 1, 2)


def small(pictures: Tensor, size: int) -> Tensor:
    """Pictures of `size` pixels a side in [-1, 1], each pixel the mean of a square: (N, 3, 128, 128) uint8 -> (N, 3, size, size)."""
    factor = pictures.shape[-1] // size
    parts = [torch.nn.functional.avg_pool2d(part.float(), factor) for part in pictures.split(256)]
    return torch.cat(parts) / 127.5 - 1
