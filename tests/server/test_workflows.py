"""The shipped API workflows as shipped: better than doing without a prior, and consistent with the photo."""

import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.server_prompts import (
    ROOT,
    SHORT,
    TEMPLATES,
    WORKFLOWS,
    Prompt,
    inputs,
    keep,
    picture,
    pictures,
    psnr,
    run,
    shipped,
    titled,
    with_psld,
)

from dev.server import Server
from operators import Blur, gaussian_kernel
from prior.draw import VALIDATION_SEED, draw


@dataclass(frozen=True)
class Restored:
    """Everything one run of a shipped workflow gave; `hole` is None where no pixel is missing."""

    steps: int
    truth: np.ndarray
    measured: np.ndarray
    result: np.ndarray
    hole: np.ndarray | None
    read_out: str
    progress: list[dict[str, Any]]
    previews: list[bytes]


@pytest.fixture(scope="module", params=WORKFLOWS)
def restored(request: pytest.FixtureRequest, server: Server) -> Restored:
    prompt = shipped(request.param)
    messages, previews = [], []
    outputs = server.run(prompt, messages.append, on_preview=previews.append, extra_data={"preview_method": "latent2rgb"})
    titles = [node["_meta"]["title"] for node in prompt.values()]
    return Restored(
        steps=inputs(prompt, "Scheduler")["steps"],
        truth=picture(server, outputs, prompt, "Truth"),
        measured=picture(server, outputs, prompt, "Measurement"),
        result=picture(server, outputs, prompt, "Result"),
        hole=picture(server, outputs, prompt, "Hole")[..., 0] > 127 if "Hole" in titles else None,
        read_out=outputs[titled(prompt, "Finish")]["text"][0],
        progress=[message["data"] for message in messages if message["type"] == "progress"],
        previews=previews,
    )


def baseline(truth: np.ndarray, measured: np.ndarray, hole: np.ndarray | None) -> np.ndarray:
    """Bicubic enlargement, or the mean of the kept pixels in the hole."""
    if hole is None:
        return np.asarray(Image.fromarray(measured).resize(truth.shape[1::-1], Image.Resampling.BICUBIC))
    filled = measured.copy()
    filled[hole] = filled[~hole].mean(0).round()
    return filled


@pytest.mark.parametrize(("workflow", "gain"), [("super_resolution_x8", 2), ("inpaint_box", 3)])
def test_beats_the_baseline(server: Server, workflow: str, gain: float) -> None:
    """On its four pictures, by the mean: what is invented in one of them differs by 2 dB with the seed, and with the processor's rounding."""
    prompt = shipped(workflow)
    inputs(prompt, "Demo Pictures")["count"] = 4
    outputs = server.run(prompt)
    truths, photos, results = (pictures(server, outputs, prompt, title) for title in ("Truth", "Measurement", "Result"))
    hole = picture(server, outputs, prompt, "Hole")[..., 0] > 127 if gain == 3 else None
    gains = [
        psnr(result, truth) - psnr(baseline(truth, photo, hole), truth)
        for truth, photo, result in zip(truths, photos, results, strict=True)
    ]
    assert len(gains) == 4
    assert sum(gains) / 4 >= gain


def test_agrees_with_the_photo(restored: Restored) -> None:
    (residual,) = re.findall(r"-> (\S+)", restored.read_out)
    assert float(residual) <= 1e-4


def test_the_saved_picture_agrees_with_the_photo(restored: Restored) -> None:
    if restored.hole is None:
        height, width = restored.measured.shape[:2]
        blocks = restored.result.reshape(height, restored.truth.shape[0] // height, width, -1, 3)
        # Rounding: half a level in the photo, and on average next to nothing in a block of the result.
        assert np.abs(blocks.mean((1, 3)) - restored.measured).max() <= 1
    else:
        assert 0 < restored.hole.mean() < 0.5
        assert np.array_equal(restored.result[~restored.hole], restored.truth[~restored.hole])


def test_progress_reaches_the_total(restored: Restored) -> None:
    assert {step["max"] for step in restored.progress} == {restored.steps}
    assert [step["value"] for step in restored.progress] == list(range(1, restored.steps + 1))


def test_previews_arrive(restored: Restored) -> None:
    assert len(restored.previews) == restored.steps
    first, last = (np.asarray(Image.open(io.BytesIO(restored.previews[i])).convert("RGB")) for i in (0, -1))
    assert first.shape == last.shape
    assert not np.array_equal(first, last)


def test_psld_sends_progress_and_previews(server: Server) -> None:
    prompt, steps, previews = with_psld("inpaint_box", SHORT), [], []
    inputs(prompt, "Noise")["run"] = "progress"
    server.run(
        keep(prompt, "Result"),
        lambda message: steps.append(message["data"]["value"]) if message["type"] == "progress" else None,
        on_preview=previews.append,
        extra_data={"preview_method": "latent2rgb"},
    )
    assert steps == list(range(1, SHORT + 1))
    assert len(previews) == SHORT


@pytest.mark.parametrize("make", [shipped, with_psld])
@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_the_same_prompt_gives_the_same_picture(server: Server, workflow: str, make: Callable[[str, int], Prompt]) -> None:
    first, second = (run(server, make(workflow, SHORT)) for _ in range(2))
    assert np.array_equal(first, second)
    other = make(workflow, SHORT)
    inputs(other, "Noise")["noise_seed"] = 1
    assert not np.array_equal(run(server, other), first)


# dB over the degraded photo, enlarged or with mean fill. Colours are the model's guess, so these two gain little.
GAINS = {
    "colourise": 4.0,
    "deblur_gaussian": 3.0,
    "deblur_motion": 3.0,
    "denoise": 6.0,
    "destripe": 6.0,
    "inpaint_free_form": 6.0,
    "old_photo": 1.0,
    "super_resolution_x4": 3.0,
    "uncertainty": 3.0,
}


@dataclass(frozen=True)
class Run:
    """A shipped workflow with the demo prior, as it is: what it was made from, and what it gave."""

    name: str
    prompt: Prompt
    outputs: dict[str, Any]
    truth: np.ndarray
    result: np.ndarray
    without: np.ndarray  # a prior: the degraded photo, enlarged or with mean fill

    def text(self, title: str) -> str:
        return self.outputs[titled(self.prompt, title)]["text"][0]


@pytest.fixture(scope="module", params=sorted(GAINS))
def ran(request: pytest.FixtureRequest, server: Server) -> Run:
    prompt = json.loads((ROOT / "workflows" / "api" / f"{request.param}.json").read_text())
    outputs = server.run(prompt)
    truth = np.asarray(draw(VALIDATION_SEED + inputs(prompt, "Demo Pictures")["first"]))
    degraded = Image.fromarray(picture(server, outputs, prompt, "Measure (simulate)"))
    without = np.array(degraded.resize(truth.shape[1::-1], Image.Resampling.BICUBIC))
    if prompt[titled(prompt, "Operator")]["class_type"] == "PosteriorMask":
        lost = (np.abs(without.astype(int) - 127.5) < 1).all(-1)  # shown in mid-grey
        without[lost] = without[~lost].mean(0).round()
    return Run(request.param, prompt, outputs, truth, picture(server, outputs, prompt, "Result"), without)


def test_every_template_is_run_here() -> None:
    assert sorted([*GAINS, *WORKFLOWS, *OWN]) == TEMPLATES


def test_better_than_without_a_prior(ran: Run) -> None:
    assert psnr(ran.result, ran.truth) >= psnr(ran.without, ran.truth) + GAINS[ran.name]


def test_says_that_it_agrees(ran: Run) -> None:
    titles = {node["_meta"]["title"] for node in ran.prompt.values()}
    if "Consistency" in titles:
        assert ": agrees" in ran.text("Consistency")
    else:
        found = re.findall(r"-> (\S+)", ran.text("Finish" if "Finish" in titles else "Restore"))
        assert found
        assert max(map(float, found)) <= 1e-4


def test_few_network_calls(ran: Run) -> None:
    """What runs as installed must be quick on a CPU: 20 calls for a picture, at most four pictures."""
    if "Restore" in {node["_meta"]["title"] for node in ran.prompt.values()}:
        restore = inputs(ran.prompt, "Restore")
        calls = {"fast": 5, "balanced": 10, "best": 20}[restore["quality"]]
        assert restore["samples"] <= 4
    else:
        calls = inputs(ran.prompt, "Scheduler")["steps"]
    assert calls <= 20


def test_the_map_shows_what_is_invented(server: Server) -> None:
    prompt = json.loads((ROOT / "workflows" / "api" / "uncertainty.json").read_text())
    outputs = server.run(prompt)
    box = {name: inputs(prompt, "Operator")[f"pattern.{name}"] for name in ("x", "y", "width", "height")}
    hole = np.zeros((128, 128), bool)
    hole[box["y"] : box["y"] + box["height"], box["x"] : box["x"] + box["width"]] = True
    shown = picture(server, outputs, prompt, "Map")
    assert shown[~hole].max() == 0
    assert shown[hole].mean() > 5


# Photos small enough for a test; the checkpoint's place is taken by the demo prior, as its loader has the same outputs.
OWN = {"sd15_super_resolution": 16, "sd3_deblur": 64, "sdxl_inpaint": 64}


def blurred(picture: Image.Image, sigma: float) -> Image.Image:
    blur = Blur(gaussian_kernel(sigma), (3, *picture.size[::-1]), "reflect")
    y = blur.A(torch.from_numpy(np.array(picture)).movedim(-1, 0)[None].double())
    return Image.fromarray(y[0].movedim(0, -1).round().clamp(0, 255).byte().numpy())


@pytest.mark.parametrize("name", sorted(OWN))
def test_templates_for_a_user_s_photo(server: Server, base: Path, name: str) -> None:
    prompt = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text())
    side = OWN[name]
    drawn = Image.fromarray(np.asarray(draw(VALIDATION_SEED + 3))).resize((side, side), Image.Resampling.BICUBIC)
    if name == "sd3_deblur":
        drawn = blurred(drawn, inputs(prompt, "Operator")["kernel.sigma"])
    alpha = np.full((side, side), 255, np.uint8)
    alpha[side // 3 : side // 2, side // 3 : side // 2] = 0  # as the mask editor marks what was painted over
    Image.fromarray(np.dstack([np.asarray(drawn), alpha])).save(base / "input" / f"{name}.png")
    inputs(prompt, "Load Image")["image"] = f"{name}.png"
    loader = prompt[titled(prompt, "Load Checkpoint")]
    assert loader["inputs"]["ckpt_name"].endswith(".safetensors")
    loader.update(class_type="PosteriorLoadDemoPrior", inputs={})
    inputs(prompt, "Restore")["quality"] = "fast"
    outputs = server.run(prompt)
    result = picture(server, outputs, prompt, "Result")
    assert result.shape == ((4 * side, 4 * side, 3) if name == "sd15_super_resolution" else (side, side, 3))
    assert ": agrees" in outputs[titled(prompt, "Consistency")]["text"][0]
    if name == "sdxl_inpaint":
        assert np.array_equal(result[alpha > 0], np.asarray(drawn)[alpha > 0])
        assert not np.array_equal(result[alpha == 0], np.asarray(drawn)[alpha == 0])
