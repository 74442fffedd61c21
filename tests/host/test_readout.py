"""What the sampler's node says: progress, the curve of |A x - y|, and what happened to memory."""

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from support.host_runs import Host
from torch import Tensor


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, host: ModuleType) -> list[tuple[str, str]]:
    """The texts sent to nodes, as (node, text), by ComfyUI's own server object."""
    from server import PromptServer

    texts: list[tuple[str, str]] = []

    class Server:
        def send_progress_text(self, text: str, node_id: str) -> None:
            texts.append((node_id, text))

    monkeypatch.setattr(PromptServer, "instance", Server(), raising=False)
    return texts


def sampler(h: Host, measurement: Any, **options: Any) -> Any:
    return h.pack.nodes.host.stock_sampler(h.pack.samplers.sample_psld, measurement, h.vae, unique_id="7", **options)


def test_progress_and_curve(hosts: Callable[..., Host], said: list[tuple[str, str]]) -> None:
    """The residual is a root mean square over the values that were measured, on the 0 to 1 scale, of the worst image."""
    h = hosts("sd15")
    ops = h.pack.operators
    operator = ops.Mask(ops.box_mask((3, 64, 64), (32, 64), (0, 0)))  # half of the values are lost
    y = operator.A(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    steps: list[Tensor] = []
    h.sample(
        sampler(h, ops.Measurement(y, operator, sigma=0.1)),
        steps=12,
        latent=h.latent(2),
        callback=lambda i, denoised, x, total: steps.append(denoised),
    )
    assert {node for node, _ in said} == {"7"}
    lines = [text for _, text in said]
    assert len(lines) == 13

    found = [re.fullmatch(r"step (\d+) of 12, sigma (\S+), \|A x - y\| (\S+) \(noise 0.05\)", line) for line in lines[:12]]
    assert [int(match[1]) for match in found] == list(range(1, 13))
    for match, denoised in zip(found, steps, strict=True):
        with torch.inference_mode(False), torch.no_grad():
            image = h.vae.first_stage_model.decode(h.model.model.latent_format.process_out(denoised.clone()))
            error = (operator.A(image) - y) / 2
            kept = operator.A(torch.ones_like(image)) > 0
            worst = max(float(e[k].square().mean().sqrt()) for e, k in zip(error, kept, strict=True))
        assert abs(float(match[3]) - worst) < 1e-3

    head, points, lowest = lines[12].split("\n")
    assert head == "|A x - y| by step (noise 0.05)"
    shown = [(int(step), value) for step, value in re.findall(r"(\d+): (\S+)", points)]
    assert len(shown) == 10
    assert [step for step, _ in shown][::9] == [1, 12]
    values = [match[3] for match in found]
    assert all(value == values[step - 1] for step, value in shown)
    smallest = min(values, key=float)
    assert lowest == f"lowest {smallest} at step {values.index(smallest) + 1}"


def test_memory_and_the_guard_stay_in_the_readout(hosts: Callable[..., Host], said: list[tuple[str, str]]) -> None:
    h = hosts("sd15")
    layer, calls = h.vae.first_stage_model.taesd_decoder[-1], []

    def scarce(*_: object) -> None:
        calls.append(1)
        if len(calls) == 7:  # after the guard's five and the first step's
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    handle = layer.register_forward_pre_hook(scarce)
    try:
        h.sample(sampler(h, h.measurement(), memory="fastest", check_gradients=True), sigmas=torch.tensor([2.0, 1.0, 0.5]))
    finally:
        handle.remove()
    note = "out of memory in mode fastest; started again in mode balanced"
    first = next(i for i, (_, text) in enumerate(said) if note in text)
    assert all(note in text for _, text in said[first:])  # and it stays
    assert said[-1][1].count("gradient check passed") == 1
    assert re.findall(r"(\d+): ", said[-1][1].split("\n")[1]) == ["1", "2"]  # of the second attempt alone


def test_nothing_is_said_without_a_node(hosts: Callable[..., Host], said: list[tuple[str, str]]) -> None:
    h = hosts("sd15")
    h.sample(h.sampler(h.pack.samplers.sample_psld), steps=1)
    assert said == []


def test_sampler_that_reports_no_residual(hosts: Callable[..., Host], said: list[tuple[str, str]]) -> None:
    h = hosts("sd15")

    def solve(model: Any, x: Tensor, sigmas: Tensor, callback: Any, **_: Any) -> Tensor:
        callback({"x": x, "i": 0, "sigma": sigmas[0], "sigma_hat": sigmas[0], "denoised": x})
        return x

    h.sample(h.pack.nodes.host.stock_sampler(solve, h.measurement(), h.vae, unique_id="7"), steps=2)
    assert said[0] == ("7", "step 1 of 2, sigma 14.6")
