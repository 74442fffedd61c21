"""Mask makers: what is lost, seeds, shapes."""

import pytest
import torch

from operators import Mask, box_mask, random_mask, stripe_mask

S = (3, 12, 17)


def test_box_is_lost() -> None:
    keep = box_mask(S, (4, 5), (2, 3))
    assert keep.shape == (1, 1, 12, 17)
    assert keep.dtype == torch.float32
    expected = torch.ones(12, 17)
    expected[2:6, 3:8] = 0
    assert torch.equal(keep[0, 0], expected)
    assert torch.equal(box_mask(S, (4, 5), (2, 3), invert=True), 1 - keep)
    assert torch.equal(box_mask(S, 4), box_mask(S, (4, 4), (4, 6)))
    assert torch.equal(box_mask(S, (12, 3)), box_mask(S, (12, 3), (0, 7)))


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.92])
def test_random_loses_the_fraction(fraction: float) -> None:
    keep = random_mask(S, fraction, seed=4)
    assert keep.shape == (1, 1, 12, 17)
    assert (keep == 0).sum() == round(fraction * 12 * 17)
    each = random_mask(S, fraction, seed=4, per_channel=True)
    assert each.shape == (1, 3, 12, 17)
    assert (each == 0).sum() == round(fraction * 3 * 12 * 17)


def test_seeds() -> None:
    before = torch.get_rng_state()
    assert torch.equal(random_mask(S, 0.5, 1), random_mask(S, 0.5, 1))
    assert not torch.equal(random_mask(S, 0.5, 1), random_mask(S, 0.5, 2))
    assert torch.equal(stripe_mask(S, None, fraction=0.5, seed=1), stripe_mask(S, None, fraction=0.5, seed=1))
    assert not torch.equal(stripe_mask(S, None, fraction=0.5, seed=1), stripe_mask(S, None, fraction=0.5, seed=2))
    assert torch.equal(torch.get_rng_state(), before), "the global generator is the caller's"
    square = stripe_mask((1, 16, 16), None, direction="both", fraction=0.5)[0, 0]
    assert not torch.equal(square, square.T)


def test_stripes() -> None:
    lost = [i for i in range(12) if (i - 1) % 5 < 2]
    rows = stripe_mask(S, 5, 2, 1)
    assert rows.shape == (1, 1, 12, 17)
    assert [i for i in range(12) if not rows[0, 0, i].any()] == lost
    assert rows[0, 0].amin(1).equal(rows[0, 0].amax(1))
    columns = stripe_mask(S, 5, 2, -3, "vertical")
    assert [j for j in range(17) if not columns[..., j].any()] == [j for j in range(17) if (j + 3) % 5 < 2]
    both = stripe_mask(S, 5, 2, 1, "both")
    assert torch.equal(both, rows * stripe_mask(S, 5, 2, 1, "vertical"))
    missing = stripe_mask(S, None, direction="vertical", fraction=0.4, seed=3)
    assert (missing.amax(2) == 0).sum() == round(0.4 * 17)
    added = stripe_mask(S, 5, 2, 1, fraction=0.4, seed=3)
    assert torch.equal(added, rows * stripe_mask(S, None, fraction=0.4, seed=3))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: box_mask((3, 12), 4), "shape"),
        (lambda: box_mask(S, 0), "size"),
        (lambda: box_mask(S, 13), "size"),
        (lambda: box_mask(S, 4, (9, 0)), "corner"),
        (lambda: box_mask(S, (12, 17)), "size: every pixel would be lost"),
        (lambda: random_mask(S, 1.0), "fraction"),
        (lambda: random_mask(S, -0.1), "fraction"),
        (lambda: random_mask(S, float("nan")), "fraction"),
        (lambda: random_mask((1, 2, 2), 0.99), "fraction: every pixel would be lost"),
        (lambda: stripe_mask(S, 4, 4), "width"),
        (lambda: stripe_mask(S, 4, 0), "width"),
        (lambda: stripe_mask(S, None), "period"),
        (lambda: stripe_mask(S, 4, direction="diagonal"), "direction"),
        (lambda: stripe_mask(S, 4, fraction=2), "fraction"),
        (lambda: stripe_mask((1, 2, 9), 4, 3), "period, width, fraction: every pixel would be lost"),
    ],
)
def test_errors_name_the_argument(make: object, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        make()


def test_masks_make_operators() -> None:
    for keep in (box_mask(S, 4), random_mask(S, 0.3), random_mask(S, 0.3, per_channel=True), stripe_mask(S, 4)):
        assert Mask(keep).in_shape == S
