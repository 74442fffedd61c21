"""C-PiGDM on pixels against posteriors that are known exactly."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.analytic import gaussian
from support.mixture import Mixture, energy_distance, karras

from operators import AreaDownscale, Blur, Dense, Identity, Measurement, gaussian_kernel
from samplers import fill_unseen, sample_cpigdm
from samplers.pixels import contradicts
from samplers.spaces import NoisyPixels

F64 = torch.float64
GOLDEN = Path(__file__).resolve().parent.parent / "golden"


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# What an exact denoiser can take.
EXACT: dict[str, Any] = {"tau": 1.0, "reach": 2.0, "eta": 1.0}
SHAPE = (1, 4, 4)
MATRIX = torch.randn(6, 16, dtype=F64, generator=generator(3))


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_mean_and_covariance_of_a_gaussian_posterior(noise: float) -> None:
    """Prior N(m, I), the default weight: exact but for the finite first sigma and the DDIM steps."""
    operator = Dense(MATRIX, SHAPE, (1, 1, 6))
    mean = torch.randn(1, *SHAPE, dtype=F64, generator=generator(4))
    y = operator.A(mean) + torch.randn(1, 1, 1, 6, dtype=F64, generator=generator(5))
    n, many = 100, 2000
    gain = MATRIX.T @ torch.linalg.inv(MATRIX @ MATRIX.T + noise**2 * torch.eye(6, dtype=F64))
    expected_mean = mean.flatten() + gain @ (y.flatten() - MATRIX @ mean.flatten())
    expected_cov = torch.eye(16, dtype=F64) - gain @ MATRIX
    x = 80 * torch.randn(many, *SHAPE, dtype=F64, generator=generator(6))
    measurement = Measurement(y.expand(many, -1, -1, -1).contiguous(), operator, noise)
    out = sample_cpigdm(gaussian(mean, 1.0), x, karras(n, 80.0), measurement=measurement, **EXACT).flatten(1)
    error = 4 / many**0.5
    assert float((out.mean(0) - expected_mean).abs().max()) < error + 0.02
    assert float((out.T.cov() - expected_cov).abs().max()) < 2 * error + 0.02


def test_an_error_that_the_residual_contradicts_does_not_let_the_noise_in() -> None:
    """A prior ten times as narrow as tau says, whose x0 is near to y as it is: the result keeps its error, and does not take y's."""
    shape, prior, noise = (3, 16, 16), 0.03, 0.1
    truth = prior * torch.randn(1, *shape, dtype=F64, generator=generator(7))
    y = truth + noise * torch.randn(1, *shape, dtype=F64, generator=generator(8))
    x = fill_unseen(Measurement(y, Identity(shape), noise)) + torch.randn(1, *shape, dtype=F64, generator=generator(9))
    given = {"measurement": Measurement(y, Identity(shape), noise), "tau": 0.3}
    out = sample_cpigdm(
        gaussian(torch.zeros(1, *shape, dtype=F64), prior**2), x, torch.tensor([1.0, 0.3, 0.0], dtype=F64), **given
    )
    assert float((out - truth).square().mean().sqrt()) < 1.2 * prior
    # A few values contradict nothing: as exact as ever.
    few = Measurement(y[..., :2, :2], Identity((3, 2, 2)), noise)
    assert not bool(contradicts(torch.zeros(1, 3, 2, 2, dtype=F64), few, 0.3).any())


@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_where_the_residual_contradicts_an_error_that_is_right_little_is_lost(
    noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exact denoiser, whose x0 was brought to y by the steps before: less than one percent of the error (measured: .9 and .7)."""
    shape, photos = (3, 32, 32), 8
    operator = Blur(gaussian_kernel(1.0, 7), shape)
    truth = torch.randn(photos, *shape, dtype=F64, generator=generator(7))
    y = operator.A(truth) + noise * torch.randn(photos, *shape, dtype=F64, generator=generator(8))
    x = 10 * torch.randn(photos, *shape, dtype=F64, generator=generator(9))
    sigmas = torch.tensor([10.0, 3.0, 1.0, 0.0], dtype=F64)

    def error() -> float:
        model = gaussian(torch.zeros(1, *shape, dtype=F64), 1.0)
        out = sample_cpigdm(model, x, sigmas, measurement=Measurement(y, operator, noise), tau=1.0)
        return float((out - truth).square().mean().sqrt())

    shown, settled = error(), NoisyPixels.settled
    monkeypatch.setattr(NoisyPixels, "settled", lambda self, x0, error, target: target)
    trusted = error()
    monkeypatch.setattr(NoisyPixels, "settled", settled)
    assert shown != trusted
    assert shown < 1.01 * trusted


def test_noise_free_gaussian_is_exact_in_two_steps_on_what_is_seen() -> None:
    """The guided posterior mean of a Gaussian prior: with sigma -> 0 at once, x is E[x0 | x, y]."""
    operator = Dense(MATRIX, SHAPE, (1, 1, 6))
    mean = torch.zeros(1, *SHAPE, dtype=F64)
    y = operator.A(torch.randn(1, *SHAPE, dtype=F64, generator=generator(5)))
    x = 3 * torch.randn(1, *SHAPE, dtype=F64, generator=generator(6))
    for noise in (0.0, 0.3):
        measurement = Measurement(y, operator, noise)
        out = sample_cpigdm(gaussian(mean, 1.0), x, torch.tensor([3.0, 0.0], dtype=F64), measurement=measurement, **EXACT)
        covariance = 9 / (9 + 1)  # of x0 given x
        gain = covariance * MATRIX.T @ torch.linalg.inv(covariance * MATRIX @ MATRIX.T + noise**2 * torch.eye(6, dtype=F64))
        given_x = x.flatten() / (9 + 1)
        torch.testing.assert_close(out.flatten(), given_x + gain @ (y.flatten() - MATRIX @ given_x))


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_modes_of_a_mixture(noise: float) -> None:
    """Ten calls find the mode that the measurement decides, where the weights without memory miss it.

    The mixture of the golden vectors: its modes differ in patterns that block means do not show. Energy distance to the exact
    posterior, mean over 6 truths; benchmarks/posterior.py has the table.
    """
    with np.load(GOLDEN / "prior_gmm.npz") as file:
        prior = Mixture(*(torch.from_numpy(file[key]) for key in ("pi", "mu", "s2", "U", "g")))
    operator = AreaDownscale((3, 8, 8), 4)
    matrix = operator.A(torch.eye(192, dtype=F64).reshape(-1, 3, 8, 8)).flatten(1).T
    truths = prior.sample(6, generator(100)).reshape(-1, 3, 8, 8)
    y = operator.A(truths) + noise * torch.randn(6, 3, 2, 2, generator=generator(101), dtype=F64)
    measurement = Measurement(y.repeat_interleave(32, 0), operator, noise)
    x = fill_unseen(measurement) + 5 * torch.randn(192, 3, 8, 8, generator=generator(102), dtype=F64)
    exact = [prior.posterior(matrix, v.flatten(), noise).sample(512, generator(200 + i)) for i, v in enumerate(y)]

    def score(**options: Any) -> float:
        out = sample_cpigdm(prior.denoise, x, karras(10, 5.0, 0.05), measurement=measurement, **options).flatten(1).split(32)
        return sum(energy_distance(a, b) for a, b in zip(out, exact, strict=True)) / 6

    assert score(**EXACT) < 0.3
    assert score() < 0.6  # measured: .35 and .47
    assert score(weight="bayes") > 0.6
