"""make demo: restore the shipped pictures through the real ComfyUI server, and say how well it went.

Starts the server headless with the pack, queues the shipped API workflows, and writes to output/demo/ one strip for each
picture, truth | measurement | baseline | result, and a table (report.md, and on the terminal).
"""

import io
import json
import re
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from server import PromptFailed, Server, running
from setup_host import ROOT, SetupError, prepare

OUTPUT = ROOT / "output" / "demo"


@dataclass(frozen=True)
class Task:
    """A shipped workflow and the baseline to beat."""

    title: str
    workflow: str
    baseline_name: str
    target_db: float


TASKS = (
    Task("x8 super-resolution", "super_resolution_x8", "bicubic", 1.0),
    Task("box inpainting", "inpaint_box", "mean fill", 3.0),
)


def node_titled(prompt: dict[str, Any], title: str) -> str | None:
    return next((key for key, node in prompt.items() if node["_meta"]["title"] == title), None)


def pictures(server: Server, prompt: dict[str, Any], outputs: dict[str, Any], title: str) -> list[Image.Image]:
    saved = outputs.get(node_titled(prompt, title) or "", {}).get("images", [])
    return [Image.open(io.BytesIO(server.picture(entry))).convert("RGB") for entry in saved]


def psnr(a: Image.Image, b: Image.Image) -> float:
    error = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    return float(10 * np.log10(255**2 / np.mean(error**2)))


def baseline(measured: Image.Image, hole: np.ndarray | None, size: tuple[int, int]) -> Image.Image:
    """What one would do without a prior: bicubic enlargement, or the mean of the kept pixels in the hole."""
    if hole is None:
        return measured.resize(size, Image.Resampling.BICUBIC)
    filled = np.array(measured)
    filled[hole] = filled[~hole].mean(0).round()
    return Image.fromarray(filled)


def strip(images: list[Image.Image], captions: list[str]) -> Image.Image:
    width, height = images[0].size
    scale = max(1, 256 // width)
    cell, gap, text = (width * scale, height * scale), 8, 22
    sheet = Image.new("RGB", (len(images) * (cell[0] + gap) - gap, cell[1] + text), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left = i * (cell[0] + gap)
        sheet.paste(image.resize(cell, Image.Resampling.NEAREST), (left, text))
        draw.text((left + 2, 2), caption, fill="black", font=font)
    return sheet


def grid(strips: list[list[Image.Image]]) -> Image.Image:
    """The strips of each task below one another, tasks side by side, at half size."""
    gap = 8
    half = [[s.resize((s.width // 2, s.height // 2), Image.Resampling.LANCZOS) for s in column] for column in strips]
    width, height = half[0][0].size
    sheet = Image.new("RGB", (len(half) * (width + gap) - gap, len(half[0]) * (height + gap) - gap), "white")
    for i, column in enumerate(half):
        for j, picture in enumerate(column):
            sheet.paste(picture, (i * (width + gap), j * (height + gap)))
    return sheet


class Progress:
    """One line on the terminal that follows the sampler's steps."""

    def __init__(self, title: str) -> None:
        self.title, self.start, self.shown = title, time.monotonic(), -1

    def __call__(self, message: dict[str, Any]) -> None:
        if message["type"] != "progress":
            return
        value, total = message["data"]["value"], message["data"]["max"]
        # A terminal gets every step; a log file a line each quarter.
        terminal = sys.stdout.isatty()
        mark = value if terminal else 4 * value // total
        if mark != self.shown:
            self.shown = mark
            line = f"{self.title}: step {value}/{total}, {time.monotonic() - self.start:.0f} s"
            print(f"\r{line}  " if terminal else line, end="" if terminal and value < total else "\n", flush=True)


@dataclass(frozen=True)
class Outcome:
    """What one workflow gave: table rows, gains over the baseline in dB, what went wrong, and the strips."""

    rows: list[str]
    gains: list[float]
    faults: list[str]
    strips: list[Image.Image]


def run_task(server: Server, task: Task) -> Outcome:
    prompt = json.loads((ROOT / "workflows" / "api" / f"{task.workflow}.json").read_text())
    start = time.monotonic()
    outputs = server.run(prompt, Progress(task.title))
    seconds = time.monotonic() - start
    truths, measured, results, holes = (
        pictures(server, prompt, outputs, title) for title in ("Truth", "Measurement", "Result", "Hole")
    )
    text = outputs[node_titled(prompt, "Finish")]["text"][0]
    residuals = [float(value) for value in re.findall(r"-> (\S+)", text)]
    hole = np.asarray(holes[0])[..., 0] > 127 if holes else None
    rows, gains, faults, strips = [], [], [], []
    for i, (truth, y, result) in enumerate(zip(truths, measured, results, strict=True)):
        base = baseline(y, hole, truth.size)
        before, after = psnr(base, truth), psnr(result, truth)
        gains.append(after - before)
        changed = "-" if hole is None else str(int((np.asarray(result) != np.asarray(truth))[~hole].any(-1).sum()))
        rows.append(
            f"| {task.title} | {i + 1} | {before:.2f} | {after:.2f} | {after - before:+.2f} | {residuals[i]:.1e} | {changed} | "
            f"{seconds / len(truths):.1f} |"
        )
        if residuals[i] > 1e-4:
            faults.append(f"{task.title}, picture {i + 1}: |A x - y| = {residuals[i]:.1e}, expected at most 1e-4")
        if changed not in ("-", "0"):
            faults.append(f"{task.title}, picture {i + 1}: {changed} kept pixels changed, expected none")
        shown = [truth, y.resize(truth.size, Image.Resampling.NEAREST), base, result]
        captions = ["truth", "measurement", f"{task.baseline_name} {before:.1f} dB", f"result {after:.1f} dB"]
        strips.append(strip(shown, captions))
        strips[-1].save(OUTPUT / f"{task.workflow}_{i + 1}.png")
    if len(truths) != 4:
        faults.append(f"{task.title}: {len(truths)} pictures, expected 4")
    return Outcome(rows, gains, faults, strips)


def main() -> int:
    try:
        paths = prepare()
    except SetupError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 1
    OUTPUT.mkdir(parents=True, exist_ok=True)
    print("starting ComfyUI ...", flush=True)
    rows, means, faults, strips = [], [], [], []
    with running(sys.executable, paths["comfyui"], paths["base"], OUTPUT / "comfyui.log", "--cpu") as server:
        for task in TASKS:
            try:
                outcome = run_task(server, task)
            except PromptFailed as error:
                print(f"ERROR: {task.workflow}: {error}\nThe server's log: {server.log}", file=sys.stderr)
                return 1
            rows += outcome.rows
            faults += outcome.faults
            strips.append(outcome.strips)
            mean = sum(outcome.gains) / len(outcome.gains)
            means.append(f"{task.title}: {mean:+.2f} dB over {task.baseline_name} on average")
            if mean < task.target_db:
                faults.append(
                    f"{task.title}: {mean:+.2f} dB over {task.baseline_name}, expected at least {task.target_db:+.1f}"
                )
    header = "| task | picture | baseline dB | result dB | gain dB | rms of A x - y | kept pixels changed | s / picture |"
    table = "\n".join([header, "|" + "---|" * 8, *rows, "", *(f"* {line}" for line in means)])
    grid(strips).save(OUTPUT / "grid.png")
    (OUTPUT / "report.md").write_text(f"# Demo\n\nPSNR against the truth.\n\n{table}\n")
    print(f"\n{table}\n\nPictures and this table: {OUTPUT}")
    for fault in faults:
        print(f"ERROR: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
