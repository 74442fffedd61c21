"""Prompts for the server tests: the shipped API workflows on one picture, changed by the titles of their nodes."""

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dev.server import Server

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
WORKFLOWS = ["inpaint_box", "super_resolution_x8"]  # C-PiGDM in a graph of stock nodes; `make demo` runs them
SHORT = 10  # steps; enough for what does not depend on quality

Prompt = dict[str, dict[str, Any]]
_runs = itertools.count()


def shipped(workflow: str, steps: int | None = None) -> Prompt:
    """A shipped workflow on one picture, as shipped or with fewer steps."""
    prompt = json.loads((ROOT / "workflows" / "api" / f"{workflow}.json").read_text())
    inputs(prompt, "Demo Pictures")["count"] = 1
    if steps is not None:
        inputs(prompt, "Scheduler")["steps"] = steps
    return prompt


def titled(prompt: Prompt, title: str) -> str:
    (key,) = (key for key, node in prompt.items() if node["_meta"]["title"] == title)
    return key


def inputs(prompt: Prompt, title: str) -> dict[str, Any]:
    return prompt[titled(prompt, title)]["inputs"]


def add(prompt: Prompt, title: str, class_type: str, **values: Any) -> str:
    """Add a node and return its id."""
    key = str(1 + max(map(int, prompt)))
    prompt[key] = {"class_type": class_type, "inputs": values, "_meta": {"title": title}}
    return key


def with_psld(workflow: str, steps: int | None = None) -> Prompt:
    """A shipped graph of stock nodes, with the sampler of the template that has PSLD."""
    prompt, donor = shipped(workflow, steps), shipped("super_resolution_x4")
    node = prompt[titled(prompt, "C-PiGDM Sampler")]
    links = {name: node["inputs"][name] for name in ("measurement", "vae")}
    node.update(donor[titled(donor, "PSLD Sampler")])
    node["inputs"].update(links)
    return prompt


def paper_rule(prompt: Prompt, **values: Any) -> None:
    """The step lengths of the paper, which have more knobs to get wrong."""
    sampler = inputs(prompt, "PSLD Sampler")
    for name in [key for key in sampler if key.startswith("rule")]:
        del sampler[name]
    rule = {"omega": 1.0, "gamma": 0.1, "eta": 0.0, "glue": "pinv", **values}
    sampler.update({"rule": "paper", **{f"rule.{name}": value for name, value in rule.items()}})


def relink(prompt: Prompt, old: str, new: str, slots: tuple[int, ...] = (0, 1, 2)) -> None:
    """Take these outputs of the node `old` from the node `new`."""
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] == old and value[1] in slots:
                node["inputs"][name] = [new, value[1]]


def keep(prompt: Prompt, *titles: str) -> Prompt:
    """Only these nodes and what they are computed from, so that nothing else can run."""
    wanted: set[str] = set()
    todo = [titled(prompt, title) for title in titles]
    while todo:
        key = todo.pop()
        wanted.add(key)
        todo += [value[0] for value in prompt[key]["inputs"].values() if isinstance(value, list)]
    return {key: node for key, node in prompt.items() if key in wanted}


def stock(prompt: Prompt, sampler: str = "euler") -> Prompt:
    """The same model, guider, noise and schedule under a sampler of ComfyUI's, decoded and saved; nothing of the pack samples."""
    prompt = json.loads(json.dumps(prompt))
    inputs(prompt, "Sample")["sampler"] = [add(prompt, "stock sampler", "KSamplerSelect", sampler_name=sampler), 0]
    empty = add(prompt, "empty", "EmptyLatentImage", width=128, height=128, batch_size=1)
    inputs(prompt, "Sample")["latent_image"] = [empty, 0]
    inputs(prompt, "Result")["images"] = [titled(prompt, "Decode"), 0]
    return keep(prompt, "Result")


def cpigdm(prompt: Prompt, weight: str = "dual", consistency: str = "decoder", **values: Any) -> None:
    """Let a shipped workflow sample with the C-PiGDM Sampler; `values` are those of the weight."""
    sampler = add(
        prompt,
        "C-PiGDM",
        "PosteriorSamplerCPiGDM",
        measurement=[titled(prompt, "Measure (simulate)"), 0],
        vae=[titled(prompt, "Load Demo Prior"), 2],
        consistency=consistency,
        inner_steps=3,
        last_steps=10,
        weight=weight,
        **{f"weight.{name}": value for name, value in {"eta": 0.0, **values}.items()},
    )
    inputs(prompt, "Sample")["sampler"] = [sampler, 0]


def restore(prompt: Prompt, **values: Any) -> None:
    """Let a shipped workflow sample with Restore."""
    loader = titled(prompt, "Load Demo Prior")
    node = add(
        prompt,
        "Restore",
        "PosteriorRestore",
        model=[loader, 0],
        vae=[loader, 2],
        positive=[titled(prompt, "Positive Prompt"), 0],
        measurement=[titled(prompt, "Measure (simulate)"), 0],
        **{"method": "C-PiGDM", "quality": "fast", "seed": 3, "cfg": 1.0, **values},
    )
    inputs(prompt, "Result")["images"] = [node, 0]


def run(server: Server, prompt: Prompt, title: str = "Result", cached: tuple[str, ...] = (), **options: Any) -> np.ndarray:
    """Run a prompt, sampling again even when it ran before, and return the picture of one of its nodes, (H, W, 3) uint8.

    Args:
        cached: titles of nodes that must not run again.
    """
    # ComfyUI ignores an input the node does not know, but its cache does not.
    inputs(prompt, "Noise")["run"] = next(_runs)
    reused: list[str] = []

    def record(message: dict[str, Any]) -> None:
        if message["type"] == "execution_cached":
            reused.extend(message["data"]["nodes"])

    outputs = server.run(prompt, options.pop("on_message", record), **options)
    assert titled(prompt, "Sample") not in reused
    assert {titled(prompt, name) for name in cached} <= set(reused)
    return picture(server, outputs, prompt, title)


def picture(server: Server, outputs: dict[str, Any], prompt: Prompt, title: str) -> np.ndarray:
    """The first picture a node saved or showed, (H, W, 3) uint8."""
    return pictures(server, outputs, prompt, title)[0]


def pictures(server: Server, outputs: dict[str, Any], prompt: Prompt, title: str) -> list[np.ndarray]:
    """All of them."""
    saved = outputs[titled(prompt, title)]["images"]
    return [np.asarray(Image.open(io.BytesIO(server.picture(one))).convert("RGB")) for one in saved]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
