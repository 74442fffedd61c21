"""`make readme`: runs the demo, and brings the README's picture and numbers up to date.

Replaces docs/demo.png and what stands between <!-- demo --> or <!-- quality --> and its end mark. The quality table is that of
the rows in benchmarks/results/quality.csv of the shipped weights, which `benchmarks/quality.py` measures in hours.
"""

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from benchmarks.quality_methods import DENOISE_SIGMA, weights_id  # noqa: E402
from benchmarks.quality_report import NAMES, RESULTS, mean_and_error, preferred, psnrs, read  # noqa: E402

ROWS = RESULTS / "quality.csv"
SIGMA, PRECISION = 0.02, "bfloat16"
METHODS = {
    "baseline_0": "baseline",
    "decoder_only_0": "decoder only",
    "latent_dps_100": "latent DPS 100",
    "psld_paper_50": "PSLD paper 50",
    "psld_paper_100": "PSLD paper 100",
    "psld_paper_250": "PSLD paper 250",
    "psld_paper_1000": "PSLD paper 1000",
    "psld_line_search_20": "PSLD line search 20",
    "psld_line_search_50": "PSLD line search 50",
    "cpigdm_5": "C-PiGDM 5",
    "cpigdm_10": "C-PiGDM 10",
    "cpigdm_20": "C-PiGDM 20",
}


def quality() -> str:
    """PSNR by task and method, over the pictures that all of them have; methods not measured on every task are left out."""
    weights = weights_id(pixels=False)
    rows = [row for row in read(ROWS) if row["weights"] == weights and row["split"] == "validate"]
    rows = preferred(rows, PRECISION)
    found = {task: psnrs(rows, task, DENOISE_SIGMA if task == "denoise" else SIGMA) for task in NAMES}
    methods = [method for method in METHODS if all(method in of for of in found.values())]
    if missing := [METHODS[method] for method in METHODS if method not in methods]:
        print(f"not measured on every task with these weights, left out: {', '.join(missing)}", file=sys.stderr)
    common = set.intersection(*(set(of[method]) for of in found.values() for method in methods)) if methods else set()
    if len(common) < 2:
        sys.exit(f"{ROWS} has no two pictures that a method was measured on with every task; run benchmarks/quality.py")
    cells = {
        task: [mean_and_error([of[method][i] for i in sorted(common)]) for method in methods] for task, of in found.items()
    }
    errors = sorted(error for row in cells.values() for _, error in row)
    lines = [
        f"PSNR in dB on the demo prior, by number of network calls: means over {len(common)} held-out portraits, noise .02, in",
        f"denoising .2. Standard errors are {errors[0]:.1f} to {errors[-1]:.1f}, half of them below {errors[len(errors) // 2]:.1f}, much of it shared between methods, as the pictures are the same.",
        "",
        "| task | " + " | ".join(METHODS[method] for method in methods) + " |",
        "|---" * (1 + len(methods)) + "|",
    ]
    for task, name in NAMES.items():
        lines.append(f"| {name} | " + " | ".join(f"{mean:.1f}" for mean, _ in cells[task]) + " |")
    return "\n".join(lines)


def replaced(text: str, mark: str, block: str) -> str:
    """The text with another block between the marks.

    Raises:
        ValueError: a mark is not there, or more than once.
    """
    start, end = f"<!-- {mark} -->\n", f"\n<!-- end of {mark} -->"
    for each in (start, end):
        if text.count(each) != 1:
            raise ValueError(f"README.md: {each.strip()} is there {text.count(each)} times, expected once")
    return f"{text.partition(start)[0]}{start}\n{block}\n{end}{text.partition(end)[2]}"


def main() -> int:
    import demo  # beside this file; needs the set-up that make does

    readme = ROOT / "README.md"
    text = replaced(readme.read_text(), "quality", quality())  # before the demo's minutes: it may have no rows
    if fault := demo.main():
        return fault
    table = (demo.OUTPUT / "report.md").read_text().split("\n\n", 2)[2].strip()
    readme.write_text(replaced(text, "demo", table))
    shutil.copyfile(demo.OUTPUT / "grid.png", ROOT / "docs" / "demo.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
