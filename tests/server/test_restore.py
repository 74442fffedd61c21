"""Restore, Uncertainty and the C-PiGDM Sampler through the real server."""

import re
from typing import Any

import numpy as np
import pytest
from support.server_prompts import Prompt, add, cpigdm, inputs, keep, picture, pictures, psnr, restore, shipped, titled

from dev.server import PromptFailed, Server


def restoring(**values: Any) -> Prompt:
    """The box inpainting template with Restore in the place of its sampling nodes."""
    prompt = shipped("inpaint_box")
    restore(prompt, **values)
    return keep(prompt, "Result", "Truth", "Hole")


@pytest.mark.parametrize("method", ["C-PiGDM", "PSLD"])
def test_restore_fills_the_hole_and_says_how_well_it_agrees(server: Server, method: str) -> None:
    prompt = restoring(method=method)
    steps = []
    outputs = server.run(prompt, lambda message: steps.append(message) if message["type"] == "progress" else None)
    truth, result, hole = (picture(server, outputs, prompt, title) for title in ("Truth", "Result", "Hole"))
    kept = hole[..., 0] < 128
    assert np.array_equal(result[kept], truth[kept])
    grey = np.where(kept[..., None], truth, truth[kept].mean(0).round().astype(np.uint8))
    assert psnr(result, truth) > psnr(grey, truth) + 2
    assert re.fullmatch(r"\|A x - y\| \S+ -> 0\.0e\+00", outputs[titled(prompt, "Restore")]["text"][0])
    assert steps[-1]["data"]["value"] == steps[-1]["data"]["max"] == {"C-PiGDM": 5, "PSLD": 20}[method]


def test_uncertainty_is_nought_outside_the_hole(server: Server) -> None:
    prompt = restoring(samples=3)
    several = add(prompt, "Uncertainty", "PosteriorUncertainty", samples=[titled(prompt, "Restore"), 0])
    add(prompt, "Map", "PreviewImage", images=[several, 1])
    prompt = keep(prompt, "Map", "Hole")
    outputs = server.run(prompt)
    heat, hole = (picture(server, outputs, prompt, title) for title in ("Map", "Hole"))
    kept = hole[..., 0] < 128
    assert heat[kept].max() == 0
    assert heat[~kept].mean() > 5


def test_progress_counts_all_pictures(server: Server) -> None:
    prompt = restoring(samples=2)
    steps = []

    def note(message: dict) -> None:
        if message["type"] == "progress":
            steps.append((message["data"]["value"], message["data"]["max"]))

    server.run(prompt, note, extra_data={"preview_method": "latent2rgb"})  # else ComfyUI leaves out steps of less than .1 s
    assert steps == [(i, 10) for i in range(1, 11)]


def test_a_prompt_strength_without_a_negative_prompt_is_refused(server: Server) -> None:
    with pytest.raises(PromptFailed, match=r"PosteriorRestore.*negative: not connected, but cfg is 4"):
        server.run(restoring(cfg=4.0))


@pytest.mark.parametrize("weight", ["dual", "bayes", "paper"])
def test_cpigdm_sampler_in_a_graph_of_stock_nodes(server: Server, weight: str) -> None:
    """On four portraits, the mean of what they gain over the enlarged photo."""
    prompt = shipped("super_resolution_x8", 10)
    inputs(prompt, "Demo Pictures")["count"] = 4
    plain = {"tau": 1.0, "jacobian": "off"}
    values = {"dual": {"tau": 1.0, "eta": 2.0}, "bayes": plain, "paper": {"w": 15.0, "jacobian": "off"}}[weight]
    cpigdm(prompt, weight, "encoder" if weight == "bayes" else "decoder", **values)
    outputs = server.run(keep(prompt, "Result", "Truth"))
    gains = []
    for result, truth in zip(*(pictures(server, outputs, prompt, title) for title in ("Result", "Truth")), strict=True):
        blocks = truth.reshape(16, 8, 16, 8, 3).mean((1, 3)).repeat(8, 0).repeat(8, 1)
        gains.append(psnr(result, truth) - psnr(blocks, truth))
    assert np.mean(gains) > {"dual": 2, "bayes": 1.5, "paper": 2}[weight]  # measured: 2.5, 1.8, 2.4
