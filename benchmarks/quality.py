"""How good the restored pictures are: methods side by side on held-out portraits of the demo prior.

    python benchmarks/quality.py [--pictures 64] [--tasks box,downscale_8] [--methods cpigdm_10,psld_line_search:omega=0.5_20]
        [--sigmas 0.02] [--split tune]

Runs the slim networks without ComfyUI, 8 pictures at a time on one thread. Each picture is one row of results/quality.csv, and rows
that are there are not computed again: stop it and go on whenever you like, in two processes with different --tasks if you have the
cores. `--table` only writes results/quality.md from the rows.

Every method ends as a user's graph does, with the Finish node's `enforce_consistency`. PSNR, SSIM and "features" (root mean square
distance between the encoder's latents of result and truth, scaled latents of about unit variance: a stand-in for a perceptual distance,
from this project's own autoencoder) compare that finished picture with the truth; "residual" is ||A x - y|| / (sigma sqrt(m)) *before* it,
so that 1 is right and what the sampler itself reached can be seen. Seconds are CPU time for each picture.
"""

import argparse
import ast
import csv
import hashlib
import math
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import scipy.signal
import torch
from skimage.metrics import structural_similarity
from skimage.restoration import wiener
from torch import Tensor

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Run as a script, this folder stands first on the path and its operators.py would shadow the package.
sys.path[0] = str(ROOT)

from operators import (  # noqa: E402
    BicubicDownscale,
    Blur,
    Grayscale,
    Identity,
    LinearOperator,
    Mask,
    Measurement,
    box_mask,
    gaussian_kernel,
    motion_kernel,
    random_mask,
    stripe_mask,
)
from prior import networks  # noqa: E402
from prior.draw import VALIDATION_SEED, draw  # noqa: E402
from samplers import enforce_consistency, fill_unseen, sample_cpigdm, sample_psld  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
SHAPE = (3, 128, 128)
BATCH = 8
# Presets are chosen on one split and measured on the other; nothing was trained on either.
SPLITS = {"validate": VALIDATION_SEED + 100, "tune": VALIDATION_SEED + 200_000}
FIELDS = [
    "weights",
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


def free_form() -> Tensor:
    """Keep-mask, (1, 1, 128, 128): a scrawl of three strokes is lost."""
    path = torch.linspace(0, 2 * math.pi, 400)
    row, column = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    keep = torch.ones(128, 128)
    for x, y in ((64 + 40 * path.cos(), 64 + 22 * (2 * path).sin()), (20 + 14 * path, 30 + 6 * (3 * path).sin())):
        distance = ((column[..., None] - x) ** 2 + (row[..., None] - y) ** 2).amin(-1)
        keep[distance < 16] = 0
    return keep[None, None]


TASKS: dict[str, Callable[[], LinearOperator]] = {
    "downscale_4": lambda: BicubicDownscale(SHAPE, 4),
    "downscale_8": lambda: BicubicDownscale(SHAPE, 8),
    "box": lambda: Mask(box_mask(SHAPE, (48, 56), (40, 36))),
    "random_80": lambda: Mask(random_mask(SHAPE, 0.8)),
    "free_form": lambda: Mask(free_form()),
    "gaussian_blur": lambda: Blur(gaussian_kernel(3.0), SHAPE, "reflect"),
    "motion_blur": lambda: Blur(motion_kernel(15.0, 30.0), SHAPE, "circular"),
    "stripes": lambda: Mask(stripe_mask(SHAPE, 16, 6)),
    "denoise": lambda: Identity(SHAPE),
    "grayscale": lambda: Grayscale(SHAPE),
}
DENOISE_SIGMA = 0.2


# Methods: (measurement, seed) -> pictures before Finish. Their names end in the number of network calls. ---------------------


class Prior:
    def __init__(self) -> None:
        self.unet, autoencoder = networks.load()
        self.autoencoder = autoencoder.to(memory_format=torch.channels_last)

    def model(self, x: Tensor, sigma: Tensor, seed: int = 0) -> Tensor:
        return networks.denoise(self.unet, x, sigma)

    def start(self, count: int, seed: int) -> Tensor:
        """Noise at the highest level, image i as in a run of its own with seed + i."""
        level = float(networks.noise_levels()[-1])
        noise = [torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)]
        return torch.stack(noise) * (1 + level**2) ** 0.5

    def sigmas(self, calls: int) -> Tensor:
        """Timesteps evenly spaced from the noisiest to the cleanest, as the papers have them."""
        steps = torch.linspace(999, 0, calls).round().long()
        return torch.cat([networks.noise_levels().float()[steps], torch.zeros(1)])


def latent_method(solve: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    def run(prior: Prior, measurement: Measurement, calls: int, seed: int, **others: Any) -> Tensor:
        x = prior.start(len(measurement.y), seed)
        arguments = {"measurement": measurement, "autoencoder": prior.autoencoder, **options, **others}
        z = solve(prior.model, x, prior.sigmas(calls), {"seed": seed}, **arguments)
        with torch.no_grad():
            return prior.autoencoder.decode(z)

    return run


def baseline(prior: Prior, measurement: Measurement, calls: int, seed: int) -> Tensor:
    """What one would do without a prior: bicubic enlargement, mean fill, Wiener filters, the gray picture."""
    operator, y = measurement.operator, measurement.y
    if isinstance(operator, BicubicDownscale):
        return torch.nn.functional.interpolate(y, size=SHAPE[1:], mode="bicubic", align_corners=False)
    if isinstance(operator, Identity):
        planes = [[scipy.signal.wiener(plane, 5, measurement.sigma**2) for plane in image.double().numpy()] for image in y]
        return torch.from_numpy(np.array(planes)).float()
    if isinstance(operator, Grayscale):
        return y.expand(-1, 3, -1, -1)
    if isinstance(operator, Blur) and measurement.sigma:
        # Against a Laplacian prior; the balance is the best of the steps 1, 3, 10 on the tuning split at both noise levels.
        mode, balance = ("wrap", 0.3) if operator.boundary == "circular" else (operator.boundary, 0.1)
        psf, edge = operator.kernel.numpy(), SHAPE[1] // 4
        wide = np.pad(y.double().numpy(), ((0, 0), (0, 0), (edge, edge), (edge, edge)), mode=mode)
        sharp = np.array([[wiener(plane, psf, balance, clip=False) for plane in image] for image in wide])
        return torch.from_numpy(sharp[..., edge:-edge, edge:-edge].copy()).float()
    return fill_unseen(measurement)


def decoder_only(prior: Prior, measurement: Measurement, calls: int, seed: int) -> Tensor:
    """No diffusion prior: the latent whose picture fits the measurement, by 150 steps of Adam from zero."""
    z = torch.zeros(len(measurement.y), 4, 16, 16, requires_grad=True)
    optimizer = torch.optim.Adam([z], lr=0.08)
    for _ in range(150):
        residual = measurement.operator.A(prior.autoencoder.decode(z)) - measurement.y
        loss = residual.square().sum() / 4 + 1e-3 * z.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return prior.autoencoder.decode(z)


METHODS: dict[str, Callable[..., Tensor]] = {
    "baseline": baseline,
    "decoder_only": decoder_only,
    "latent_dps": latent_method(sample_psld, omega=1.0, gamma=0.0),
    "psld_paper": latent_method(sample_psld, omega=1.0, gamma=0.1),
    "psld_line_search": latent_method(sample_psld, omega=0.8, gamma=0.0, rule="line_search"),
    "cpigdm": latent_method(sample_cpigdm),
    "cpigdm_encoder": latent_method(sample_cpigdm, consistency="encoder"),
}
DEFAULT = [
    "baseline_0",
    "decoder_only_0",
    "latent_dps_50",
    "latent_dps_100",
    "psld_paper_50",
    "psld_paper_100",
    "psld_paper_250",
    "psld_line_search_20",
    "psld_line_search_50",
    "cpigdm_5",
    "cpigdm_10",
    "cpigdm_20",
    "cpigdm_encoder_10",
]


# Measuring -----------------------------------------------------------------------------------------------------------------


def truths(split: str, first: int, count: int) -> Tensor:
    """(count, 3, 128, 128) in [-1, 1]."""
    pictures = [np.asarray(draw(SPLITS[split] + first + i)) for i in range(count)]
    return torch.from_numpy(np.stack(pictures)).movedim(3, 1).float() / 127.5 - 1


def observe(task: str, truth: Tensor, sigma: float, first: int) -> Measurement:
    """y = A x + noise; sigma on the 0 to 1 scale, the noise of each picture from its own seed."""
    operator = TASKS[task]()
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


def parts(name: str) -> tuple[str, dict[str, Any], int]:
    """A method's name in the tables, "psld_line_search:omega=0.5:inner_steps=2_20" say: its name in METHODS, other options, calls."""
    given, _, calls = name.rpartition("_")
    method, *others = given.split(":")
    return method, {key: ast.literal_eval(value) for key, value in (other.split("=") for other in others)}, int(calls)


def rows(prior: Prior, split: str, task: str, sigma: float, name: str, first: int, count: int) -> Iterator[dict[str, Any]]:
    truth = truths(split, first, count)
    measurement = observe(task, truth, sigma, first)
    operator = measurement.operator
    method, others, calls = parts(name)
    start = time.process_time()
    x = METHODS[method](prior, measurement, calls, seed=first, **others)
    seconds = (time.process_time() - start) / count
    # Exactly where the operator can be met exactly, and as the noise allows elsewhere; blurs get the rounding of 8 bits.
    kind = measurement if sigma or not isinstance(operator, Blur) else Measurement(measurement.y, operator, 0.004)
    finished = enforce_consistency(x.double(), kind.to("cpu", torch.float64), 0.1).float().clamp(-1, 1)
    kept = operator.A(torch.ones(1, *SHAPE)) if isinstance(operator, Mask) else None
    entries = float(kept.expand(1, *SHAPE).sum()) if kept is not None else measurement.y[0].numel()
    residual = measurement.residual_norm(x) / entries**0.5 / (measurement.sigma or 2)
    with torch.no_grad():
        a, b = (prior.autoencoder.encode(v) for v in (finished, truth))
    features = (a - b).square().mean((1, 2, 3)).sqrt()
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


def weights_id() -> str:
    return hashlib.sha256(networks.WEIGHTS.read_bytes()).hexdigest()[:8]


def read(path: pathlib.Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def compute(path: pathlib.Path, split: str, tasks: list[str], sigmas: list[float], methods: list[str], pictures: int) -> None:
    prior, weights = Prior(), weights_id()
    if not path.exists():
        path.write_text(",".join(FIELDS) + "\n")
    there = {(r["weights"], r["split"], r["task"], float(r["sigma"]), r["method"], int(r["picture"])) for r in read(path)}
    # All tasks and methods on the first pictures, then the next pictures: a table of few pictures is complete early.
    for first in range(0, pictures, BATCH):
        count = min(BATCH, pictures - first)
        for task in tasks:
            for sigma in [DENOISE_SIGMA] if task == "denoise" else sigmas:
                for name in methods:
                    if all((weights, split, task, sigma, name, first + i) in there for i in range(count)):
                        continue
                    lines = [{"weights": weights, **row} for row in rows(prior, split, task, sigma, name, first, count)]
                    with path.open("a", newline="") as file:
                        csv.DictWriter(file, FIELDS).writerows(lines)
                    mean = sum(float(line["psnr"]) for line in lines) / count
                    print(f"{task} {sigma} {name} {first}: {mean:.2f} dB, {lines[0]['seconds']} s", flush=True)


# The table -----------------------------------------------------------------------------------------------------------------


def mean_and_error(values: list[float]) -> tuple[float, float]:
    array = np.array(values)
    return float(array.mean()), float(array.std(ddof=1) / len(array) ** 0.5) if len(array) > 1 else float("nan")


def glance(kept: list[dict[str, str]], names: list[str]) -> list[str]:
    """PSNR in dB of every method on every task, over the pictures that all of a task's methods have."""
    lines = ["| task | sigma | n | " + " | ".join(names) + " |", "|---" * (3 + len(names)) + "|"]
    for task in TASKS:
        for sigma in sorted({float(r["sigma"]) for r in kept if r["task"] == task}):
            here = [r for r in kept if r["task"] == task and float(r["sigma"]) == sigma]
            values = {name: {r["picture"]: float(r["psnr"]) for r in here if r["method"] == name} for name in names}
            common = set.intersection(*(set(of) for of in values.values() if of))
            cells = [f"{mean_and_error([of[i] for i in common])[0]:.2f}" if of else "-" for of in values.values()]
            lines.append(f"| {task} | {sigma:g} | {len(common)} | " + " | ".join(cells) + " |")
    return lines


def table(path: pathlib.Path, split: str) -> str:
    kept = [r for r in read(path) if r["split"] == split and r["weights"] == weights_id()]
    lines = [
        "# Quality on the demo prior",
        "",
        f"Held-out portraits, split `{split}`, weights {weights_id()}; {platform.machine()}, 1 thread, torch {torch.__version__}. "
        "Made by `benchmarks/quality.py`, whose text says what each column is; mean and standard error over n pictures.",
        "",
        "A row with fewer pictures compares with the others through the same first pictures only.",
    ]
    order = {name: i for i, name in enumerate(METHODS)}
    lines += [
        "",
        "## At a glance",
        "",
        *glance(kept, sorted({r["method"] for r in kept}, key=lambda n: (order[parts(n)[0]], parts(n)[2], n))),
    ]
    for task in TASKS:
        for sigma in sorted({float(r["sigma"]) for r in kept if r["task"] == task}):
            here = [r for r in kept if r["task"] == task and float(r["sigma"]) == sigma]
            names = sorted({r["method"] for r in here}, key=lambda n: (order[parts(n)[0]], parts(n)[2], n))
            lines += ["", f"## {task}, sigma {sigma:g}", ""]
            lines += [
                "| method | calls | n | PSNR dB | SSIM | features | hole PSNR dB | residual | s / picture |",
                "|---" * 9 + "|",
            ]
            for name in names:
                mine = [r for r in here if r["method"] == name]
                column = {key: mean_and_error([float(r[key]) for r in mine]) for key in FIELDS[6:]}
                cells = [name.rpartition("_")[0], f"{column['calls'][0]:.0f}", str(len(mine))]
                cells += [f"{column['psnr'][0]:.2f} +- {column['psnr'][1]:.2f}", f"{column['ssim'][0]:.3f}"]
                cells += [f"{column['features'][0]:.3f}"]
                cells += ["-" if math.isnan(column["hole_psnr"][0]) else f"{column['hole_psnr'][0]:.2f}"]
                cells += [f"{column['residual'][0]:.3g}", f"{column['seconds'][0]:.2f}"]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--methods", default=",".join(DEFAULT))
    parser.add_argument("--sigmas", default="0.02")
    parser.add_argument("--split", choices=SPLITS, default="validate")
    parser.add_argument("--table", action="store_true", help="only write the table")
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / ("quality.csv" if given.split == "validate" else "tuning.csv")
    if not given.table:
        sigmas = [float(s) for s in given.sigmas.split(",")]
        compute(path, given.split, given.tasks.split(","), sigmas, given.methods.split(","), given.pictures)
    (RESULTS / f"{path.stem}.md").write_text(table(path, given.split))


if __name__ == "__main__":
    main()
