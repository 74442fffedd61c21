"""The drawn portraits are the ones that the shipped weights were trained on."""

from pathlib import Path

import numpy as np
from PIL import Image

from prior.draw import draw

# One for each hair style; together they have every mouth, glasses, a wink, blushing cheeks and a striped shirt.
SEEDS = (1_000_044, 1_000_313, 1_000_227, 1_000_390, 1_000_223)


def test_portraits_match_the_training_data() -> None:
    with Image.open(Path(__file__).with_name("portraits.png")) as sheet:
        expected = np.asarray(sheet, float)
    drawn = np.concatenate([draw(seed) for seed in SEEDS], 1).astype(float)
    assert drawn.shape == expected.shape == (128, 5 * 128, 3)
    difference = np.abs(drawn - expected).reshape(128, 5, 128, 3).mean((0, 2, 3))
    assert difference.max() < 1, f"mean difference of each portrait, in grey levels: {difference}"


def test_a_seed_fixes_the_portrait() -> None:
    first, again, other = draw(3), draw(3), draw(4)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert np.abs(first.astype(float) - other).mean() > 10


def test_size_changes_only_the_resolution() -> None:
    small, large = draw(5).astype(float), draw(5, size=256).astype(float)
    assert large.shape == (256, 256, 3)
    assert np.abs(large.reshape(128, 2, 128, 2, 3).mean((1, 3)) - small).mean() < 2
