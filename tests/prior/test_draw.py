"""The drawn portraits are the ones that the weights were trained on, they vary as they should, and they carry fine detail."""

from pathlib import Path

import numpy as np
from PIL import Image

from prior.draw import VALIDATION_SEED, draw
from prior.person import random_person

# One for each hair style.
SEEDS = (1_000_005, 1_000_002, 1_000_019, 1_000_039, 1_000_013, 1_000_024, 1_000_017, 1_000_018)


def test_portraits_match_the_training_data() -> None:
    with Image.open(Path(__file__).with_name("portraits.png")) as sheet:
        expected = np.asarray(sheet, float)
    drawn = np.concatenate([draw(seed) for seed in SEEDS], 1).astype(float)
    assert drawn.shape == expected.shape == (128, 8 * 128, 3)
    difference = np.abs(drawn - expected).reshape(128, 8, 128, 3).mean((0, 2, 3))
    assert difference.max() < 1, f"mean difference of each portrait, in grey levels: {difference}"


def test_the_reference_has_every_hair_style() -> None:
    assert [random_person(np.random.default_rng(seed)).style for seed in SEEDS] == list(range(8))


def test_a_seed_fixes_the_portrait() -> None:
    first, again, other = draw(3), draw(3), draw(4)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert np.abs(first.astype(float) - other).mean() > 10


def test_size_changes_only_the_resolution() -> None:
    small, large = draw(5).astype(float), draw(5, size=256).astype(float)
    assert large.shape == (256, 256, 3)
    assert np.abs(large.reshape(128, 2, 128, 2, 3).mean((1, 3)) - small).mean() < 2


def test_pose_scale_and_light_vary() -> None:
    people = [random_person(np.random.default_rng(VALIDATION_SEED + i)) for i in range(200)]
    roll = np.degrees([p.roll for p in people])
    assert roll.min() < -8
    assert roll.max() > 8
    assert min(p.scale for p in people) < 0.9
    assert max(p.scale for p in people) > 1.1
    assert min(p.turn for p in people) < -0.8
    assert max(p.turn for p in people) > 0.8
    assert min(p.light[0] for p in people) < -0.8
    assert max(p.light[0] for p in people) > 0.8


def test_hair_has_detail_that_a_four_times_smaller_picture_loses() -> None:
    """What is left of the brightness after smoothing over 4 x 4 pixels, inside the hair of a portrait."""
    picture = draw(1_000_013).astype(float).mean(2)  # curls fill the top of the head
    hair = picture[20:28, 48:72]
    blocks = hair.reshape(2, 4, 6, 4)
    detail = (blocks - blocks.mean((1, 3), keepdims=True)).std()
    bald = draw(1_000_005).astype(float).mean(2)[32:40, 60:76].reshape(2, 4, 4, 4)
    assert detail > 3
    assert detail > 2 * (bald - bald.mean((1, 3), keepdims=True)).std()
