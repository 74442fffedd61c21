"""C-PiGDM against the paper's PSLD through the real ComfyUI server: quality, agreement with the photo, and wall time, in one run.

    python benchmarks/server.py [--pictures 4] [--quality balanced] [--paper-calls 250] [--tasks box,stripes]

C-PiGDM by the Restore node as it comes; PSLD as published in stock nodes: CFGGuider, SamplerCustomAdvanced, decode, Finish. One prompt
for each task, method and picture, on the same measurements and seeds. PSNR is that of the finished picture; "rms" is |A x - y| / sigma
before Finish, where 1 is right; seconds are wall time of a prompt, without the loading of the model. Differences with their standard
error. Writes results/server.md.
"""

import argparse
import io
import pathlib
import platform
import re
import signal
import sys
import time
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:1] = [str(ROOT), str(ROOT / "dev")]  # in place of this folder, whose operators.py would shadow the package

from benchmarks.quality_report import mean_and_error  # noqa: E402
from dev.server import Server, running  # noqa: E402
from dev.setup_host import prepare  # noqa: E402

SIDE, SIGMA = 128, 0.02
RESULT = ROOT / "benchmarks" / "results" / "server.md"
SCRAWL = "posterior_benchmark_scrawl.png"
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "downscale_4": ("PosteriorDownscale", {"method": "bicubic", "factor": 4.0}),
    "downscale_8": ("PosteriorDownscale", {"method": "bicubic", "factor": 8.0}),
    "box": ("PosteriorMask", {"pattern": "box", "x": 36, "y": 40, "width": 56, "height": 48}),
    "random_80": ("PosteriorMask", {"pattern": "random", "fraction": 0.8, "per_channel": False, "seed": 0}),
    "free_form": ("PosteriorMask", {"pattern": "mask", "mask": ["scrawl", 0], "threshold": 0.5}),
    "gaussian_blur": ("PosteriorBlur", {"kernel": "gaussian", "sigma": 3.0, "sigma_across": 0.0, "angle": 0.0}),
    "motion_blur": ("PosteriorBlur", {"kernel": "motion", "length": 15.0, "angle": 30.0, "intensity": 0.0, "seed": 0}),
    "stripes": (
        "PosteriorMask",
        {"pattern": "stripes", "period": 16, "width": 6, "offset": 0, "direction": "horizontal", "fraction": 0.0, "seed": 0},
    ),
    "denoise": ("PosteriorIdentity", {}),
    "grayscale": ("PosteriorGrayscale", {"weights": "Rec.709"}),
}
NOISE = {"denoise": 0.2}  # of the others: SIGMA
PSLD = {"rule": "paper", "rule.omega": 1.0, "rule.gamma": 0.1, "rule.eta": 0.0, "rule.glue": "pinv"}
QUALITIES = {"fast": 5, "balanced": 10, "best": 20}  # network calls of C-PiGDM, as nodes/restore.py has them


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def dynamic(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of a node with one choice, the first: the others belong to what is chosen."""
    choice, *others = inputs
    return {choice: inputs[choice], **{f"{choice}.{name}": inputs[name] for name in others}}


def degraded(task: str, picture: int) -> dict[str, Any]:
    operator, inputs = TASKS[task]
    if operator == "PosteriorBlur":
        inputs = {**dynamic(inputs), "boundary": "circular" if task == "motion_blur" else "reflect"}
    else:
        inputs = dynamic(inputs) if inputs else {}
    noise = {"noise": "Gaussian", "noise.sigma": NOISE.get(task, SIGMA)}
    return {
        "scrawl": node("LoadImageMask", image=SCRAWL, channel="red"),
        "prior": node("PosteriorLoadDemoPrior"),
        "truth": node("PosteriorDemoPictures", first=100 + picture, count=1),
        "operator": node(operator, **inputs),
        "measure": node("PosteriorMeasureSimulate", image=["truth", 0], operator=["operator", 0], seed=picture, **noise),
        "text": node("CLIPTextEncode", text="", clip=["prior", 1]),
        "result": node("SaveImage", images=["finish", 0], filename_prefix="benchmark"),
        "original": node("SaveImage", images=["truth", 0], filename_prefix="benchmark"),
    }


def by_restore(task: str, quality: str, picture: int) -> dict[str, Any]:
    links = {"model": ["prior", 0], "vae": ["prior", 2], "positive": ["text", 0], "measurement": ["measure", 0]}
    restore = node("PosteriorRestore", **links, method="C-PiGDM", quality=quality, seed=picture, cfg=1.0)
    return {**degraded(task, picture), "finish": restore}


def as_published(task: str, calls: int, picture: int) -> dict[str, Any]:
    return {
        **degraded(task, picture),
        "guider": node("CFGGuider", model=["prior", 0], positive=["text", 0], negative=["text", 0], cfg=1.0),
        "noise": node("RandomNoise", noise_seed=picture),
        "sigmas": node("BasicScheduler", model=["prior", 0], scheduler="ddim_uniform", steps=calls, denoise=1.0),
        "sampler": node("PosteriorSamplerPSLD", measurement=["measure", 0], vae=["prior", 2], **PSLD),
        "start": node("PosteriorStartLatent", measurement=["measure", 0], vae=["prior", 2], start="noise"),
        "sample": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["sampler", 0],
            sigmas=["sigmas", 0],
            latent_image=["start", 0],
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["prior", 2]),
        "finish": node("PosteriorFinish", image=["decode", 0], measurement=["measure", 0], error=0.0),
    }


def picture_of(server: Server, outputs: dict[str, Any], name: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(server.picture(outputs[name]["images"][0])))) / 255.0


def measure(server: Server, task: str, prompt: dict[str, Any]) -> tuple[float, float, float]:
    """PSNR in dB, |A x - y| / sigma before Finish, seconds."""
    start = time.perf_counter()
    outputs = server.run(prompt)
    seconds = time.perf_counter() - start
    result, truth = (picture_of(server, outputs, name) for name in ("result", "original"))
    (before,) = re.findall(r"\|A x - y\| (\S+) ->", outputs["finish"]["text"][0])
    return -10 * np.log10(((result - truth) ** 2).mean()), float(before) / NOISE.get(task, SIGMA), seconds


def scrawl() -> Image.Image:
    """A red drawing of what is lost."""
    image = Image.new("RGB", (SIDE, SIDE))
    draw = ImageDraw.Draw(image)
    draw.line([(20, 40), (60, 30), (100, 80), (40, 100), (30, 60)], fill="red", width=8, joint="curve")
    draw.line([(90, 20), (100, 50), (70, 110)], fill="red", width=8, joint="curve")
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--quality", choices=QUALITIES, default="balanced")
    parser.add_argument("--paper-calls", type=int, default=250)
    parser.add_argument("--tasks", default=",".join(TASKS))
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server ends with this
    paths, log = prepare(), ROOT / "output" / "benchmark_server.log"
    log.parent.mkdir(exist_ok=True)
    (paths["base"] / "input").mkdir(exist_ok=True)
    scrawl().save(paths["base"] / "input" / SCRAWL)
    lines = [
        "# C-PiGDM and PSLD through ComfyUI's server",
        "",
        f"{given.pictures} held-out portraits, noise {SIGMA} (denoise {NOISE['denoise']}), C-PiGDM by Restore with {QUALITIES[given.quality]} network calls beside "
        f"PSLD as published with {given.paper_calls}; {platform.machine()}, CPU. Made by `benchmarks/server.py`, whose text says what the "
        "columns are.",
        "",
        "| task | C-PiGDM dB | PSLD dB | difference | C-PiGDM rms | PSLD rms | C-PiGDM s | PSLD s | times faster |",
        "|---" * 9 + "|",
    ]
    print("\n".join(lines), flush=True)
    with running(sys.executable, paths["comfyui"], paths["base"], log, "--cpu") as server:
        measure(server, "denoise", by_restore("denoise", "fast", given.pictures))  # loads the model
        for task in given.tasks.split(","):
            # Both of a picture, then the next: what else the machine does meets both alike.
            runs = [
                [
                    measure(server, task, by_restore(task, given.quality, i)),
                    measure(server, task, as_published(task, given.paper_calls, i)),
                ]
                for i in range(given.pictures)
            ]
            (a, ra, sa), (b, rb, sb) = np.mean(runs, 0)
            difference, error = mean_and_error([own[0] - paper[0] for own, paper in runs])
            lines.append(
                f"| {task} | {a:.2f} | {b:.2f} | {difference:+.2f} +- {error:.2f} | {ra:.1f} | {rb:.1f} | {sa:.2f} | {sb:.2f} | {sb / sa:.1f} |"
            )
            print(lines[-1], flush=True)
            RESULT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
