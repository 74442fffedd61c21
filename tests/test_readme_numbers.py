"""The READMEs' tables of qualities and the reports are those of the measured rows, with the weights that are shipped."""

from pathlib import Path

import pytest

from benchmarks.quality_report import rows_path, table
from dev import make_readme


def test_the_tables_are_up_to_date() -> None:
    """`make readme` writes them."""
    for path, block in zip(make_readme.READMES, make_readme.quality(), strict=True):
        assert make_readme.replaced(path, path.read_text(), "quality", block) == path.read_text()


@pytest.mark.parametrize(
    ("split", "pixels", "precision"),
    [("validate", False, "bfloat16"), ("tune", False, "bfloat16"), ("validate", True, "float32")],
)
def test_a_report_is_up_to_date(split: str, pixels: bool, precision: str) -> None:
    """`benchmarks/quality.py --report` writes it, with `--split tune` the second, with `--pixels` the third."""
    assert rows_path(split, pixels).with_suffix(".md").read_text() == table(split, pixels, precision)


def test_replacing_twice_is_replacing_once() -> None:
    text = make_readme.REPORT.read_text()
    once = make_readme.replaced(make_readme.REPORT, text, "demo", "numbers")
    assert once != text
    assert make_readme.replaced(make_readme.REPORT, once, "demo", "numbers") == once


@pytest.mark.parametrize("path", make_readme.READMES, ids=["README", "report"])
@pytest.mark.parametrize("mark", ["<!-- quality -->\n", "\n<!-- end of quality -->"])
def test_no_mark_is_missed(mark: str, path: Path) -> None:
    text = path.read_text()
    for broken in (text.replace(mark, ""), text + mark):
        with pytest.raises(ValueError, match=r"README.md: .*quality --> is there [02] times, expected once"):
            make_readme.replaced(path, broken, "quality", "numbers")
