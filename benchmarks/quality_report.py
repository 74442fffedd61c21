"""What quality.py measured, as a table and as plots."""

import ast
import csv
import math
import pathlib
from typing import Any

from benchmarks.quality_methods import METHODS, PIXEL_METHODS, SMALL_TASKS, TASKS, weights_id

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
Rows = list[dict[str, str]]
Run = tuple[str, str, str, str]
# What the tasks are called in every table and plot.
NAMES = {
    "downscale_4": "x4 super-resolution",
    "downscale_8": "x8 super-resolution",
    "box": "box",
    "random_80": "80 % of pixels missing",
    "free_form": "free-form holes",
    "gaussian_blur": "Gaussian blur",
    "motion_blur": "motion blur",
    "stripes": "stripes",
    "denoise": "denoising",
    "grayscale": "black and white",
}
COLUMNS = ("psnr", "ssim", "features", "hole_psnr", "residual", "calls", "seconds")


def read(path: pathlib.Path) -> Rows:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def rows_path(split: str, pixels: bool) -> pathlib.Path:
    stem = ("pixels" if pixels else "quality") if split == "validate" else "tuning" + "_pixels" * pixels
    return RESULTS / f"{stem}.csv"


def present(split: str, pixels: bool) -> Rows:
    """The rows of one split that were measured with the shipped weights."""
    weights = weights_id(pixels)
    return [row for row in read(rows_path(split, pixels)) if row["split"] == split and row["weights"] == weights]


def asked(pixels: bool) -> tuple[list[str], list[str]]:
    """The tasks and the methods, as tables have them."""
    return (list(SMALL_TASKS), list(PIXEL_METHODS)) if pixels else (list(TASKS), list(METHODS))


def parts(name: str) -> tuple[str, dict[str, Any], int]:
    """A method's name in the tables, "psld_line_search:omega=0.5:inner_steps=2_20" say: its name in METHODS, other options, calls."""
    given, _, calls = name.rpartition("_")
    method, *others = given.split(":")
    return method, {key: ast.literal_eval(value) for key, value in (other.split("=") for other in others)}, int(calls)


def run_of(row: dict[str, str]) -> Run:
    """What a row measured, in whatever precision."""
    return row["task"], row["sigma"], row["method"], row["picture"]


def preferred(rows: Rows, precision: str) -> Rows:
    """One row for each run: that in `precision`, or where there is none that in float32, or in another."""
    best: dict[Run, dict[str, str]] = {}
    for row in sorted(rows, key=lambda row: (row["precision"] == precision, row["precision"] == "float32")):
        best[run_of(row)] = row
    return list(best.values())


def by_picture(rows: Rows, task: str, sigma: float, column: str = "psnr") -> dict[str, dict[str, float]]:
    """Of one column, by method and picture."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["task"] == task and float(row["sigma"]) == sigma:
            found.setdefault(row["method"], {})[row["picture"]] = float(row[column])
    return found


def mean_and_error(values: list[float]) -> tuple[float, float]:
    # fsum: the same digits on every processor.
    n = len(values)
    mean = math.fsum(values) / n
    return mean, (math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n) ** 0.5 if n > 1 else math.nan


def in_order(rows: Rows, methods: list[str]) -> list[str]:
    """The names in the rows: as the methods are, then by calls."""
    return sorted({r["method"] for r in rows}, key=lambda name: (methods.index(parts(name)[0]), parts(name)[2], name))


def glance(rows: Rows, tasks: list[str], names: list[str]) -> list[str]:
    """PSNR in dB of every method on every task, over the pictures that all of them have, but those with fewer than half as many as others."""
    lines = ["| task | sigma | n | " + " | ".join(names) + " |", "|---" * (3 + len(names)) + "|"]
    for task in tasks:
        for sigma in sorted({float(r["sigma"]) for r in rows if r["task"] == task}):
            found = by_picture(rows, task, sigma)
            most = max(map(len, found.values()))
            common = set.intersection(*(set(of) for of in found.values() if 2 * len(of) >= most))
            means = {name: mean_and_error([of[i] for i in common & of.keys()])[0] for name, of in found.items()}
            fewer = {name: f" ({len(common & of.keys())})" for name, of in found.items() if not common <= of.keys()}
            cells = [f"{means[name]:.2f}{fewer.get(name, '')}" if name in found else "-" for name in names]
            lines.append(f"| {NAMES[task]} | {sigma:g} | {len(common)} | " + " | ".join(cells) + " |")
    return lines


def less_each(rows: Rows, tasks: list[str], names: list[str], leader: str, column: str, digits: int) -> list[str]:
    """A column of `leader` less that of each method on each task: mean and standard error over the pictures that both have.

    How many those are stands behind, where the leader has more.
    """
    others = [name for name in names if name != leader]
    lines = ["| task | sigma | " + " | ".join(others) + " |", "|---" * (2 + len(others)) + "|"]
    for task in tasks:
        for sigma in sorted({float(r["sigma"]) for r in rows if r["task"] == task}):
            found = by_picture(rows, task, sigma, column)
            own, cells = found.get(leader, {}), []
            for name in others:
                common = own.keys() & found.get(name, {}).keys()
                mean, error = mean_and_error([own[i] - found[name][i] for i in common]) if common else (math.nan, math.nan)
                of = f" ({len(common)})" if len(common) < len(own) else ""
                cells.append(f"{mean:+.{digits}f} +- {error:.{digits}f}{of}" if common else "-")
            lines.append(f"| {NAMES[task]} | {sigma:g} | " + " | ".join(cells) + " |")
    return lines


def precisions(rows: Rows, others: Rows, tasks: list[str], names: list[str]) -> list[str]:
    """By how many dB of PSNR the rows are ahead of the same runs in another precision: mean, standard error, number of pictures.

    Nothing where no run is in both.
    """
    shared = {run_of(r) for r in rows} & {run_of(r) for r in others}
    if not shared:
        return []
    names = [name for name in names if name in {method for _, _, method, _ in shared}]
    lines = ["| task | sigma | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    everything: dict[str, list[float]] = {name: [] for name in names}

    def cell(differences: list[float]) -> str:
        mean, error = mean_and_error(differences) if differences else (math.nan, math.nan)
        return f"{mean:+.2f} +- {error:.2f} ({len(differences)})" if differences else "-"

    for task in tasks:
        for sigma in sorted({float(r["sigma"]) for r in others if r["task"] == task}):
            found, reference = by_picture(rows, task, sigma), by_picture(others, task, sigma)
            cells = []
            for name in names:
                own, other = found.get(name, {}), reference.get(name, {})
                differences = [own[i] - other[i] for i in own.keys() & other.keys()]
                everything[name] += differences
                cells.append(cell(differences))
            if cells != ["-"] * len(cells):
                lines.append(f"| {NAMES[task]} | {sigma:g} | " + " | ".join(cells) + " |")
    return [*lines, "| all | | " + " | ".join(map(cell, everything.values())) + " |"]


def table(split: str, pixels: bool, precision: str) -> str:
    """The rows of one split as Markdown: those in `precision` where there are any."""
    tasks, methods = asked(pixels)
    leaders = ["cpigdm_5"] if pixels else ["cpigdm_10", "cpigdm_5", "psld_line_search_50", "psld_line_search_20"]
    there = present(split, pixels)
    rows = preferred(there, precision)
    heading = "# Quality on the demo prior"
    if not rows:
        return f"{heading}\n\nNothing measured with the present weights.\n"
    if rows[0]["split"] == "tune":
        heading += ": the portraits that presets are chosen on"
    # Methods with other options than theirs are in the tables of single tasks only.
    names = [name for name in in_order(rows, methods) if not parts(name)[1]]
    by_precision = {kind: [r for r in there if r["precision"] == kind] for kind in sorted({r["precision"] for r in there})}
    exact = by_precision.pop("float32", [])
    lines = [
        heading,
        "",
        f"Held-out portraits, split `{rows[0]['split']}`, weights {rows[0]['weights']}. Made by `benchmarks/quality.py`, whose text says "
        "what each column is; mean and standard error over n pictures.",
        "",
        f"A row with fewer pictures compares with the others through the same first pictures only. Networks in {precision}, or in what "
        "stands behind n; seconds of another precision, or processor, do not compare.",
        "",
        "## At a glance",
        "",
        "PSNR in dB over the first n pictures; behind a mean over fewer of them, how many.",
        "",
        *glance(rows, tasks, names),
    ]
    for leader in [name for name in leaders if name in names]:
        for title, column, digits in (("dB", "psnr", 2), ("feature distance: below 0 is nearer", "features", 3)):
            lines += ["", f"## {leader} less each, {title}", "", *less_each(rows, tasks, names, leader, column, digits)]
    for kind, own in by_precision.items():
        if compared := precisions(own, exact, tasks, names):
            lines += ["", f"## {kind} less float32, dB (pictures)", "", *compared]
    for task in tasks:
        for sigma in sorted({float(r["sigma"]) for r in rows if r["task"] == task}):
            here = [r for r in rows if r["task"] == task and float(r["sigma"]) == sigma]
            lines += ["", f"## {NAMES[task]}, sigma {sigma:g} (`{task}`)", ""]
            lines += [
                "| method | calls | n | PSNR dB | SSIM | features | hole PSNR dB | residual | s / picture |",
                "|---" * 9 + "|",
            ]
            for name in in_order(here, methods):
                mine = [r for r in here if r["method"] == name]
                column = {key: mean_and_error([float(r[key]) for r in mine]) for key in COLUMNS}
                kinds = sorted({r["precision"] for r in mine})
                count = str(len(mine)) + "".join(f", {kind}" for kind in kinds if kinds != [precision])
                cells = [name.rpartition("_")[0], f"{column['calls'][0]:.0f}", count]
                cells += [f"{column['psnr'][0]:.2f} +- {column['psnr'][1]:.2f}", f"{column['ssim'][0]:.3f}"]
                cells += [f"{column['features'][0]:.3f} +- {column['features'][1]:.3f}"]
                cells += ["-" if math.isnan(column["hole_psnr"][0]) else f"{column['hole_psnr'][0]:.2f}"]
                cells += [f"{column['residual'][0]:.3g}", f"{column['seconds'][0]:.2f}"]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plots(split: str, pixels: bool, precision: str) -> None:
    """Beside the rows, ...-calls.png and ...-seconds.png: PSNR and feature distance of every task at its smallest noise above 0.

    A curve for each method; a level line for the baseline, and by calls for everything that makes none. By seconds only rows in
    `precision`, and the baseline.
    """
    try:
        from matplotlib import pyplot, ticker
    except ImportError:
        print("no Matplotlib: the table is written, the plots are not")
        return
    tasks, methods = asked(pixels)
    best, stem = preferred(present(split, pixels), precision), rows_path(split, pixels).with_suffix("")
    if not best:
        return
    shown = [task for task in tasks if any(r["task"] == task for r in best)]
    curves = [m for m in methods if any(parts(r["method"])[0] == m for r in best)]
    for axis, label in (("calls", "network calls"), ("seconds", "CPU s a picture, several processors")):
        timed = [r for r in best if r["precision"] == precision or parts(r["method"])[0] == "baseline"]
        rows = best if axis == "calls" else timed
        width = min(5, len(shown))
        height = 2 * math.ceil(len(shown) / width)  # a row of PSNR, one of distances, and so on
        figure, grid = pyplot.subplots(height, width, figsize=(2.9 * width, 2.5 * height), squeeze=False)
        for ax in grid.flat:
            ax.set_visible(False)
        for place, task in enumerate(shown):
            below, column = divmod(place, width)
            levels = sorted({float(r["sigma"]) for r in rows if r["task"] == task})
            sigma = next((s for s in levels if s > 0), 0.0)
            for row, value in enumerate(("psnr", "features")):
                ax = grid[2 * below + row, column]
                ax.set_visible(True)
                for i, method in enumerate(curves):
                    here = [r for r in rows if r["task"] == task and float(r["sigma"]) == sigma]
                    mine = [r for r in here if parts(r["method"])[:2] == (method, {})]
                    if not mine:
                        continue
                    x, y, error = [], [], []
                    for name in in_order(mine, methods):
                        of = [r for r in mine if r["method"] == name]
                        x.append(mean_and_error([float(r[axis]) for r in of])[0])
                        mean, spread = mean_and_error([float(r[value]) for r in of])
                        y.append(mean)
                        error.append(spread)
                    style = {"color": f"C{i}", "label": method.replace("_", " ")}
                    if method == "baseline" or x[0] == 0:
                        ax.axhline(y[0], linestyle=":", **style)
                    else:
                        ax.errorbar(x, y, error, marker="o", markersize=3, linewidth=1.2, **style)
                ax.set_xscale("log")
                ax.xaxis.set_minor_formatter(ticker.NullFormatter())
                ax.grid(alpha=0.3)
                if row == 0:
                    ax.set_title(f"{NAMES[task]}, noise {sigma:g}", fontsize=9)
                else:
                    ax.set_xlabel(label, fontsize=8)
                if column == 0:
                    ax.set_ylabel("PSNR, dB" if value == "psnr" else "feature distance", fontsize=8)
                ax.tick_params(labelsize=7)
        handles = {
            text: handle
            for ax in grid.flat
            if ax.get_visible()
            for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles, loc="lower center", ncols=len(handles), fontsize=8, frameon=False)
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        figure.savefig(f"{stem}-{axis}.png", dpi=110)
        pyplot.close(figure)
