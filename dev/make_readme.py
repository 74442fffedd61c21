"""`make readme`: the README's picture grid and numbers, from the demo's run just before and from the rows of benchmarks/quality.py.

Replaces docs/demo.png and what stands between <!-- demo --> or <!-- quality --> and its end mark. Restores nothing itself.
"""

import csv
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from benchmarks.quality import RESULTS, weights_id  # noqa: E402
from benchmarks.quality_methods import DENOISE_SIGMA  # noqa: E402

SIGMA = 0.02
TASKS = {
    "downscale_4": "x4 super-resolution",
    "downscale_8": "x8 super-resolution",
    "box": "box",
    "random_80": "80 % of pixels missing",
    "free_form": "free-form holes",
    "gaussian_blur": "Gaussian blur",
    "motion_blur": "motion blur",
    "stripes": "stripes",
    "denoise": f"denoising, sigma {str(DENOISE_SIGMA).lstrip('0')}",
    "grayscale": "black and white",
}
METHODS = {
    "baseline_0": "baseline",
    "decoder_only_0": "decoder only",
    "latent_dps_100": "latent DPS, 100",
    "psld_paper_50": "PSLD paper, 50",
    "psld_paper_100": "100",
    "psld_paper_250": "250",
    "psld_line_search_20": "PSLD line search, 20",
    "psld_line_search_50": "50",
    "cpigdm_5": "C-PiGDM, 5",
    "cpigdm_10": "10",
    "cpigdm_20": "20",
}


def quality() -> str:
    """PSNR by task and method, over the pictures that all of them have."""
    weights = weights_id(pixels=False)
    with (RESULTS / "quality.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["weights"] == weights and row["split"] == "validate"]
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if float(row["sigma"]) == (DENOISE_SIGMA if row["task"] == "denoise" else SIGMA):
            found.setdefault((row["task"], row["method"]), {})[row["picture"]] = float(row["psnr"])
    methods = [method for method in METHODS if all((task, method) in found for task in TASKS)]
    common = set.intersection(*(set(found[task, method]) for task in TASKS for method in methods)) if methods else set()
    if not common:
        sys.exit(
            "benchmarks/results/quality.csv has no picture that every task and method was measured on; run benchmarks/quality.py"
        )
    lines = [
        f"PSNR in dB on the demo prior, by number of network calls: means over {len(common)} held-out portraits, noise .02.",
        "",
    ]
    lines += ["| task | " + " | ".join(METHODS[method] for method in methods) + " |", "|---" * (1 + len(methods)) + "|"]
    for task, name in TASKS.items():
        means = [sum(found[task, method][i] for i in common) / len(common) for method in methods]
        lines.append(f"| {name} | " + " | ".join(f"{mean:.1f}" for mean in means) + " |")
    return "\n".join(lines)


def replaced(text: str, mark: str, block: str) -> str:
    """The text with another block between the marks."""
    start, end = f"<!-- {mark} -->\n", f"\n<!-- end of {mark} -->"
    before, after = text.split(start)[0], text.split(end)[1]
    return f"{before}{start}\n{block}\n{end}{after}"


def main() -> None:
    output, readme = ROOT / "output" / "demo", ROOT / "README.md"
    shutil.copyfile(output / "grid.png", ROOT / "docs" / "demo.png")
    table = (output / "report.md").read_text().split("\n\n", 2)[2].strip()
    readme.write_text(replaced(replaced(readme.read_text(), "demo", table), "quality", quality()))


if __name__ == "__main__":
    main()
