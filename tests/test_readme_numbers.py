"""The README's table of qualities is that of the measured rows, with the weights that are shipped."""

from pathlib import Path

import pytest

from dev import make_readme

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_table_is_up_to_date() -> None:
    """`make readme` writes it."""
    assert make_readme.quality() in README.read_text()


def test_replacing_twice_is_replacing_once() -> None:
    text = README.read_text()
    once = make_readme.replaced(text, "quality", "numbers")
    assert make_readme.replaced(once, "quality", "numbers") == once
    assert make_readme.replaced(once, "quality", make_readme.quality()) == text


@pytest.mark.parametrize("mark", ["<!-- quality -->\n", "\n<!-- end of quality -->"])
def test_no_mark_is_missed(mark: str) -> None:
    text = README.read_text()
    for broken in (text.replace(mark, ""), text + mark):
        with pytest.raises(ValueError, match=r"quality --> is there [02] times, expected once"):
            make_readme.replaced(broken, "quality", "numbers")
