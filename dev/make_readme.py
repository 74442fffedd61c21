"""`make readme`: runs the demo, and brings the READMEs' picture and numbers up to date.

Replaces docs/demo.png, and in README.md and benchmarks/README.md what stands between <!-- quality --> or <!-- demo --> and its end
mark. The quality tables are those of the rows in benchmarks/results/quality.csv of the shipped weights, which
`benchmarks/quality.py` measures in hours.
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from benchmarks.quality_methods import DENOISE_SIGMA  # noqa: E402
from benchmarks.quality_report import NAMES, by_picture, mean_and_error, preferred, present  # noqa: E402

READMES = README, REPORT = ROOT / "README.md", ROOT / "benchmarks" / "README.md"
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
# In README.md; in benchmarks/README.md all.
SHORT = ("baseline_0", "psld_paper_250", "psld_paper_1000", "psld_line_search_20", "cpigdm_5", "cpigdm_10")
# Of which SSIM and residual are shown, too.
ALSO = (
    "baseline_0",
    "latent_dps_100",
    "psld_paper_100",
    "psld_paper_250",
    "psld_paper_1000",
    "psld_line_search_20",
    "cpigdm_10",
)


def quality() -> tuple[str, str]:
    """Tables by task and method, the short one and all of them.

    Over the pictures that all methods have; methods not measured on every task are left out.
    """
    rows = preferred(present("validate", pixels=False), PRECISION)

    def found(column: str) -> dict[str, dict[str, dict[str, float]]]:
        return {task: by_picture(rows, task, DENOISE_SIGMA if task == "denoise" else SIGMA, column) for task in NAMES}

    psnr = found("psnr")
    methods = [method for method in METHODS if all(method in of for of in psnr.values())]
    if missing := [METHODS[method] for method in METHODS if method not in methods]:
        print(f"not measured on every task with these weights, left out: {', '.join(missing)}", file=sys.stderr)
    common = set.intersection(*(set(of[method]) for of in psnr.values() for method in methods)) if methods else set()
    if len(common) < 2:
        sys.exit(
            "benchmarks/results/quality.csv has no two pictures that a method was measured on with every task; run benchmarks/quality.py"
        )

    def means(of: dict[str, float]) -> tuple[float, float]:
        return mean_and_error([of[i] for i in sorted(common)])

    def decibels(task: str, method: str) -> str:
        return f"{means(psnr[task][method])[0]:.1f}"

    errors = sorted(means(of[method])[1] for of in psnr.values() for method in methods)
    ssim, residual = found("ssim"), found("residual")
    text = f"""\
PSNR in dB on the demo prior, by number of network calls: means over {len(common)} held-out portraits, noise .02, in
denoising .2. Standard errors are {errors[0]:.2f} to {errors[-1]:.2f}, half of them below {errors[len(errors) // 2]:.2f}, \
much of it shared between methods, as the pictures are the same.
"""
    short = [text, *table([method for method in methods if method in SHORT], decibels)]
    everything = [
        text,
        *table(methods, decibels),
        "",
        "SSIM on the same portraits, and |A x - y| in units of the noise before Finish: 1 is right.",
        "",
        *table(
            [method for method in methods if method in ALSO],
            lambda task, method: f"{means(ssim[task][method])[0]:.2f}, {means(residual[task][method])[0]:.2g}",
        ),
    ]
    return "\n".join(short), "\n".join(everything)


def table(methods: list[str], cell: Callable[[str, str], str]) -> list[str]:
    """A line for each task, a column for each method; cell: of a task and a method."""
    lines = ["| task | " + " | ".join(METHODS[method] for method in methods) + " |", "|---" * (1 + len(methods)) + "|"]
    return lines + [
        f"| {name} | " + " | ".join(cell(task, method) for method in methods) + " |" for task, name in NAMES.items()
    ]


def replaced(path: Path, text: str, mark: str, block: str) -> str:
    """The text, that of a file, with another block between the marks.

    Raises:
        ValueError: a mark is not there, or more than once.
    """
    start, end = f"<!-- {mark} -->\n", f"\n<!-- end of {mark} -->"
    for each in (start, end):
        if text.count(each) != 1:
            raise ValueError(f"{path.relative_to(ROOT)}: {each.strip()} is there {text.count(each)} times, expected once")
    return f"{text.partition(start)[0]}{start}\n{block}\n{end}{text.partition(end)[2]}"


def main() -> int:
    import demo  # beside this file; needs the set-up that make does

    # Before the demo's minutes: there may be no rows, or no marks.
    texts = {path: replaced(path, path.read_text(), "quality", block) for path, block in zip(READMES, quality(), strict=True)}
    replaced(REPORT, texts[REPORT], "demo", "")
    if fault := demo.main():
        return fault
    table = (demo.OUTPUT / "report.md").read_text().split("\n\n", 2)[2].strip()
    texts[REPORT] = replaced(REPORT, texts[REPORT], "demo", table)
    for path, text in texts.items():
        path.write_text(text)
    shutil.copyfile(demo.OUTPUT / "grid.png", ROOT / "docs" / "demo.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
