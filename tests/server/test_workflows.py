"""The shipped API workflows as shipped, on one picture: better than doing without a prior, and consistent with the photo."""

import io
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.server_prompts import SHORT, WORKFLOWS, inputs, picture, psnr, run, shipped, titled

from dev.server import Server


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


def baseline(restored: Restored) -> np.ndarray:
    """Bicubic enlargement, or the mean of the kept pixels in the hole."""
    if restored.hole is None:
        height, width = restored.truth.shape[:2]
        return np.asarray(Image.fromarray(restored.measured).resize((width, height), Image.Resampling.BICUBIC))
    filled = restored.measured.copy()
    filled[restored.hole] = filled[~restored.hole].mean(0).round()
    return filled


def test_beats_the_baseline(restored: Restored) -> None:
    gain = 1 if restored.hole is None else 3
    assert psnr(restored.result, restored.truth) >= psnr(baseline(restored), restored.truth) + gain


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


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_the_same_prompt_gives_the_same_picture(server: Server, workflow: str) -> None:
    first, second = (run(server, shipped(workflow, SHORT)) for _ in range(2))
    assert np.array_equal(first, second)
    other = shipped(workflow, SHORT)
    inputs(other, "Noise")["noise_seed"] = 1
    assert not np.array_equal(run(server, other), first)
