"""The weights of C-PiGDM and their integrator (E, theta, Psi) against quadrature and limits."""

import math

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from samplers.weights import Bayes, Paper, over_compensated, psi, pull, vp_time

F64 = torch.float64


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


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


@pytest.mark.parametrize("vp", [False, True])
def test_limits_of_psi(vp: bool) -> None:
    """Noise to 0 and to infinity, directions not seen, strong weights, a step to 0, and no step at all."""
    s, t, zero = number(2.0), number(0.7), number(0.0)

    def value(weight: Paper | Bayes, seen: float, end: Tensor = t) -> float:
        return float(psi(weight, s, end, 1.0, vp)(number(seen)))

    for noisy, free in ((Paper(15.0, 1e-7), Paper(15.0, 0.0)), (Bayes(0.3, 1e-7), Bayes(0.3, 0.0))):
        assert value(noisy, 1.0) == pytest.approx(value(free, 1.0), rel=1e-6)
    for make in (lambda noise: Paper(15.0, noise), lambda noise: Bayes(0.3, noise)):
        assert value(make(1e6), 1.0) == pytest.approx(value(make(1e6), 0.0), rel=1e-6)  # E is 1 wherever nothing pulls
        assert value(make(0.1), 1e-30) == pytest.approx(value(make(0.1), 0.0), rel=1e-6)
        assert abs(value(make(0.1), 1.0)) < abs(value(make(0.1), 0.0))  # and less than 1 elsewhere
        assert value(make(0.1), 1.0, s) == 0
    strong = [abs(value(Paper(w, 0.1), 1.0)) for w in (2.0, 15.0, 300.0, 1e4)]
    assert strong == sorted(strong, reverse=True)
    assert strong[-1] < 1e-3 * strong[0]
    assert value(Bayes(0.3, 0.0), 1.0, zero) == 0  # E of the exact constraint is without bounds there


def test_the_papers_theta_at_sigma_0() -> None:
    """(1 + sigma^2)^(-w / 2) of the noise-free innovation is left, whatever the caller then does about it."""
    left = 1 - float(pull(Paper(2.0, 0.0), number(0.5), number(0.0))(number(1.0)))
    assert left == pytest.approx(1 / 1.25, rel=1e-12)
