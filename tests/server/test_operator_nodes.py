"""Every operator and calibration node, through the server: what it shows is what the operator of the same numbers gives."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from support.server_prompts import Prompt, picture
from torch import Tensor

from dev.server import PromptFailed, Server
from operators import (
    AreaDownscale,
    BicubicDownscale,
    Blur,
    Grayscale,
    Identity,
    LanczosDownscale,
    LinearOperator,
    Mask,
    box_mask,
    disk_kernel,
    gaussian_kernel,
    image_kernel,
    motion_kernel,
    random_mask,
    stripe_mask,
)
from prior.draw import VALIDATION_SEED, draw

FULL = (3, 128, 128)
NODE = {"mask": "PosteriorMask", "down": "PosteriorDownscale", "blur": "PosteriorBlur", "grey": "PosteriorGrayscale"}


def truth() -> Tensor:
    return torch.from_numpy(draw(VALIDATION_SEED)).permute(2, 0, 1)[None].double() / 127.5 - 1


def as_picture(y: Tensor) -> np.ndarray:
    """As ComfyUI saves it: (H, W, 3) uint8."""
    image = ((y[0] + 1) / 2).expand(3, -1, -1).movedim(0, -1).float().numpy()
    return np.clip(255.0 * image, 0, 255).astype(np.uint8)


def prompt_with(*operators: tuple[str, dict[str, Any]], sigma: float = 0.0) -> Prompt:
    """Demo Pictures through the operator nodes, the first one first, into Measure (simulate)."""
    prompt: Prompt = {
        "1": {"class_type": "PosteriorDemoPictures", "inputs": {"first": 0, "count": 1}, "_meta": {"title": "Truth"}},
    }
    previous = None
    for i, (kind, values) in enumerate(operators):
        inputs = {**values, **({} if previous is None else {"operator": [previous, 0]})}
        previous = f"op{i}"
        prompt[previous] = {"class_type": kind, "inputs": inputs, "_meta": {"title": f"Operator {i}"}}
    measure = {"image": ["1", 0], "operator": [previous, 0], "noise": "Gaussian", "noise.sigma": sigma, "seed": 5}
    prompt["2"] = {"class_type": "PosteriorMeasureSimulate", "inputs": measure, "_meta": {"title": "Measure"}}
    prompt["3"] = {"class_type": "PreviewImage", "inputs": {"images": ["2", 1]}, "_meta": {"title": "Degraded"}}
    return prompt


def shown(server: Server, prompt: Prompt, title: str = "Degraded") -> np.ndarray:
    return picture(server, server.run(prompt), prompt, title)


def dynamic(name: str, chosen: str, **values: Any) -> dict[str, Any]:
    return {name: chosen, **{f"{name}.{key}": value for key, value in values.items()}}


STRIPES = {"period": 9, "width": 2, "offset": 3, "direction": "both", "fraction": 0.1, "seed": 4}
CASES: dict[str, tuple[str, dict[str, Any], LinearOperator]] = {
    "box": (
        NODE["mask"],
        dynamic("pattern", "box", x=10, y=20, width=30, height=40),
        Mask(box_mask(FULL, (40, 30), (20, 10))),
    ),
    "random": (
        NODE["mask"],
        dynamic("pattern", "random", fraction=0.7, per_channel=True, seed=3),
        Mask(random_mask(FULL, 0.7, 3, per_channel=True)),
    ),
    "stripes": (NODE["mask"], dynamic("pattern", "stripes", **STRIPES), Mask(stripe_mask(FULL, **STRIPES))),
    "area": (NODE["down"], dynamic("method", "area", factor=5), AreaDownscale(FULL, 5)),
    "bicubic": (NODE["down"], dynamic("method", "bicubic", factor=2.5), BicubicDownscale(FULL, 2.5)),
    "lanczos": (NODE["down"], dynamic("method", "lanczos", factor=4.0), LanczosDownscale(FULL, 4.0)),
    "gaussian": (
        NODE["blur"],
        {**dynamic("kernel", "gaussian", sigma=3.0, sigma_across=0.0, angle=0.0), "boundary": "reflect"},
        Blur(gaussian_kernel(3.0), FULL, "reflect"),
    ),
    "anisotropic": (
        NODE["blur"],
        {**dynamic("kernel", "gaussian", sigma=3.0, sigma_across=1.0, angle=30.0), "boundary": "circular"},
        Blur(gaussian_kernel((3.0, 1.0), angle=30.0), FULL, "circular"),
    ),
    "motion": (
        NODE["blur"],
        {**dynamic("kernel", "motion", length=11.0, angle=40.0, intensity=0.5, seed=2), "boundary": "replicate"},
        Blur(motion_kernel(11.0, 40.0, intensity=0.5, seed=2), FULL, "replicate"),
    ),
    "disk": (
        NODE["blur"],
        {**dynamic("kernel", "disk", radius=3.5), "boundary": "zero"},
        Blur(disk_kernel(3.5), FULL, "zero"),
    ),
    "grey": (NODE["grey"], {"weights": "Rec.601"}, Grayscale(FULL, "601")),
    "grey custom": (
        NODE["grey"],
        dynamic("weights", "custom", red=0.2, green=0.2, blue=0.4),
        Grayscale(FULL, (0.25, 0.25, 0.5)),
    ),
    "noise only": ("PosteriorIdentity", {}, Identity(FULL)),
}


@pytest.mark.parametrize("name", CASES)
def test_degrades_as_the_operator_says(server: Server, name: str) -> None:
    node, inputs, operator = CASES[name]
    got = shown(server, prompt_with((node, inputs)))
    expected = as_picture(operator.A(truth()))
    assert got.shape == expected.shape
    assert int(np.abs(got.astype(int) - expected).max()) <= 1


def test_operators_follow_one_another(server: Server) -> None:
    """Black and white, then blurred, then smaller, then with holes: the order of the links is the order of events."""
    grey, blur, down, mask = (CASES[name] for name in ("grey", "gaussian", "area", "random"))
    small = (1, 26, 26)
    chain = Mask(random_mask(small, 0.7, 3), channels=1) @ AreaDownscale((1, 128, 128), 5)
    chain = chain @ Blur(gaussian_kernel(3.0), (1, 128, 128), "reflect") @ grey[2]
    holes = dynamic("pattern", "random", fraction=0.7, per_channel=False, seed=3)
    got = shown(server, prompt_with(grey[:2], blur[:2], down[:2], (mask[0], holes)))
    assert int(np.abs(got.astype(int) - as_picture(chain.A(truth()))).max()) <= 1


def test_nodes_show_kernel_and_mask(server: Server) -> None:
    kernel = shown(server, prompt_with(CASES["disk"][:2]), "Operator 0")
    assert kernel.shape[0] >= 100
    assert kernel.max() == 255
    assert kernel[0, 0, 0] == 0
    mask = shown(server, prompt_with(CASES["stripes"][:2]), "Operator 0")
    assert set(np.unique(mask)) == {0, 255}


def test_picture_as_a_kernel(server: Server) -> None:
    prompt = prompt_with((NODE["blur"], {"kernel": "image", "kernel.image": ["k", 0], "boundary": "circular"}))
    prompt["m"] = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 5, "height": 3}, "_meta": {"title": "m"}}
    prompt["k"] = {"class_type": "MaskToImage", "inputs": {"mask": ["m", 0]}, "_meta": {"title": "k"}}
    expected = Blur(image_kernel(torch.ones(3, 5)), FULL, "circular").A(truth())
    assert int(np.abs(shown(server, prompt).astype(int) - as_picture(expected)).max()) <= 1


def test_noise_is_estimated(server: Server) -> None:
    prompt = prompt_with(CASES["noise only"][:2], sigma=0.08)
    prompt["e"] = {"class_type": "PosteriorEstimateNoise", "inputs": {"photo": ["2", 1]}, "_meta": {"title": "Estimate"}}
    prompt["t"] = {"class_type": "PreviewAny", "inputs": {"source": ["e", 0]}, "_meta": {"title": "Value"}}
    found = float(server.run(prompt)["t"]["text"][0])
    assert abs(found - 0.08) < 0.008


def test_an_estimate_runs_by_itself(server: Server) -> None:
    """Nothing is connected to what it gives."""
    prompt = prompt_with(CASES["noise only"][:2], sigma=0.02)
    del prompt["3"]
    prompt["e"] = {"class_type": "PosteriorEstimateNoise", "inputs": {"photo": ["2", 1]}, "_meta": {"title": "Estimate"}}
    assert re.search(r"noise 0\.0\d+ \(0\.0\d+ to 0\.0\d+\)", server.run(prompt)["e"]["text"][0])


def test_an_estimate_that_cannot_tell_says_so_by_itself(server: Server) -> None:
    prompt = prompt_with(CASES["noise only"][:2])
    prompt["e"] = {"class_type": "PosteriorEstimateStripes", "inputs": {"photo": ["1", 0]}, "_meta": {"title": "Find"}}
    with pytest.raises(PromptFailed, match=r"PosteriorEstimateStripes.*photo: no clearly lost lines found"):
        server.run(prompt)


def test_stripes_are_found(server: Server) -> None:
    stripes = {"period": 13, "width": 2, "offset": 4, "direction": "horizontal", "fraction": 0.0, "seed": 0}
    prompt = prompt_with((NODE["mask"], dynamic("pattern", "stripes", **stripes)))
    prompt["e"] = {"class_type": "PosteriorEstimateStripes", "inputs": {"photo": ["2", 1]}, "_meta": {"title": "Find"}}
    prompt["m"] = {"class_type": "MaskToImage", "inputs": {"mask": ["e", 0]}, "_meta": {"title": "m"}}
    prompt["p"] = {"class_type": "PreviewImage", "inputs": {"images": ["m", 0]}, "_meta": {"title": "Lost"}}
    lost = shown(server, prompt, "Lost")[..., 0] > 127
    assert np.array_equal(lost, stripe_mask(FULL, **stripes)[0, 0].numpy() == 0)


def test_blur_is_estimated_from_an_edge(server: Server) -> None:
    """An edge between two even areas, blurred by 2 pixels; the operator that comes out is a blur of that width."""
    prompt = prompt_with(
        (NODE["blur"], {**dynamic("kernel", "gaussian", sigma=2.0, sigma_across=0.0, angle=0.0), "boundary": "reflect"})
    )
    for key, value in {"dark": 0.2, "bright": 0.5}.items():
        solid = {"value": value, "width": 128 if key == "dark" else 64, "height": 128}
        prompt[key] = {"class_type": "SolidMask", "inputs": solid, "_meta": {"title": key}}
    edge = {"destination": ["dark", 0], "source": ["bright", 0], "x": 64, "y": 0, "operation": "add"}
    prompt["edge"] = {"class_type": "MaskComposite", "inputs": edge, "_meta": {"title": "edge"}}
    prompt["1"] = {"class_type": "MaskToImage", "inputs": {"mask": ["edge", 0]}, "_meta": {"title": "Truth"}}
    prompt["2"]["inputs"]["noise.sigma"] = 0.005
    prompt["e"] = {
        "class_type": "PosteriorEstimateBlur",
        "inputs": {"photo": ["2", 1], "method": "edge"},
        "_meta": {"title": "Estimate"},
    }
    prompt["t"] = {"class_type": "PreviewAny", "inputs": {"source": ["e", 1]}, "_meta": {"title": "Value"}}
    found = float(server.run(prompt)["t"]["text"][0])
    assert abs(found - 2.0) < 0.1


def test_blur_is_estimated_from_a_point(server: Server) -> None:
    """A point of light, shaken; the operator that comes out shakes another picture in the same way."""
    motion = dynamic("kernel", "motion", length=11.0, angle=30.0, intensity=0.0, seed=0)
    prompt = prompt_with((NODE["blur"], {**motion, "boundary": "reflect"}))
    for key, value, size in (("dark", 0.05, 45), ("bright", 1.0, 3)):
        solid = {"value": value, "width": size, "height": size}
        prompt[key] = {"class_type": "SolidMask", "inputs": solid, "_meta": {"title": key}}
    point = {"destination": ["dark", 0], "source": ["bright", 0], "x": 21, "y": 21, "operation": "add"}
    prompt["point"] = {"class_type": "MaskComposite", "inputs": point, "_meta": {"title": "point"}}
    prompt["1"] = {"class_type": "MaskToImage", "inputs": {"mask": ["point", 0]}, "_meta": {"title": "Truth"}}
    inputs = {"photo": ["2", 1], "method": "point"}
    prompt["e"] = {"class_type": "PosteriorEstimateBlur", "inputs": inputs, "_meta": {"title": "Estimate"}}
    prompt["o"] = {"class_type": "PosteriorDemoPictures", "inputs": {"first": 0, "count": 1}, "_meta": {"title": "Other"}}
    again = {"image": ["o", 0], "operator": ["e", 0], "noise": "Gaussian", "noise.sigma": 0.0, "seed": 0}
    prompt["n"] = {"class_type": "PosteriorMeasureSimulate", "inputs": again, "_meta": {"title": "Again"}}
    prompt["p"] = {"class_type": "PreviewImage", "inputs": {"images": ["n", 1]}, "_meta": {"title": "Blurred"}}
    box = torch.ones(3, 3, dtype=torch.float64) / 9  # the point is three pixels wide, which adds to the blur
    true = Blur(motion_kernel(11.0, 30.0), FULL, "reflect").A(Blur(box, FULL, "reflect").A(truth()))
    error = np.abs(shown(server, prompt, "Blurred").astype(int) - as_picture(true))
    assert error.mean() < 1.5
    assert np.percentile(error, 99) < 10


def test_lost_pixels_are_a_mask(server: Server) -> None:
    prompt = prompt_with(CASES["box"][:2])
    prompt["m"] = {"class_type": "MaskToImage", "inputs": {"mask": ["2", 2]}, "_meta": {"title": "m"}}
    prompt["p"] = {"class_type": "PreviewImage", "inputs": {"images": ["m", 0]}, "_meta": {"title": "Lost"}}
    lost = shown(server, prompt, "Lost")[..., 0] > 127
    assert np.array_equal(lost, CASES["box"][2].keep[0, 0].numpy() == 0)
