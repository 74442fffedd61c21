"""Memory through the real server: the estimate node, the modes, and what the sampler's node says while it runs."""

import contextlib
import re
from typing import Any

import numpy as np
import pytest
import websocket
from support.server_prompts import SHORT, add, inputs, keep, run, shipped, titled, with_psld

from dev.server import PromptFailed, Server


def estimate(server: Server, **values: Any) -> tuple[str, dict[str, float]]:
    """The text of a Memory Estimate of the demo prior, and the GB it names for each mode."""
    prompt = shipped("inpaint_box")
    loader = titled(prompt, "Load Demo Prior")
    given = {"model": [loader, 0], "vae": [loader, 2], "batch": 0, "guidance": True}
    given |= {"measurement": [titled(prompt, "Measure (simulate)"), 0], **values}
    add(prompt, "Estimate", "PosteriorMemoryEstimate", **{k: v for k, v in given.items() if v is not None})
    prompt = keep(prompt, "Estimate")
    text = server.run(prompt)[titled(prompt, "Estimate")]["text"][0]
    return text, {mode: float(value) for mode, value in re.findall(r"^(\w+): ([\d.]+) GB$", text, re.MULTILINE)}


def test_estimate_node(server: Server) -> None:
    text, one = estimate(server)
    assert text.startswith("PSLD, 128 x 128, batch 1, two passes of the network")
    assert one["fastest"] >= one["balanced"] >= one["lowest"] > 0
    assert text.endswith("auto takes fastest")
    text, many = estimate(server, batch=64)
    assert "batch 64" in text
    assert many["fastest"] > 2 * many["lowest"] > 10 * one["lowest"]
    assert estimate(server, batch=64, guidance=False)[1]["fastest"] < many["fastest"]
    text, other = estimate(server, batch=64, method="C-PiGDM")
    assert text.startswith("C-PiGDM, 128 x 128")
    assert other["fastest"] < many["fastest"]  # no gradient through the network, nor through the encoder


def test_estimate_is_made_anew_each_time(server: Server) -> None:
    """What is free changes where no input does."""
    prompt = shipped("inpaint_box")
    loader = titled(prompt, "Load Demo Prior")
    measured = [titled(prompt, "Measure (simulate)"), 0]
    given = {"model": [loader, 0], "vae": [loader, 2], "measurement": measured, "batch": 1, "guidance": False}
    add(prompt, "Estimate", "PosteriorMemoryEstimate", **given)
    prompt = keep(prompt, "Estimate")
    cached: list[str] = []
    for _ in range(2):
        cached.clear()
        server.run(prompt, lambda m: cached.extend(m["data"]["nodes"]) if m["type"] == "execution_cached" else None)
    assert loader in cached
    assert titled(prompt, "Estimate") not in cached


def test_estimate_needs_a_size(server: Server) -> None:
    with pytest.raises(PromptFailed, match=r"PosteriorMemoryEstimate.*measurement: is not connected, and neither is latent"):
        estimate(server, measurement=None)


def test_memory_modes_give_the_same_picture(server: Server) -> None:
    pictures = []
    for memory in ("fastest", "lowest"):
        prompt = with_psld("inpaint_box", SHORT)
        inputs(prompt, "PSLD Sampler").update(memory=memory, check_gradients=True)
        pictures.append(run(server, prompt).astype(int))
    assert int(np.abs(pictures[1] - pictures[0]).max()) <= 1


def test_unknown_mode_is_refused(server: Server) -> None:
    prompt = with_psld("inpaint_box", SHORT)
    inputs(prompt, "PSLD Sampler")["memory"] = "balanced"
    with pytest.raises(PromptFailed, match=r"PosteriorSamplerPSLD.*memory"):
        server.run(keep(prompt, "Result"))


def test_sampler_node_shows_its_progress(server: Server) -> None:
    prompt = with_psld("inpaint_box", SHORT)
    inputs(prompt, "Noise")["run"] = "read-out"
    texts = server_texts(server, prompt)
    node = titled(prompt, "PSLD Sampler")
    lines = [text for key, text in texts if key == node]
    assert [re.match(r"step (\d+) of 10, sigma \S+, \|A x - y\| 0\.\d+", line) is not None for line in lines[:-1]] == [
        True
    ] * SHORT
    assert lines[-1].startswith("|A x - y| by step\n1: ")


TEXT = (3).to_bytes(4, "big")  # how a websocket message for a node begins; the length of its id, the id and the text follow


def server_texts(server: Server, prompt: dict[str, Any]) -> list[tuple[str, str]]:
    """Run a prompt; the texts that nodes were sent, which go to every listener, as (node, text)."""
    with contextlib.closing(websocket.create_connection(f"ws://{server.address}/ws?clientId=listener", timeout=2)) as ws:
        server.run(prompt)
        texts = []
        with contextlib.suppress(websocket.WebSocketTimeoutException):
            while True:
                message = ws.recv()
                if isinstance(message, bytes) and message.startswith(TEXT):
                    end = 8 + int.from_bytes(message[4:8], "big")
                    texts.append((message[8:end].decode(), message[end:].decode()))
    return texts
