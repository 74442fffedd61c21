"""Whether the spread of the samples is right: does the truth lie where they say it does?

    python benchmarks/calibration.py [--pictures 16] [--samples 20] [--tasks box,downscale_8] [--methods cpigdm:several=True:eta=0.5:spread=2.0_10] [--precision float32] [--add]

For each held-out portrait, samples from different seeds, made to agree with the photo (without Finish's soft edge in holes). Of every pixel
that the photo does not fix (a hole's; all of them for other tasks) and each colour: whether the truth lies in the band of its samples that
one more sample would lie in with 80 % ("inside": 80 is right, less is too sure), and over the picture the correlation r of the standard
deviation over the samples with the error of their mean, both as the Uncertainty node has them, one number for each pixel. Writes
results/calibration.md, with --add below the rows that are there; noise .02. "several=True:eta=0.5:spread=2.0" is what Restore does for several samples. A picture takes half a minute or so.
"""

import argparse
import os
import pathlib
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder, whose operators.py would shadow the package

from benchmarks.quality import observe, truths  # noqa: E402
from benchmarks.quality_methods import METHODS, TASKS, Prior, weights_id  # noqa: E402
from benchmarks.quality_report import mean_and_error, parts  # noqa: E402
from operators import Mask, Measurement  # noqa: E402
from samplers import enforce_consistency  # noqa: E402

SIGMA = 0.02
APART = 1_000_003  # between the seeds of two pictures, whose samples count up from there
RESULT = ROOT / "benchmarks" / "results" / "calibration.md"


def finished(prior: Prior, measurement: Measurement, name: str, seed: int) -> Tensor:
    method, others, calls = parts(name)
    x = METHODS[method](prior, measurement, calls, seed=seed, **others)
    return enforce_consistency(x.double(), measurement.to("cpu", torch.float64)).float().clamp(-1, 1)


def measure(samples: Tensor, truth: Tensor, free: Tensor) -> dict[str, float]:
    """samples: (K, 3, H, W), truth: (3, H, W), free: (H, W), True where the photo fixes nothing."""
    # Of K + 1 exchangeable values the last is below the k-th smallest of the others with probability k / (K + 1).
    count = len(samples)
    q = (0.1 * (count + 1) - 1) / (count - 1)
    low, high = samples.quantile(q, 0), samples.quantile(1 - q, 0)
    inside = ((truth >= low) & (truth <= high))[:, free]
    deviation = samples.var(0).mean(0).sqrt()[free]
    error = (samples.mean(0) - truth).square().mean(0).sqrt()[free]
    r = torch.corrcoef(torch.stack([deviation, error]))[0, 1]
    return {
        "inside": 100 * float(inside.float().mean()),
        "r": float(r),
        "deviation": float(deviation.square().mean().sqrt()) / 2,
        "error": float(error.square().mean().sqrt()) / 2 / (1 + 1 / count) ** 0.5,  # the mean of K samples errs too
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--tasks", default="box,free_form,random_80,stripes,downscale_8,grayscale")
    parser.add_argument("--methods", default="cpigdm_10,cpigdm:several=True:eta=0.5:spread=2.0_10")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--add", action="store_true", help="keep the rows that are there")
    given = parser.parse_args()
    if given.samples < 9:
        parser.error(f"--samples: got {given.samples}, expected at least 9; fewer have no tenth and no ninetieth percentile")
    torch.set_num_threads(1)
    prior = Prior(False, given.precision)
    lines = [
        "# Calibration of the samples",
        "",
        f"{given.pictures} held-out portraits, {given.samples} samples each, noise {SIGMA:g}, weights {weights_id(False)}. Made by "
        "`benchmarks/calibration.py`, whose text says what the columns are. Deviation and error: root mean squares over the free pixels, "
        "on the 0 to 1 scale, the error of the mean of endlessly many; equal if the samples are as far apart as they are wrong.",
        "",
        "| task | method | networks in | inside 10-90, % | r | deviation | error of the mean |",
        "|---|---|---|---|---|---|---|",
    ]
    if given.add and RESULT.exists():
        there = RESULT.read_text().splitlines()
        if there[: len(lines)] != lines:
            parser.error(f"--add: {RESULT.name} is of other weights, pictures or samples")
        lines = there
    for task in given.tasks.split(","):
        for name in given.methods.split(","):
            found: list[dict[str, float]] = []
            for i in range(given.pictures):
                truth = truths("validate", i, 1, 128)
                one = observe(TASKS, task, truth, SIGMA, i)
                many = Measurement(one.y.expand(given.samples, -1, -1, -1), one.operator, one.sigma)
                # Sample k of the batch is that of a run of its own with seed + k.
                samples = finished(prior, many, name, APART * (i + 1))
                operator = one.operator
                free = torch.ones(128, 128, dtype=torch.bool)
                if isinstance(operator, Mask):
                    free = operator.A(torch.ones(1, 3, 128, 128))[0, 0] == 0
                found.append(measure(samples, truth[0], free))
                print(task, name, i, {key: round(value, 3) for key, value in found[-1].items()}, flush=True)
            cells = [mean_and_error([f[key] for f in found]) for key in found[0]]
            text = [f"{cells[0][0]:.0f} +- {cells[0][1]:.0f}", f"{cells[1][0]:.2f} +- {cells[1][1]:.2f}"]
            begin = f"| {task} | {name} | {given.precision} | "
            lines = [line for line in lines if not line.startswith(begin)]
            lines.append(begin + " | ".join([*text, *(f"{c[0]:.3f}" for c in cells[2:])]) + " |")
            RESULT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
