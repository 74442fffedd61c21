"""The training loop: two processes of one thread each, resumable at any moment, bitwise as if it had never stopped."""

import csv
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..export import METADATA
from .optim import optimisers


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train.

    Attributes:
        steps: in all. A finished or interrupted training goes on when this is raised.
        decay: the last part of the steps, over which the learning rates fall to 0.
        warmup: the first steps, over which they rise.
        muon, adam: the learning rates.
        ema: the share that the running mean of the weights keeps at each step, once it has seen enough of them.
        clip: the largest norm of the gradient.
        every: seconds between checkpoints, each with a row of the log, a sample sheet and an export.
    """

    steps: int
    decay: float
    warmup: int
    muon: float
    adam: float
    ema: float
    clip: float
    every: float = 240

    def rate(self, step: int) -> float:
        """The factor of the learning rates at a step."""
        return min((step + 1) / self.warmup, 1.0, (self.steps - step) / max(1.0, self.decay * self.steps))


class Task(ABC):
    """What is trained: a network, its loss, and what to show."""

    network: nn.Module
    name: str

    def __init__(self) -> None:
        self.statistics = torch.zeros(0)  # of the last batch; the processes share their mean
        self.running: dict[str, Tensor] = {}  # what the task itself keeps between runs

    @abstractmethod
    def loss(self, rng: torch.Generator, progress: float) -> tuple[Tensor, int]:
        """The loss of one batch and the number of pictures in it. `progress` goes from 0 to 1."""

    @abstractmethod
    def report(self, final: bool) -> Mapping[str, float]:
        """Measure the network on a quarter of the validation pictures, at the end on all; write a sample sheet and an export."""

    def share(self, statistics: Tensor) -> None:
        """Take the mean of the processes' statistics, after each step."""
        self.statistics = statistics.clone()


class Average:
    """The running mean of the weights, which `report` sees in their place."""

    def __init__(self, network: nn.Module, keep: float) -> None:
        self.weights = [p.data for p in network.parameters()]
        self.mean = [w.clone() for w in self.weights]
        self.keep = keep

    def update(self, step: int) -> None:
        torch._foreach_lerp_(self.mean, self.weights, 1 - min(self.keep, (step + 1) / (step + 20)))

    @contextmanager
    def shown(self) -> Iterator[None]:
        kept = [w.clone() for w in self.weights]
        torch._foreach_copy_(self.weights, self.mean)
        yield
        torch._foreach_copy_(self.weights, kept)


class Log:
    """A table of the training, one row for each report."""

    def __init__(self, path: Path, step: int) -> None:
        """Rows after `step`, which a resumed run will write again, go."""
        self.path = path
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]

    def add(self, row: Mapping[str, float]) -> None:
        self.rows.append({key: f"{value:.6g}" for key, value in row.items()})
        print("  ".join(f"{key} {value}" for key, value in self.rows[-1].items()), flush=True)
        with whole(self.path) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[-1]))
            writer.writeheader()
            writer.writerows(self.rows)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a path to write to; only what is complete gets the real name."""
    part = path.with_name(path.name + ".part")
    yield part
    os.replace(part, path)


def save_weights(state: dict[str, Tensor], path: Path) -> None:
    """Write float16 .safetensors that everybody can read."""
    with whole(path) as part:
        save_file({key: value.half().contiguous() for key, value in state.items()}, part, METADATA)
        part.chmod(0o644)


def save_checkpoint(
    path: Path, task: Task, average: Average, both: list[torch.optim.Optimizer], progress: Mapping[str, float]
) -> None:
    """Write all that a training goes on from: data only, one .safetensors file.

    metadata   progress: JSON of the numbers in `progress`
    tensors    network.KEY, average.NUMBER, optimiser.WHICH.PARAMETER.NAME, running.NAME
    """
    tensors = {f"network.{key}": value for key, value in task.network.state_dict().items()}
    tensors |= {f"average.{i}": mean for i, mean in enumerate(average.mean)}
    for which, optimiser in enumerate(both):
        for parameter, state in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{which}.{parameter}.{name}": value for name, value in state.items()}
    tensors |= {f"running.{name}": value for name, value in task.running.items()}
    with whole(path) as part:
        save_file({key: value.contiguous() for key, value in tensors.items()}, part, {"progress": json.dumps(progress)})


def load_checkpoint(path: Path, task: Task, average: Average, both: list[torch.optim.Optimizer]) -> dict[str, float]:
    """Set everything as it was, and return the progress."""
    groups: dict[str, dict[str, Tensor]] = {"network": {}, "average": {}, "optimiser": {}, "running": {}}
    with safe_open(path, "pt") as file:
        progress = json.loads(file.metadata()["progress"])
        for key in file.keys():  # noqa: SIM118 - it is no dict
            group, name = key.split(".", 1)
            groups[group][name] = file.get_tensor(key).clone()  # not a view of the file, which will be written again
    task.network.load_state_dict(groups["network"])
    torch._foreach_copy_(average.mean, [groups["average"][str(i)] for i in range(len(average.mean))])
    for which, optimiser in enumerate(both):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in groups["optimiser"].items():
            owner, parameter, name = key.split(".", 2)
            if int(owner) == which:
                state.setdefault(int(parameter), {})[name] = value
        # The rest of an optimiser is the plan's, not the checkpoint's.
        optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
    task.running = groups["running"]
    return progress


def save_sheet(pictures: Tensor, path: Path, columns: int = 8) -> None:
    """Write pictures (N, 3, H, W) in [0, 1] as one PNG; N is a multiple of the columns."""
    n, _, h, w = pictures.shape
    rows = pictures.clamp(0, 1).mul(255).round().byte().reshape(n // columns, columns, 3, h, w)
    sheet = rows.permute(0, 3, 1, 4, 2).reshape(n // columns * h, columns * w, 3)
    with whole(path) as part:
        Image.fromarray(np.ascontiguousarray(sheet.numpy())).save(part, "PNG")


def flat_gradients(network: nn.Module, extra: int) -> tuple[Tensor, Tensor]:
    """One tensor that all gradients are views of, and its last `extra` elements: one message carries everything."""
    parameters = list(network.parameters())
    flat = torch.zeros(sum(p.numel() for p in parameters) + extra)
    place = 0
    for p in parameters:
        p.grad = flat[place : place + p.numel()].as_strided(p.shape, p.stride())
        place += p.numel()
    return flat, flat[place:]


def train(task: Task, plan: Plan, folder: Path, seed: int = 0) -> None:
    """Train from the checkpoint in the folder, or from nothing, to the plan's last step. Both processes call this."""
    rank, world = dist.get_rank(), dist.get_world_size()
    network = task.network
    average = Average(network, plan.ema)
    both = optimisers(network, plan.muon, plan.adam)
    checkpoint = folder / f"{task.name}.checkpoint.safetensors"
    step, seconds, cpu, pictures = 0, 0.0, 0.0, 0
    if checkpoint.exists():
        saved = load_checkpoint(checkpoint, task, average, both)
        step, seconds, cpu, pictures = int(saved["step"]), saved["seconds"], saved["cpu"], int(saved["pictures"])
    log = Log(folder / f"{task.name}.csv", step)
    flat, extra = flat_gradients(network, 3 + len(task.statistics))
    began, cpu_began = time.monotonic() - seconds, time.process_time() - cpu
    losses: list[float] = []

    def report() -> None:
        nonlocal losses
        with average.shown():
            measured = task.report(step == plan.steps)
        now, used = time.monotonic() - began, time.process_time() - cpu_began
        row = {"step": step, "pictures": pictures, "seconds": round(now), "cpu": round(used), "rate": plan.rate(step)}
        log.add({**row, "loss": sum(losses) / max(1, len(losses)), **measured})
        losses = []
        progress = {"step": step, "seconds": now, "cpu": used, "pictures": pictures}
        save_checkpoint(checkpoint, task, average, both, progress)

    last = time.monotonic()
    while step < plan.steps:
        # Randomness depends on the step and the process only, so that a resumed run draws what an unbroken one would.
        rng = torch.Generator().manual_seed((seed * 1_000_003 + step) * world + rank)
        for optimiser, base in zip(both, (plan.muon, plan.adam), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = base * plan.rate(step)
        flat.zero_()
        loss, count = task.loss(rng, step / plan.steps)
        loss.backward()
        due = float(rank == 0 and time.monotonic() - last > plan.every)
        extra.copy_(torch.cat([torch.tensor([loss.detach(), count, due]), task.statistics]))
        dist.all_reduce(flat)
        pictures += int(extra[1])
        due = bool(extra[2] > 0)
        flat /= world
        losses.append(float(extra[0]))
        task.share(extra[3:])
        if not np.isfinite(losses[-1]):
            raise FloatingPointError(f"{task.name}: the loss is {losses[-1]} at step {step}; lower the learning rates")
        torch.nn.utils.clip_grad_norm_(network.parameters(), plan.clip)
        for optimiser in both:
            optimiser.step()
        average.update(step)
        step += 1
        if rank == 0 and (due or step == plan.steps):
            report()
        if due:
            last = time.monotonic()
    dist.barrier()


def shorter(plan: Plan, steps: int | None, every: float | None) -> Plan:
    """The plan with what the command line changed."""
    return replace(plan, steps=steps or plan.steps, every=plan.every if every is None else every)
