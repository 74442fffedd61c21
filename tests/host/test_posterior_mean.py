"""Through the real host, where the posterior is known in closed form: the mean of samples is its mean.

With its last layer zeroed a v-prediction model is the exact denoiser of N(0, I), and the box autoencoder is linear: given
y = A D z + noise, z is normal with precision I + (A D)^T A D / sigma^2. How far samples spread is not looked at: consistency
steps end where the residual is that of the noise, and leave them nearer to each other than the posterior is wide.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.host_runs import Host
from torch import Tensor

SIDE, SAMPLES, SIGMA = 16, 24, 0.3
OPERATORS: dict[str, Callable[[Any], Any]] = {
    "mask": lambda o: o.Mask(
        (torch.arange(4) != 2).float().reshape(1, 1, 2, 2).repeat_interleave(8, 2).repeat_interleave(8, 3)
    ),
    "area": lambda o: o.AreaDownscale((3, SIDE, SIDE), 16),
    "blur": lambda o: o.Blur(o.gaussian_kernel(1.7), (3, SIDE, SIDE), "circular"),
}
PSLD = {"rule": "line_search", "omega": 1.0, "gamma": 0.0}
SAMPLERS: dict[str, tuple[str, int, dict[str, Any]]] = {"C-PiGDM": ("sample_cpigdm", 8, {}), "PSLD": ("sample_psld", 12, PSLD)}
# One step meets a mask or block means, whose gain is the same in each direction, and several a blur.
CONSISTENCY = {"mask": (1, 4), "area": (1, 4), "blur": (2, 8)}


def decode(z: Tensor) -> Tensor:
    """(B, 4, h, w) latents of the model -> (B, 3, 8 h, 8 w) in [-1, 1], as the box autoencoder does it."""
    return (z[:, :3] / (5 * 0.18215)).repeat_interleave(8, 2).repeat_interleave(8, 3)


def posterior(operator: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent."""
    side, count = SIDE // 8, 4 * (SIDE // 8) ** 2
    basis = torch.eye(count, dtype=torch.float64).reshape(count, 4, side, side)
    seen = operator.A(decode(basis)).flatten(1)  # a row for each latent
    covariance = torch.linalg.inv(seen @ seen.T / SIGMA**2 + torch.eye(count, dtype=torch.float64))
    return covariance @ (seen @ y.flatten()) / SIGMA**2, covariance.diagonal().sqrt()


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_mean_of_samples_is_that_of_the_posterior(
    pack: ModuleType, nodes: ModuleType, tiny: Callable[..., Path], load: Callable, name: str, sampler: str
) -> None:
    model, _, vae = load(tiny("sd21v", zero_out=True, vae="box"))
    h, g = Host(pack, "sd21v", model, vae), torch.Generator().manual_seed(0)
    operator = OPERATORS[name](pack.operators)
    truth = decode(torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=g))
    y = operator.A(truth + SIGMA * torch.randn(truth.shape, generator=g)) if name == "mask" else operator.A(truth)
    if name != "mask":
        y = y + SIGMA * torch.randn(y.shape, generator=g)
    mean, deviation = posterior(operator.to("cpu", torch.float64), y.double())
    function, steps, options = SAMPLERS[sampler]
    inner, last = CONSISTENCY[name]
    options = {**options, "eta": 1.0, "inner_steps": inner, "last_steps": last}
    measurement = pack.operators.Measurement(y.expand(SAMPLES, -1, -1, -1).contiguous(), operator, SIGMA)
    run = h.pack.nodes.host.stock_sampler(getattr(pack.samplers, function), measurement, vae, **options)
    latents = h.sample(run, h.guider(cfg=1.0), steps, latent=torch.zeros(SAMPLES, 4, SIDE // 8, SIDE // 8))
    z = 0.18215 * latents.flatten(1).double()  # as the model sees a LATENT
    off = (z.mean(0) - mean) / deviation
    # At most the error of a mean of so many exact samples, one over their number.
    assert float(off.square().mean()) < 1.6 / SAMPLES
    assert float((mean / deviation).square().mean()) > 4 / SAMPLES  # which the prior's mean would be off by
