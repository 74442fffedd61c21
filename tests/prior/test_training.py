"""The training program: killed at any moment it goes on as if it had not been, and its measures measure what they say."""

import csv
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from prior.networks import Autoencoder, alphas_cumprod
from prior.training import data, diffusion
from prior.training.loop import Plan
from prior.training.optim import orthogonal

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4


def start(folder: Path) -> subprocess.Popen:
    small = f"--stage autoencoder --autoencoder-steps {STEPS} --pictures 6 --validation 4 --batch 2 --every 0"
    command = [sys.executable, "-m", "prior.training", "--folder", str(folder), *small.split()]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=one_thread, stdout=subprocess.DEVNULL)


def rows(folder: Path) -> list[dict[str, str]]:
    path = folder / "autoencoder.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read(checkpoint: Path) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The progress in a checkpoint, and its tensors."""
    with safe_open(checkpoint, "pt") as file:
        progress = json.loads(file.metadata()["progress"])
    return progress, load_file(checkpoint)


def test_a_killed_training_goes_on_as_if_unbroken(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    unbroken, killed = start(whole), start(broken)
    while not rows(broken):
        assert killed.poll() is None, "the training ended before its first checkpoint"
        time.sleep(0.02)
    both = [psutil.Process(killed.pid), *psutil.Process(killed.pid).children(recursive=True)]
    killed.kill()
    killed.wait()
    _, left = psutil.wait_procs(both, timeout=60)
    assert not left, "the second process must end with the first"
    before = len(rows(broken))
    assert 1 <= before < STEPS, "killed too late to prove anything"

    assert start(broken).wait() == unbroken.wait() == 0
    (a, first), (b, second) = (read(folder / "autoencoder.checkpoint.safetensors") for folder in (whole, broken))
    assert a["step"] == b["step"] == STEPS
    assert a["pictures"] == b["pictures"] > 0
    assert first.keys() == second.keys()
    assert len(first) > 100
    assert {key.split(".")[0] for key in first} == {"network", "average", "optimiser", "running"}
    assert all(torch.equal(first[key], second[key]) for key in first)
    for x, y in zip(rows(whole), rows(broken), strict=True):
        assert {k: v for k, v in x.items() if k not in ("seconds", "cpu")} == {
            k: v for k, v in y.items() if k not in ("seconds", "cpu")
        }

    # The export has the keys of the shipped file, float16; its latents are those that the decoder has learnt with.
    state = load_file(broken / "autoencoder.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float16}
    autoencoder, trained = Autoencoder(), Autoencoder()
    autoencoder.load_state_dict(state)
    pictures = data.load(data.blocks(broken, 0, 6))[:3].float() / 127.5 - 1
    with torch.no_grad():
        for i, parameter in enumerate(trained.parameters()):
            parameter.copy_(second[f"average.{i}"])
        mean, std = (second[f"running.{name}"][:, None, None] for name in ("mean", "std"))
        expected = (trained.encode(pictures) - mean) / std
        torch.testing.assert_close(autoencoder.encode(pictures), expected, rtol=0, atol=5e-3 * float(expected.std()))


def test_validation_pictures_are_never_trained_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="validation only"):
        data.blocks(tmp_path, data.VALIDATION_SEED - 256, 512)
    with pytest.raises(ValueError, match="multiple"):
        data.blocks(tmp_path, 0, 300)


def test_learning_rates_rise_hold_and_fall_to_zero() -> None:
    plan = Plan(steps=100, decay=0.5, warmup=4, muon=1, adam=1, ema=0.9, clip=1)
    assert [plan.rate(step) for step in (0, 3, 10, 50, 75, 100)] == pytest.approx([0.25, 1, 1, 1, 0.5, 0])


def test_orthogonal_keeps_directions_and_evens_out_lengths() -> None:
    for shape in ((8, 40), (40, 8)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        found = torch.linalg.svdvals(orthogonal(matrix, 6))
        assert float(found.min()) > 0.6
        assert float(found.max()) < 1.3
        cosine = (orthogonal(matrix, 6) * (u @ v)).sum() / (orthogonal(matrix, 6).norm() * (u @ v).norm())
        assert float(cosine) > 0.97


class Exact(nn.Module):
    """The noise of pictures that are all `value`."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        a = alphas_cumprod().float()[t][:, None, None, None]
        return (x - a.sqrt() * self.value) / (1 - a).sqrt()


def test_eps_mse() -> None:
    x = torch.full((64, 3, 8, 8), 0.5)
    assert float(diffusion.eps_mse(Exact(0.5), x).max()) < 1e-6
    zero = diffusion.fresh((1, 2), 3)
    assert float(diffusion.eps_mse(zero, x).mean()) == pytest.approx(1, abs=0.05)  # an untrained UNet says 0
    # An error of d in x0 is one of d^2 * snr in the noise.
    t = torch.linspace(5, 994, 64).long()
    snr = alphas_cumprod() / (1 - alphas_cumprod())
    assert float(diffusion.eps_mse(Exact(0.4), x).mean()) == pytest.approx(float(0.01 * snr[t].mean()), rel=1e-3)


class Normal(nn.Module):
    """The expected noise of pictures whose values are independent, normal, of standard deviation 0.5."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        a = alphas_cumprod().float()[t][:, None, None, None]
        return (1 - a).sqrt() * x / (a * 0.25 + 1 - a)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_finds_what_the_network_knows(eta: float) -> None:
    samples = diffusion.ddim(Exact(0.5), (2, 3, 4, 4), limit=1.0, eta=eta)
    assert torch.allclose(samples, torch.full_like(samples, 0.5), atol=1e-4)
    spread = diffusion.ddim(Normal(), (4, 4, 32, 32), steps=1000, eta=eta)
    assert float(spread.std()) == pytest.approx(0.5, abs=0.01)


def test_ddpm_draws_fresh_noise_from_the_seed() -> None:
    first, again, other = (diffusion.ddim(Normal(), (1, 4, 16, 16), seed=seed, eta=1.0) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # What ends the chain is hardly what began it: DDIM only scales it.
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert abs(float(torch.corrcoef(torch.stack([first.flatten(), start.flatten()]))[0, 1])) < 0.2
    kept = diffusion.ddim(Normal(), (1, 4, 16, 16))
    assert float(torch.corrcoef(torch.stack([kept.flatten(), start.flatten()]))[0, 1]) > 0.99


def test_training_pictures_at_another_size() -> None:
    picture = torch.zeros(1, 3, 128, 128, dtype=torch.uint8)
    picture[..., :4, :4] = 255
    small = data.small(picture, 32)
    assert small.shape == (1, 3, 32, 32)
    assert small[0, 0, 0, :2].tolist() == pytest.approx([1, -1])
    assert math.isclose(float(small.mean()), 2 / 1024 - 1, rel_tol=1e-5)
