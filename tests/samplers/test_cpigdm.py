"""C-PiGDM: its integrator against quadrature and limits, its sampler against exact posteriors, and what every sampler promises."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from support.analytic import GaussianMixture
from support.mixture import Mixture, energy_distance, karras
from torch import Tensor

from operators import AreaDownscale, Blur, Dense, Mask, Measurement, gaussian_kernel
from prior import networks
from prior.draw import draw
from samplers import fill_unseen, sample_cpigdm, sample_psld
from samplers.steps import ancestral_split
from samplers.weights import Bayes, Paper, over_compensated, psi, pull, vp_time

F64 = torch.float64
GOLDEN = Path(__file__).resolve().parent.parent / "golden"


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


# The integrator: E, theta, Psi ----------------------------------------------------------------------------------------------

WEIGHTS = [
    Paper(2.0, 0.1),
    Paper(15.0, 0.1),
    Paper(40.0, 0.02),
    Paper(15.0, 0.0),
    Bayes(0.3, 0.1),
    Bayes(1.0, 0.02),
    Bayes(0.3, 0.0),
]
STEPS = [(14.6, 6.0), (2.03, 0.8), (0.5, 0.1), (0.1, 0.01)]
EIGENVALUES = [1.0, 0.06, 1e-4]


def omega(weight: Paper | Bayes, value: float, sigma: float) -> float:
    """The weights as the table of the papers has them, in s^2 = value."""
    if isinstance(weight, Bayes):
        r2 = sigma**2 * weight.tau**2 / (sigma**2 + weight.tau**2)
        return value / (value * r2 + weight.noise**2)
    kappa = weight.noise**2 / value
    return weight.w / (1 + sigma**2) * sigma**2 / (sigma**2 + kappa * (1 + sigma**2))


def exponent(weight: Paper | Bayes, value: float, sigma: float, sigma_next: float) -> float:
    """int_sigma_next^sigma sigma Omega, by adaptive quadrature."""
    return quad(lambda s: s * omega(weight, value, s), sigma_next, sigma, epsabs=0, epsrel=1e-12, limit=200)[0]


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
@pytest.mark.parametrize("step", STEPS, ids=str)
@pytest.mark.parametrize("value", EIGENVALUES)
def test_theta_equals_quadrature(weight: Paper | Bayes, step: tuple[float, float], value: float) -> None:
    value = 1.0 if weight.noise == 0 else value
    sigma, sigma_next = step
    expected = -math.expm1(-exponent(weight, value, sigma, sigma_next)) / value
    found = pull(weight, number(sigma), number(sigma_next))(number(value))
    torch.testing.assert_close(found, number(expected), rtol=1e-9, atol=0)


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
@pytest.mark.parametrize("step", STEPS, ids=str)
@pytest.mark.parametrize("vp", [False, True])
def test_psi_equals_quadrature(weight: Paper | Bayes, step: tuple[float, float], vp: bool) -> None:
    sigma, sigma_next = step
    for value in (1.0,) if weight.noise == 0 else EIGENVALUES:

        def integrand(s: float, value: float = value) -> float:
            course = omega(weight, 1.0, s) / omega(weight, 1.0, sigma) * (((1 + sigma**2) / (1 + s**2)) ** 0.5 if vp else 1.0)
            return s**2 * course * math.exp(-exponent(weight, value, s, sigma_next))

        expected = -quad(integrand, sigma_next, sigma, epsabs=1e-10, epsrel=1e-8, limit=400)[0]
        found = psi(weight, number(sigma), number(sigma_next), 1.0, vp)(number(value))
        torch.testing.assert_close(found, number(expected), rtol=2e-5, atol=1e-7)


def test_psi_of_directions_that_are_not_seen_is_the_papers() -> None:
    """There E = 1, and the integral is w (asinh sigma - sigma / sqrt(1 + sigma^2)) for the Jacobian of the vp state."""
    w, s, t = 15.0, number(2.03), number(0.4)
    found = psi(Paper(w, 0.0), s, t, 1.0, vp=True)(number(0.0))
    course = w / (1 + s**2) / (1 + s**2).sqrt()  # what the frozen term carries
    torch.testing.assert_close(
        found * course, w * ((t.asinh() - t / (1 + t**2).sqrt()) - (s.asinh() - s / (1 + s**2).sqrt())), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("w", [2.0, 15.0, 300.0])
def test_noise_to_zero_is_the_noise_free_weight(w: float) -> None:
    s, t = number(2.0), number(0.7)
    for noisy, free in ((Paper(w, 1e-7), Paper(w, 0.0)), (Bayes(0.3, 1e-7), Bayes(0.3, 0.0))):
        torch.testing.assert_close(pull(noisy, s, t)(number(1.0)), pull(free, s, t)(number(1.0)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("weight", [Paper(15.0, 0.1), Bayes(0.3, 0.1)])
def test_directions_hardly_seen_have_a_finite_limit(weight: Paper | Bayes) -> None:
    """(1 - theta) / s^2 -> int sigma Omega / s^2 as s -> 0, and 1 - theta -> 0 as the noise grows."""
    s, t = number(2.0), number(0.7)
    limit = exponent(weight, 1e-12, 2.0, 0.7) / 1e-12
    for value in (0.0, 1e-40, 1e-20, 1e-9):
        torch.testing.assert_close(pull(weight, s, t)(number(value)), number(limit), rtol=1e-6, atol=0)
    loud = Paper(15.0, 1e6) if isinstance(weight, Paper) else Bayes(0.3, 1e6)
    assert 0 < float(pull(loud, s, t)(number(1.0))) < 1e-10


def test_strong_weights_project_and_zero_weights_do_nothing() -> None:
    s, t = number(2.0), number(0.7)
    for noise in (0.0, 0.1):
        values = [float(pull(Paper(w, noise), s, t)(number(1.0))) for w in (0.0, 2.0, 8.0, 12.0, 50.0, 1e4)]
        assert values[0] == 0
        assert values == sorted(values)
        assert values[-1] == pytest.approx(1, abs=1e-12)


def test_step_to_zero() -> None:
    """Bayes without noise ends on the constraint, with noise below it; the small step theta does not underflow."""
    s, t = number(0.5), number(0.0)
    assert float(pull(Bayes(0.3, 0.0), s, t)(number(1.0))) == 1
    noisy = float(pull(Bayes(0.3, 0.1), s, t)(number(1.0)))
    assert noisy == pytest.approx(-math.expm1(-exponent(Bayes(0.3, 0.1), 1.0, 0.5, 0.0)), rel=1e-9)
    assert 0.5 < noisy < 1
    assert float(pull(Bayes(0.3, 0.0), s, s)(number(1.0))) == 0


def test_limits_of_tau() -> None:
    """tau = infinity is r = sigma, theta = sigma_next / sigma; a small tau projects."""
    s, t = number(2.0), number(0.5)
    torch.testing.assert_close(pull(Bayes(math.inf, 0.0), s, t)(number(1.0)), 1 - t / s)
    torch.testing.assert_close(pull(Bayes(math.inf, 0.1), s, t)(number(0.0)), (s**2 - t**2) / (2 * 0.1**2))
    torch.testing.assert_close(pull(Bayes(1e-3, 0.0), s, t)(number(1.0)), number(1.0))


def test_lambda_zero_is_the_plain_step() -> None:
    s, t = number(2.03), number(0.8)
    for weight, value in ((Paper(15.0, 0.0), 1.0), (Paper(2.0, 0.1), 0.3), (Bayes(0.3, 0.1), 0.3)):
        step, part = over_compensated(weight, s, t, 0.0), pull(weight, s, t)(number(value))
        theta = 1 - value * part
        torch.testing.assert_close(step.a(number(value)), theta, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(step.b(number(value)), t - theta * s, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(step.c_rate(number(value)), part, rtol=1e-7, atol=1e-9)


def test_time_of_the_papers_process() -> None:
    assert float(vp_time(number(2.0283))) == pytest.approx(0.4, abs=1e-4)
    assert float(vp_time(number(0.0104857))) == pytest.approx(0.001, abs=1e-6)


# The sampler against exact posteriors ----------------------------------------------------------------------------------------


def gaussian(mean: Tensor, variance: float) -> Callable[..., Tensor]:
    """The denoiser of N(mean, variance I)."""

    def model(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        share = (variance / (variance + sigma**2)).reshape(-1, 1, 1, 1)
        return mean + share * (x - mean)

    return model


SHAPE = (1, 4, 4)
MATRIX = torch.randn(6, 16, dtype=F64, generator=generator(3))


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_mean_and_covariance_of_a_gaussian_posterior(noise: float) -> None:
    """Prior N(m, I), the default method: exact but for the finite first sigma and the DDIM steps."""
    operator = Dense(MATRIX, SHAPE, (1, 1, 6))
    mean = torch.randn(1, *SHAPE, dtype=F64, generator=generator(4))
    y = operator.A(mean) + torch.randn(1, 1, 1, 6, dtype=F64, generator=generator(5))
    n, many = 100, 2000
    gain = MATRIX.T @ torch.linalg.inv(MATRIX @ MATRIX.T + noise**2 * torch.eye(6, dtype=F64))
    expected_mean = mean.flatten() + gain @ (y.flatten() - MATRIX @ mean.flatten())
    expected_cov = torch.eye(16, dtype=F64) - gain @ MATRIX
    x = 80 * torch.randn(many, *SHAPE, dtype=F64, generator=generator(6))
    measurement = Measurement(y.expand(many, -1, -1, -1).contiguous(), operator, noise)
    out = sample_cpigdm(gaussian(mean, 1.0), x, karras(n, 80.0), measurement=measurement).flatten(1)
    error = 4 / many**0.5
    assert float((out.mean(0) - expected_mean).abs().max()) < error + 0.02
    assert float((out.T.cov() - expected_cov).abs().max()) < 2 * error + 0.02


def test_noise_free_gaussian_is_exact_in_two_steps_on_what_is_seen() -> None:
    """The guided posterior mean of a Gaussian prior: with sigma -> 0 at once, x is E[x0 | x, y]."""
    operator = Dense(MATRIX, SHAPE, (1, 1, 6))
    mean = torch.zeros(1, *SHAPE, dtype=F64)
    y = operator.A(torch.randn(1, *SHAPE, dtype=F64, generator=generator(5)))
    x = 3 * torch.randn(1, *SHAPE, dtype=F64, generator=generator(6))
    for noise in (0.0, 0.3):
        out = sample_cpigdm(
            gaussian(mean, 1.0), x, torch.tensor([3.0, 0.0], dtype=F64), measurement=Measurement(y, operator, noise)
        )
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

    assert score() < 0.3
    assert score(weight="bayes") > 0.6


# What every setting promises -------------------------------------------------------------------------------------------------


def prior(dim: int) -> GaussianMixture:
    g = generator(11)
    u = torch.linalg.qr(torch.randn(3, dim, 2, dtype=F64, generator=g))[0]
    return GaussianMixture(
        torch.full((3,), 1 / 3, dtype=F64), 0.5 * torch.randn(3, dim, dtype=F64, generator=g), torch.full((3,), 0.1, dtype=F64),
        u, torch.full((3, 2), 0.5, dtype=F64),
    )  # fmt: skip


IMAGE = (3, 6, 4)
OPERATORS = {
    "area": AreaDownscale(IMAGE, 2),
    "mask": Mask(torch.rand(1, 1, 6, 4, generator=generator(1)) < 0.6),
    "blur": Blur(gaussian_kernel(0.6, 3), IMAGE, "zero"),
}
SIGMAS = torch.tensor([5.0, 2.0, 0.7, 0.2, 0.0], dtype=F64)
SETTINGS: dict[str, dict[str, Any]] = {
    "dual": {},
    "bayes": {"weight": "bayes"},
    "bayes with Jacobian": {"weight": "bayes", "jacobian": "k"},
    "paper": {"weight": "paper", "jacobian": "vp"},
    "paper, lambda": {"weight": "paper", "jacobian": "vp", "lam": 0.2, "w": 2.0},
    "DDNM": {"weight": "paper", "w": math.inf},
    "PiGDM": {"weight": "bayes", "tau": math.inf, "integrator": "discrete", "jacobian": "k"},
    "PiGDM, Euler": {"weight": "bayes", "tau": 1.0, "integrator": "euler", "jacobian": "k"},
}


def truth(operator: Any, images: int = 1, seed: int = 2) -> Tensor:
    return operator.A(torch.rand(images, *IMAGE, dtype=F64, generator=generator(seed)) * 2 - 1)


def run(
    y: Tensor, operator: Any, x: Tensor, noise: float = 0.0, seed: int = 0, sigmas: Tensor = SIGMAS, **options: Any
) -> Tensor:
    denoise = prior(x[0].numel()).denoise

    def model(x: Tensor, sigma: Tensor, seed: int) -> Tensor:
        return denoise(x, sigma)

    return sample_cpigdm(model, x, sigmas, {"seed": seed}, measurement=Measurement(y, operator, noise), **options)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize("name", ["dual", "bayes", "bayes with Jacobian", "paper", "paper, lambda", "DDNM"])
def test_noise_free_result_meets_the_measurement(operator: Any, name: str) -> None:
    y = truth(operator)
    out = run(y, operator, 5 * torch.randn(1, *IMAGE, dtype=F64, generator=generator(1)), eta=0.5, **SETTINGS[name])
    torch.testing.assert_close(operator.A(out), y, rtol=0, atol=1e-9)


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_a_batch_equals_single_runs(options: dict[str, Any], noise: float) -> None:
    operator = OPERATORS["area"]
    x = 5 * torch.randn(3, *IMAGE, dtype=F64, generator=generator(1))
    y = truth(operator, 3)
    batch = run(y, operator, x, noise, seed=4, eta=0.5, **options)
    single = torch.cat([run(y[i : i + 1], operator, x[i : i + 1], noise, seed=4 + i, eta=0.5, **options) for i in range(3)])
    assert batch.isfinite().all()
    torch.testing.assert_close(batch, single, rtol=0, atol=1e-10)


def test_settings_differ() -> None:
    operator, x = OPERATORS["area"], 5 * torch.randn(1, *IMAGE, dtype=F64, generator=generator(1))
    for noise in (0.0, 0.1):
        results = [run(truth(operator), operator, x, noise, sigmas=SIGMAS[:-1], **options) for options in SETTINGS.values()]
        for i, a in enumerate(results):
            assert all(float((a - b).abs().max()) > 1e-3 for b in results[:i])


def test_weight_zero_is_ddim_and_infinite_weight_is_ddnm() -> None:
    operator, x = OPERATORS["area"], 5 * torch.randn(1, *IMAGE, dtype=F64, generator=generator(1))
    y, denoise = truth(operator), prior(72).denoise
    for w, project in ((0.0, False), (math.inf, True)):
        expected = x
        for s, t in itertools.pairwise(SIGMAS):
            x0 = denoise(expected, s[None])
            corrected = x0 + operator.A_dagger(y - operator.A(x0)) if project else x0
            expected = corrected + t * (expected - x0) / s
        torch.testing.assert_close(run(y, operator, x, weight="paper", w=w), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_several_samples_of_one_photo(options: dict[str, Any]) -> None:
    operator, x = OPERATORS["area"], 5 * torch.randn(2, *IMAGE, dtype=F64, generator=generator(1))
    one = truth(operator)
    shared, each = (run(y, operator, x, 0.1, **options) for y in (one, one.expand(2, -1, -1, -1).contiguous()))
    assert torch.equal(shared, each)


def test_same_seed_same_result() -> None:
    operator, x = OPERATORS["area"], 5 * torch.randn(1, *IMAGE, dtype=F64, generator=generator(1))
    first, again, other = (run(truth(operator), operator, x, seed=s, eta=1.0) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_fresh_noise() -> None:
    """eta = 0 keeps the noise, 1 is the variance of DDPM, more is bounded by the noise there is; the sum of squares is kept."""
    s, t = number(2.0), number(1.2)
    for eta, expected in ((0.0, 0.0), (1.0, 1.2 * 0.8), (1.2, 1.2 * 0.96), (1.25, 1.2), (7.0, 1.2)):
        down, up = ancestral_split(s, t, eta)
        assert float(up) == pytest.approx(expected, abs=1e-12)
        assert float(down**2 + up**2) == pytest.approx(1.44)


def test_one_call_a_step_and_no_gradient() -> None:
    calls = []

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append((x.requires_grad, torch.is_grad_enabled()))
        return prior(72).denoise(x, sigma)

    operator = OPERATORS["area"]
    x = 5 * torch.randn(1, *IMAGE, dtype=F64, generator=generator(1))
    sample_cpigdm(model, x, SIGMAS, measurement=Measurement(truth(operator), operator))
    assert calls == [(False, False)] * 4


def test_callback_gets_the_steps_and_the_residual() -> None:
    seen = []
    operator = OPERATORS["area"]
    y = truth(operator, 2)
    run(y, operator, torch.randn(2, *IMAGE, dtype=F64, generator=generator(1)), callback=seen.append)
    assert [step["i"] for step in seen] == [0, 1, 2, 3]
    assert [float(step["sigma"]) for step in seen] == SIGMAS[:-1].tolist()
    for step in seen:
        assert not step["denoised"].requires_grad
        torch.testing.assert_close(step["residual"], (operator.A(step["denoised"]) - y).flatten(1).norm(dim=1))


def test_input_is_not_changed() -> None:
    operator, x = OPERATORS["area"], torch.randn(1, *IMAGE, dtype=F64, generator=generator(1))
    before = x.clone()
    for options in SETTINGS.values():
        run(truth(operator), operator, x, **options)
    assert torch.equal(x, before)
    assert not x.requires_grad


def test_operator_by_iterations() -> None:
    """Mask of a blurred picture has no closed form."""
    operator = Mask(torch.rand(1, 1, 6, 4, generator=generator(1)) < 0.6) @ OPERATORS["blur"]
    assert not operator.exact
    x = 5 * torch.randn(1, *IMAGE, dtype=F64, generator=generator(1))
    y = truth(operator)
    dense = Dense(torch.stack([operator.A(e.reshape(1, *IMAGE)).flatten() for e in torch.eye(72, dtype=F64)], 1), IMAGE, IMAGE)
    torch.testing.assert_close(run(y, operator, x, 0.1), run(y, dense, x, 0.1), rtol=0, atol=1e-4)


def test_the_first_sigma_of_a_flow_is_nearly_infinite() -> None:
    """s = 1 - 1e-6 in float32: finite, and the same as from a merely large sigma."""
    operator = OPERATORS["area"]
    y = truth(operator).float()
    noise = torch.randn(1, *IMAGE, generator=generator(1))
    out = []
    for first in (1e6, 1e4):
        sigmas = torch.tensor([first, 5.0, 1.0, 0.2, 0.0])
        model = gaussian(torch.zeros(1, *IMAGE), 1.0)
        out.append(sample_cpigdm(model, first * noise, sigmas, measurement=Measurement(y, operator, 0.1)))
    torch.testing.assert_close(out[0], out[1], rtol=0, atol=1e-3)


def test_the_tilt_stays_within_reach() -> None:
    """What the network sees differs from the state by reach * sigma at most, rms."""
    inputs, states = [], []
    operator = OPERATORS["mask"]

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        inputs.append(x)
        return prior(72).denoise(x, sigma)

    x = 5 * torch.randn(2, *IMAGE, dtype=F64, generator=generator(1))
    far = Measurement(20 * truth(operator, 2), operator, 0.1)
    sample_cpigdm(model, x, SIGMAS, callback=lambda step: states.append(step["x"]), measurement=far, reach=0.25)
    lengths = torch.stack([(a - b).square().mean((1, 2, 3)).sqrt() for a, b in zip(inputs, states, strict=True)])
    torch.testing.assert_close(lengths[0], torch.zeros(2, dtype=F64))
    torch.testing.assert_close(lengths[1:], 0.25 * SIGMAS[1:-1, None].expand(-1, 2), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": "tweedie"}, "weight: got 'tweedie', expected one of 'dual', 'bayes', 'paper'"),
        ({"jacobian": True}, "jacobian: got True"),
        ({"consistency": "both"}, "consistency: got 'both'"),
        ({"integrator": "heun"}, "integrator: got 'heun'"),
        ({"w": -1.0}, "w: got -1.0"),
        ({"w": math.nan}, "w: got nan"),
        ({"tau": 0.0}, "tau: got 0.0, expected a number > 0"),
        ({"reach": -1.0}, "reach: got -1.0"),
        ({"eta": math.inf}, "eta: got inf"),
        ({"inner_steps": 0}, "inner_steps: got 0"),
        ({"last_steps": 0}, "last_steps: got 0"),
        ({"lam": math.inf, "weight": "paper"}, "lam: got inf"),
        ({"jacobian": "k"}, 'weight: "dual" goes with'),
        ({"weight": "bayes", "integrator": "euler", "lam": 0.1}, "lam: got 0.1 with integrator 'euler'"),
        ({"sigmas": torch.tensor([2.0, 0.0, 0.0])}, "sigmas: got .* expected a falling list"),
        ({"y": torch.zeros(3, 3, 3, 2)}, "x: got a batch of 1 for a measurement of 3"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    operator = OPERATORS["area"]
    y = options.pop("y", truth(operator))
    with pytest.raises(ValueError, match=message):
        run(y, operator, torch.zeros(1, *IMAGE, dtype=F64), **options)


# Latents -------------------------------------------------------------------------------------------------------------------


class Toy:
    """A latent space (1, 4, 4) of pictures (1, 8, 8): x = D z, perhaps bent by tanh. The encoder is the decoder's inverse."""

    def __init__(self, bent: bool) -> None:
        self.bent = bent
        self.matrix = 0.3 * torch.randn(64, 16, dtype=F64, generator=generator(8))

    def decode(self, z: Tensor) -> Tensor:
        image = (z.flatten(1) @ self.matrix.T).reshape(-1, 1, 8, 8)
        return image.tanh() if self.bent else image

    def encode(self, image: Tensor) -> Tensor:
        flat = image.flatten(1)
        flat = flat.clamp(-0.999, 0.999).atanh() if self.bent else flat
        return (flat @ torch.linalg.pinv(self.matrix).T).reshape(-1, 1, 4, 4)


def latent_run(toy: Toy, noise: float, images: int = 4, calls: int = 10, first: int = 0, **options: Any) -> SimpleNamespace:
    operator = AreaDownscale((1, 8, 8), 2)
    g = generator(9)
    z = torch.randn(4, 1, 4, 4, dtype=F64, generator=g)
    y = operator.A(toy.decode(z))
    y = y + noise * torch.randn(y.shape, dtype=F64, generator=g)
    measurement = Measurement(y[first : first + images], operator, noise)
    start = toy.encode(fill_unseen(measurement)) + 10 * torch.randn(4, 1, 4, 4, dtype=F64, generator=g)[first : first + images]
    model = gaussian(torch.zeros(1, 1, 4, 4, dtype=F64), 1.0)
    out = sample_cpigdm(model, start, karras(calls, 10.0), {"seed": first}, measurement=measurement, autoencoder=toy, **options)
    return SimpleNamespace(z=out, residual=measurement.residual_norm(toy.decode(out)), entries=16)


@pytest.mark.parametrize("bent", [False, True])
@pytest.mark.parametrize("options", [{}, {"weight": "bayes"}], ids=str)
@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3])
def test_final_residual_is_that_of_the_noise(bent: bool, options: dict[str, Any], noise: float) -> None:
    """The discrepancy principle: within 0.9 to 1.1 sigma sqrt(m). Without fresh noise, which lets 16 values vary by more."""
    out = latent_run(Toy(bent), noise, last_steps=30, eta=0.0, **options)
    ratio = out.residual / (noise * out.entries**0.5)
    assert ((ratio > 0.9) & (ratio < 1.1)).all(), ratio


@pytest.mark.parametrize("bent", [False, True])
@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3])
def test_with_fresh_noise_no_sample_is_further_from_the_photo_than_the_noise(bent: bool, noise: float) -> None:
    """As shipped, with all noise of a step fresh, samples of 16 values may be nearer to the photo than the noise, down to 0.7."""
    out = latent_run(Toy(bent), noise, last_steps=30)
    ratio = out.residual / (noise * out.entries**0.5)
    assert ((ratio > 0.7) & (ratio < 1.1)).all(), ratio


def test_noise_free_latents_meet_the_measurement() -> None:
    assert float(latent_run(Toy(False), 0.0, last_steps=30).residual.max()) < 1e-4
    bent = latent_run(Toy(True), 0.0, last_steps=60).residual
    assert float(bent.max()) < 0.01 * float(latent_run(Toy(True), 0.0, weight="paper", w=0.0).residual.min())


@pytest.mark.parametrize("options", [{}, {"weight": "bayes", "jacobian": "k"}, {"consistency": "encoder"}], ids=str)
def test_a_batch_of_latents_equals_single_runs(options: dict[str, Any]) -> None:
    toy = Toy(True)
    batch = latent_run(toy, 0.1, eta=0.5, **options).z
    single = torch.cat([latent_run(toy, 0.1, images=1, first=i, eta=0.5, **options).z for i in range(4)])
    torch.testing.assert_close(batch, single, rtol=0, atol=1e-5)


def test_encoder_consistency_needs_no_gradient() -> None:
    """It comes close with the decoder's inverse as encoder, and no graph is ever built."""

    class NoGraph(Toy):
        def decode(self, z: Tensor) -> Tensor:
            assert not z.requires_grad
            return super().decode(z)

        def encode(self, image: Tensor) -> Tensor:
            assert not image.requires_grad
            return super().encode(image)

    out = latent_run(NoGraph(False), 0.0, consistency="encoder", last_steps=30)
    free = latent_run(NoGraph(False), 0.0, consistency="encoder", weight="paper", w=0.0)
    assert float(out.residual.max()) < 0.1 * float(free.residual.min())


# The demo prior --------------------------------------------------------------------------------------------------------------


class Photo:
    """x4 of a held-out portrait, and the demo prior's networks in any precision."""

    def __init__(self, precision: torch.dtype, factor: int = 4) -> None:
        unet, autoencoder = networks.load()
        self.unet, self.autoencoder, self.dtype = unet.to(precision), autoencoder.to(precision), precision
        self.truth = torch.from_numpy(np.array(draw(1_200_000))).movedim(2, 0)[None].float() / 127.5 - 1
        operator = AreaDownscale((3, 128, 128), factor)
        y = operator.A(self.truth)
        self.measurement = Measurement(y + 0.04 * torch.randn(y.shape, generator=generator(1)), operator, 0.04)

    def decode(self, z: Tensor) -> Tensor:
        return self.autoencoder.decode(z.to(self.dtype)).float()

    def model(self, x: Tensor, sigma: Tensor, seed: int) -> Tensor:
        """As a host does it: x in float32, the network in its precision."""
        level = sigma.reshape(-1, 1, 1, 1)
        t = (sigma[:, None].log() - networks.noise_levels().float().log()).abs().argmin(1)
        return x - level * self.unet((x / (1 + level**2).sqrt()).to(self.dtype), t).float()

    def restore(self, solve: Callable[..., Tensor], calls: int, **options: Any) -> tuple[float, float]:
        """PSNR in dB, and ||A x - y|| / (sigma sqrt(m))."""
        sigmas = networks.noise_levels().float()[torch.linspace(999, 0, calls).round().long()]
        x = torch.randn(1, 4, 16, 16, generator=generator(5)) * sigmas[0]
        sigmas = torch.cat([sigmas, torch.zeros(1)])
        z = solve(self.model, x, sigmas, {"seed": 0}, measurement=self.measurement, autoencoder=self, **options)
        with torch.no_grad():
            image = self.decode(z)
        error = ((image.clamp(-1, 1) - self.truth) / 2).square().mean()
        residual = self.measurement.residual_norm(image) / (0.04 * self.measurement.y.numel() ** 0.5)
        return float(-10 * error.log10()), float(residual)


@pytest.mark.parametrize(
    ("solve", "calls", "options"),
    [
        (sample_cpigdm, 4, {"last_steps": 4}),
        (sample_psld, 8, {"rule": "line_search", "gamma": 0.0, "omega": 0.8, "last_steps": 4}),
    ],
)
def test_bfloat16_networks_give_the_same_picture(solve: Callable[..., Tensor], calls: int, options: dict[str, Any]) -> None:
    """Within 0.2 dB of float32; the line search's finite difference is above the decoder's rounding."""
    exact, low = (Photo(precision).restore(solve, calls, **options)[0] for precision in (torch.float32, torch.bfloat16))
    assert abs(low - exact) < 0.2


def test_five_calls_beat_twenty_of_psld() -> None:
    """x8 super-resolution: nearer to the truth than the paper's rule, and as near to the photo as its noise."""
    photo = Photo(torch.float32, factor=8)
    psnr, residual = photo.restore(sample_cpigdm, 5)
    assert 0.9 < residual < 1.1
    assert psnr > photo.restore(sample_psld, 20, gamma=0.0)[0] + 1
