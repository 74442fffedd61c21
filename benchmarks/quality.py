"""How good the restored pictures are: methods side by side on held-out portraits of the demo prior.

    python benchmarks/quality.py [--pictures 64] [--tasks box,downscale_8] [--methods cpigdm_10,psld_line_search:omega=0.5_20]
        [--sigmas 0.02] [--split tune] [--precision float32] [--pixels]

Runs the slim networks without ComfyUI, 32 pictures at a time on one thread, and in bfloat16 unless asked otherwise: on processors with AMX
or Zen 5 that takes a third to a half of float32's time, on others up to 18 times of it: time ten calls of both first. With --pixels the sibling on 32 x 32 pixels, in float32, and the
methods that were published for pixels. Each picture is one row of results/quality.csv (tuning.csv, pixels.csv), and rows that are there are not
computed again: stop it and go on whenever you like, in two processes with different --tasks if you have the cores. `--report` only
writes the table and the plots from the rows; plots need Matplotlib (`pip install -r benchmarks/requirements.txt`).

Every method ends as a user's graph does, with the Finish node's `enforce_consistency`. PSNR, SSIM and "features" (root mean square
distance between the encoder's latents of result and truth, scaled latents of about unit variance: a stand-in for a perceptual distance,
from this project's own autoencoder) compare that finished picture with the truth; "residual" is ||A x - y|| / (sigma sqrt(m)) *before* it,
so that 1 is right and what the sampler itself reached can be seen. Seconds are CPU time for each picture.
"""

import argparse
import csv
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Run as a script, this folder stands first on the path and its operators.py would shadow the package.
sys.path[0] = str(ROOT)

from benchmarks.quality_methods import (  # noqa: E402
    COMPARED,
    DENOISE_SIGMA,
    METHODS,
    PIXEL_COMPARED,
    PIXEL_METHODS,
    SMALL_TASKS,
    TASKS,
    Method,
    Prior,
    Tasks,
    weights_id,
)
from benchmarks.quality_report import parts, plots, read, rows_path, table  # noqa: E402
from operators import Blur, Mask, Measurement  # noqa: E402
from prior.draw import VALIDATION_SEED, draw  # noqa: E402
from samplers import enforce_consistency  # noqa: E402

BATCH = 32
# Presets are chosen on one split and measured on the other; nothing was trained on either.
SPLITS = {"validate": VALIDATION_SEED + 100, "tune": VALIDATION_SEED + 200_000}
FIELDS = [
    "weights",
    "precision",
    "split",
    "task",
    "sigma",
    "method",
    "picture",
    "psnr",
    "ssim",
    "features",
    "hole_psnr",
    "residual",
    "calls",
    "seconds",
]


def truths(split: str, first: int, count: int, side: int) -> Tensor:
    """(count, 3, side, side) in [-1, 1]; below 128 each pixel is a mean, as in the training."""
    pictures = np.stack([draw(SPLITS[split] + first + i) for i in range(count)])
    full = torch.from_numpy(pictures).movedim(3, 1).float() / 127.5 - 1
    return torch.nn.functional.avg_pool2d(full, full.shape[-1] // side)


def observe(tasks: Tasks, task: str, truth: Tensor, sigma: float, first: int) -> Measurement:
    """y = A x + noise; sigma on the 0 to 1 scale, the noise of each picture from its own seed."""
    operator = tasks[task]()
    y = operator.A(truth)
    noise = [torch.randn(y.shape[1:], generator=torch.Generator().manual_seed(1000 + first + i)) for i in range(len(y))]
    noise = torch.stack(noise)
    # Lost pixels stay 0: they are no measurement.
    y = y + 2 * sigma * (operator.A(noise) if isinstance(operator, Mask) else noise)
    return Measurement(y, operator, 2 * sigma)


def psnr(a: Tensor, b: Tensor, where: Tensor | None = None) -> Tensor:
    """(B,) dB of pictures in [-1, 1]; over `where`, (1, 1, H, W), if given."""
    error = ((a - b) / 2).square()
    mean = error.mean((1, 2, 3)) if where is None else (error * where).sum((1, 2, 3)) / (3 * where.sum())
    return -10 * mean.log10()


def rows(
    prior: Prior,
    methods: dict[str, Method],
    tasks: Tasks,
    split: str,
    task: str,
    sigma: float,
    name: str,
    first: int,
    count: int,
) -> Iterator[dict[str, Any]]:
    in_shape = tasks[task]().in_shape
    truth = truths(split, first, count, in_shape[-1])
    measurement = observe(tasks, task, truth, sigma, first)
    operator = measurement.operator
    method, others, calls = parts(name)
    start = time.process_time()
    x = methods[method](prior, measurement, calls, seed=first, **others)
    seconds = (time.process_time() - start) / count
    # Exactly where the operator can be met exactly, and as the noise allows elsewhere; blurs get the rounding of 8 bits.
    kind = measurement if sigma or not isinstance(operator, Blur) else Measurement(measurement.y, operator, 0.004)
    finished = enforce_consistency(x.double(), kind.to("cpu", torch.float64)).float().clamp(-1, 1)
    kept = operator.A(torch.ones(1, *in_shape)) if isinstance(operator, Mask) else None
    entries = float(kept.expand(1, *in_shape).sum()) if kept is not None else measurement.y[0].numel()
    residual = measurement.residual_norm(x) / entries**0.5 / (measurement.sigma or 2)
    features = (prior.features(finished) - prior.features(truth)).square().mean((1, 2, 3)).sqrt()
    hole = psnr(finished, truth, 1 - kept[:, :1]) if kept is not None else [float("nan")] * count
    whole = psnr(finished, truth)
    for i in range(count):
        pair = [v[i].movedim(0, -1).numpy() for v in (finished, truth)]
        yield {
            "split": split,
            "task": task,
            "sigma": sigma,
            "method": name,
            "picture": first + i,
            "psnr": f"{float(whole[i]):.4f}",
            "ssim": f"{structural_similarity(*pair, channel_axis=-1, data_range=2):.5f}",
            "features": f"{float(features[i]):.5f}",
            "hole_psnr": f"{float(hole[i]):.4f}",
            "residual": f"{float(residual[i]):.5f}",
            "calls": calls,
            "seconds": f"{seconds:.3f}",
        }


def compute(path: pathlib.Path, given: argparse.Namespace, tasks: Tasks, methods: dict[str, Method]) -> None:
    prior, weights, split = Prior(given.pixels, given.precision), weights_id(given.pixels), given.split
    if not path.exists():
        path.write_text(",".join(FIELDS) + "\n")
    there = {
        (r["weights"], r["precision"], r["split"], r["task"], float(r["sigma"]), r["method"], int(r["picture"]))
        for r in read(path)
    }
    # All tasks and methods on the first pictures, then the next pictures: a table of few pictures is complete early.
    for first in range(0, given.pictures, BATCH):
        count = min(BATCH, given.pictures - first)
        for task in given.tasks:
            for sigma in [DENOISE_SIGMA] if task == "denoise" else given.sigmas:
                for name in given.methods:
                    of = (weights, given.precision, split, task, sigma, name)
                    missing = [i for i in range(first, first + count) if (*of, i) not in there]
                    if not missing:
                        continue
                    run = (prior, methods, tasks, split, task)
                    lines = [
                        {"weights": weights, "precision": given.precision, **row}
                        for row in rows(*run, sigma, name, missing[0], first + count - missing[0])
                        if row["picture"] in missing
                    ]
                    with path.open("a", newline="") as file:
                        csv.DictWriter(file, FIELDS, lineterminator="\n").writerows(lines)
                    mean = sum(float(line["psnr"]) for line in lines) / len(lines)
                    print(f"{task} {sigma} {name} {first}: {mean:.2f} dB, {lines[0]['seconds']} s", flush=True)


def main() -> None:
    def listed(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--tasks", type=listed)
    parser.add_argument("--methods", type=listed)
    parser.add_argument("--sigmas", type=lambda text: [float(sigma) for sigma in listed(text)], default=[0.02])
    parser.add_argument("--split", choices=SPLITS, default="validate")
    parser.add_argument("--pixels", action="store_true", help="the prior on 32 x 32 pixels")
    parser.add_argument("--precision", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--report", action="store_true", help="only write the table and the plots")
    given = parser.parse_args()
    torch.set_num_threads(1)
    tasks, methods, compared = (SMALL_TASKS, PIXEL_METHODS, PIXEL_COMPARED) if given.pixels else (TASKS, METHODS, COMPARED)
    given.tasks, given.methods = given.tasks or list(tasks), given.methods or compared
    given.precision = given.precision or ("float32" if given.pixels else "bfloat16")
    path = rows_path(given.split, given.pixels)
    if not given.report:
        compute(path, given, tasks, methods)
    path.with_suffix(".md").write_text(table(given.split, given.pixels, given.precision))
    plots(given.split, given.pixels, given.precision)


if __name__ == "__main__":
    main()
