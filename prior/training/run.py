"""Train the demo prior from nothing: `python -m prior.training`, or `--pixel` for its sibling on 32 x 32 pixels.

Stops and goes on at any moment: run it again. Each stage keeps in the folder its checkpoint, a table of the training
(.csv), a sample sheet (.png) and an export (.safetensors), all renewed every few minutes.
"""

import argparse
import fcntl
import multiprocessing
import os
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..networks import MULTIPLIERS, PIXEL_MULTIPLIERS, PIXEL_SIDE, Autoencoder
from . import data
from .autoencoder import TrainAutoencoder, decode, encode
from .diffusion import TrainUNet
from .loop import Plan, shorter, train, whole

PROCESSES = 2
AUTOENCODER = Plan(steps=10800, decay=0.5, warmup=20, muon=0.02, adam=2e-3, ema=0.99, clip=0.5)
UNET = Plan(steps=9000, decay=0.4, warmup=30, muon=0.02, adam=1.5e-3, ema=0.995, clip=1.0)
PIXEL_UNET = Plan(steps=5000, decay=0.4, warmup=30, muon=0.02, adam=1.5e-3, ema=0.99, clip=1.0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m prior.training", description=__doc__.split("\n")[0])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "comfyui-posterior" / "training"
    parser.add_argument("--folder", type=Path, default=cache, help=f"where everything is kept (default: {cache})")
    parser.add_argument("--pixel", action="store_true", help=f"train the prior on {PIXEL_SIDE} x {PIXEL_SIDE} pixels")
    parser.add_argument("--stage", choices=["autoencoder", "unet"], help="only this one (default: both, in this order)")
    parser.add_argument("--autoencoder-steps", type=int, help=f"default: {AUTOENCODER.steps}")
    parser.add_argument("--unet-steps", type=int, help=f"default: {UNET.steps}, with --pixel {PIXEL_UNET.steps}")
    parser.add_argument("--every", type=float, help="seconds between checkpoints (default: 240)")
    parser.add_argument("--pictures", type=int, default=16384, help="to train on")
    parser.add_argument("--validation", type=int, default=256, help="pictures to measure on")
    parser.add_argument("--samples", type=int, default=64, help="on the last sample sheet, a multiple of 8")
    parser.add_argument("--batch", type=int, default=0, help="of each process (default: the stage's own)")
    return parser.parse_args()


def latents(folder: Path, autoencoder: Autoencoder, pictures: Tensor, rank: int) -> Tensor:
    """Latents of this process's share of the pictures, kept in a file for as long as the autoencoder stays the same."""
    path = folder / f"latents-{rank}.safetensors"
    weights = torch.cat([p.flatten() for p in autoencoder.parameters()])
    mark = torch.stack([weights.double().sum(), weights.double().square().sum(), torch.tensor(float(len(pictures)))])
    if path.exists():
        saved = load_file(path)
        if torch.equal(saved["mark"], mark):
            return saved["latents"]
    z = encode(autoencoder.encoder, pictures)
    with whole(path) as part:
        save_file({"latents": z.contiguous(), "mark": mark}, part)
    return z


def work(rank: int, meeting: str, options: argparse.Namespace, drawn: list[Path], held_out: list[Path]) -> None:
    """What each process does, with the files of the pictures."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = options.folder
    store = dist.FileStore(meeting, PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timedelta(minutes=10))
    pictures, validation = data.load(drawn), data.load(held_out)
    mine = slice(rank * len(pictures) // PROCESSES, (rank + 1) * len(pictures) // PROCESSES)
    if options.pixel:
        x, validation = data.small(pictures[mine], PIXEL_SIDE), data.small(validation, PIXEL_SIDE)
        task = TrainUNet(
            folder=folder,
            name="pixels",
            multipliers=PIXEL_MULTIPLIERS,
            x=x,
            validation=validation,
            batch=options.batch or 16,
            show=lambda x: x * 0.5 + 0.5,
            samples=options.samples,
            limit=1.0,
            extra={},
        )
        train(task, shorter(PIXEL_UNET, options.unet_steps, options.every), folder)
        return
    if options.stage != "unet":
        task = TrainAutoencoder(folder, pictures[mine], validation, options.batch or 12)
        train(task, shorter(AUTOENCODER, options.autoencoder_steps, options.every), folder)
    if options.stage != "autoencoder":
        state = load_file(folder / "autoencoder.safetensors")
        autoencoder = Autoencoder()
        autoencoder.load_state_dict(state)
        autoencoder = autoencoder.to(memory_format=torch.channels_last).requires_grad_(False)
        x, validation = latents(folder, autoencoder, pictures[mine], rank), encode(autoencoder.encoder, validation)
        del pictures
        task = TrainUNet(
            folder=folder,
            name="avatars",
            multipliers=MULTIPLIERS,
            x=x,
            validation=validation,
            batch=options.batch or 32,
            show=lambda z: decode(autoencoder.decoder, z),
            samples=options.samples,
            limit=4.0,
            extra=state,
        )
        train(task, shorter(UNET, options.unet_steps, options.every), folder)


def main() -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the processes are on one machine
    options = arguments()
    options.folder.mkdir(parents=True, exist_ok=True)
    with (options.folder / ("pixels.lock" if options.pixel else "avatars.lock")).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            sys.exit(f"another training runs in {options.folder}")
        drawn = data.blocks(options.folder, 0, options.pictures, PROCESSES)
        held_out = data.blocks(options.folder, data.VALIDATION_SEED, options.validation, PROCESSES)
        with tempfile.TemporaryDirectory() as meeting:
            # When one of the two is killed, the other loses its connection and stops too.
            what = (f"{meeting}/meet", options, drawn, held_out)
            other = multiprocessing.get_context("spawn").Process(target=work, args=(1, *what), daemon=True)
            other.start()
            work(0, *what)
            other.join()
