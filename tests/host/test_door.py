"""What comes over links, which ComfyUI does not look at: numbers out of range, unknown choices, and nothing at all."""

from types import ModuleType
from typing import Any

import pytest
import torch


def find(pack: ModuleType, name: str) -> Any:
    return next(node for node in pack.nodes.NODES if node.__name__ == name)


@pytest.mark.parametrize(
    ("node", "given", "message"),
    [
        ("Downscale", {"method": {"method": "area", "factor": 65}}, "factor: got 65, expected a number from 1 to 64"),
        ("BlurOperator", {"kernel": {"kernel": "disk", "radius": float("nan")}, "boundary": "zero"}, "radius: got nan"),
        ("BlurOperator", {"kernel": {"kernel": "disk", "radius": 1e30}, "boundary": "zero"}, "radius: got 1e[+]30"),
        ("DemoPictures", {"first": 0, "count": -1}, "count: got -1, expected a number from 1 to 64"),
        ("DemoPictures", {"first": 0, "count": 2**70}, "count: got 1180591620717411303424"),
        ("DemoPictures", {"first": 1.5, "count": 1}, "first: got '1.5', expected a whole number"),
        ("Downscale", {"method": {"method": "area", "factor": "2"}}, "factor: got '2', expected a whole number"),
        (
            "BlurOperator",
            {"kernel": {"kernel": "disk", "radius": [2]}, "boundary": "zero"},
            r"radius: got '\[2\]', expected a number",
        ),
    ],
)
def test_numbers_out_of_range_and_what_is_no_number(node: str, given: dict[str, Any], message: str, pack: ModuleType) -> None:
    with pytest.raises(ValueError, match=message):
        find(pack, node).execute(**given)


def test_an_unknown_choice_is_named_with_the_known_ones(pack: ModuleType) -> None:
    """ComfyUI drops a dynamic input whose choice it does not know, and says nothing."""
    for given in ({}, {"method": None}, {"method": {"method": "X"}}):
        with pytest.raises(ValueError, match="method: is missing or not one of area, bicubic, lanczos"):
            find(pack, "Downscale").execute(**given)
    given = {"pattern": "stripes", "period": 16, "width": 2, "offset": 0, "direction": "X", "fraction": 0.0, "seed": 0}
    with pytest.raises(ValueError, match="direction: got 'X', expected one of horizontal, vertical, both"):
        find(pack, "MissingPixels").execute(given)


class Anything:
    """What looks like a model from afar."""

    get_model_object = None


RESTORE = {"model": Anything(), "vae": Anything(), "positive": [1], "method": "PSLD", "quality": "fast", "seed": 0, "cfg": 2.0}


@pytest.mark.parametrize(
    ("node", "given", "message"),
    [
        ("Restore", {**RESTORE, "model": None}, "model: got nothing. Connect it"),
        ("Restore", {**RESTORE, "measurement": None}, "measurement: got nothing. Connect it"),
        ("Restore", {**RESTORE, "measurement": Anything()}, "measurement: got a Anything, expected MEASUREMENT; connect"),
        ("Restore", {**RESTORE, "model": 3.5}, "model: got a float, expected MODEL; connect Load Checkpoint"),
        ("Restore", {**RESTORE, "positive": "a cat"}, "positive: got a str, expected CONDITIONING; connect"),
        ("Finish", {"image": [1], "measurement": 1, "error": 0.05}, "image: got a list, expected IMAGE; connect"),
        (
            "MeasureSimulate",
            {"image": torch.zeros(1, 8, 8, 3), "operator": "blur"},
            "operator: got a str, expected LINEAR_OPERATOR",
        ),
        ("MemoryEstimate", {"latent": torch.zeros(1, 4, 8, 8)}, "latent: got a Tensor, expected LATENT; connect"),
        ("MemoryEstimate", {"latent": {}}, "latent: has no samples; connect"),
        ("Restore", {**RESTORE, "positive": None}, "positive: got nothing. Connect it"),
        ("Restore", {**RESTORE, "positive": []}, "positive: is empty, the node before it gave no prompt"),
        ("Restore", {**RESTORE, "negative": []}, "negative: is empty, the node before it gave no prompt"),
        ("Restore", {**RESTORE, "samples": None}, "samples: got nothing. Set it"),
        ("Restore", {**RESTORE, "method": "X"}, "method: got 'X', expected one of C-PiGDM, PSLD"),
        ("Finish", {"image": None, "measurement": 1, "error": 0.05}, "image: got nothing. Connect it"),
        (
            "MissingPixels",
            {"pattern": {"pattern": "mask", "mask": None, "threshold": 0.5}},
            "mask: got nothing. Connect it",
        ),
    ],
)
def test_nothing_where_something_is_needed(node: str, given: dict[str, Any], message: str, pack: ModuleType) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        find(pack, node).execute(**given)


def test_what_may_be_left_out_may_be_nothing(pack: ModuleType) -> None:
    assert find(pack, "Downscale").execute({"method": "area", "factor": 2}, operator=None).args


def test_the_choice_alone_decides_which_range_counts(pack: ModuleType) -> None:
    """A disk's radius may be what a Gaussian's sigma may not, and the edges of a range are in it."""
    blur = find(pack, "BlurOperator")
    assert blur.execute(kernel={"kernel": "disk", "radius": 150.0, "sigma": -1.0}, boundary="zero").args
    assert blur.execute(kernel={"kernel": "disk", "radius": 0.3}, boundary="zero").args


@pytest.mark.parametrize(
    "box", [(16384, 0, 16384, 1), (0, 16384, 1, 1), (0, 0, 512, 512), (0, 0, 16384, 16384), (0, 0, 256, 1)]
)
def test_any_box_is_shown_small(box: tuple[int, int, int, int], pack: ModuleType) -> None:
    """Its picture is never made: four gigabytes for a preview."""
    given = {"pattern": "box", **dict(zip(("x", "y", "width", "height"), box, strict=True))}
    _, _, preview = find(pack, "MissingPixels")._pattern(given)
    assert max(preview.shape) <= 1024
    assert bool((preview == 0).any())
    assert bool((preview == 1).any())
