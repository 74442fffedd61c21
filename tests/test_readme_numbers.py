"""The README's table of qualities is that of the measured rows, with the weights that are shipped."""

from pathlib import Path

from dev import make_readme

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_table_is_up_to_date() -> None:
    """`python dev/make_readme.py` writes it."""
    assert make_readme.quality() in README.read_text()


def test_replacing_twice_is_replacing_once() -> None:
    text = README.read_text()
    once = make_readme.replaced(text, "quality", "numbers")
    assert make_readme.replaced(once, "quality", "numbers") == once
    assert make_readme.replaced(once, "quality", make_readme.quality()) == text
