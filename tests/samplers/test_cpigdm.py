"""C-PiGDM on pixels: what every setting of it promises."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.analytic import GaussianMixture, gaussian
from torch import Tensor

from operators import AreaDownscale, Blur, Dense, Identity, Mask, Measurement, gaussian_kernel
from samplers import sample_cpigdm
from samplers.cpigdm import Dual
from samplers.spaces import ExactPixels
from samplers.steps import ancestral_split

F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


@pytest.mark.parametrize("consistency", ["decoder", "encoder"])
def test_several_latents_of_one_photo(consistency: Any) -> None:
    """With a mask of their own, too."""
    codec = SimpleNamespace(decode=lambda z: z, encode=lambda image: image)
    operator, x = OPERATORS["area"], 5 * torch.randn(2, *IMAGE, dtype=F64, generator=generator(1))
    mask = torch.ones(2, 1, *IMAGE[1:], dtype=F64)
    mask[0, ..., :2] = 0
    one = truth(operator)
    given = {"autoencoder": codec, "consistency": consistency}
    model = gaussian(torch.zeros(1, *IMAGE, dtype=F64), 0.3)
    shared, each = (
        sample_cpigdm(model, x, SIGMAS, {"denoise_mask": mask}, measurement=Measurement(y, operator, 0.1), **given)
        for y in (one, one.expand(2, -1, -1, -1).contiguous())
    )
    assert torch.equal(shared, each)


def test_same_seed_same_result() -> None:
    operator, x = OPERATORS["area"], 5 * torch.randn(1, *IMAGE, dtype=F64, generator=generator(1))
    first, again, other = (run(truth(operator), operator, x, seed=s, eta=1.0) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_fresh_noise() -> None:
    """eta = 0 keeps the noise, 1 is the variance of DDPM, more is bounded by the noise there is; the sum of squares is kept."""
    s, t = torch.tensor([2.0, 1.2], dtype=F64)
    for eta, expected in ((0.0, 0.0), (1.0, 1.2 * 0.8), (1.2, 1.2 * 0.96), (1.25, 1.2), (7.0, 1.2)):
        down, up = ancestral_split(s, t, eta)
        assert float(up) == pytest.approx(expected, abs=1e-12)
        assert float(down**2 + up**2) == pytest.approx(1.44)


@pytest.mark.parametrize("eta", [0.0, 1.0, 2.0])
def test_samples_keep_the_variance_of_the_prior(eta: float) -> None:
    """With the deviation of x0 that the exact denoiser leaves out; without it fresh noise costs variance."""
    tau = 0.8
    keep = torch.zeros(1, 1, 6, 4)
    keep[..., 0, 0] = 1
    measurement = Measurement(torch.zeros(2000, *IMAGE, dtype=F64), Mask(keep), 0.0)
    start = (tau**2 + 25) ** 0.5 * torch.randn(2000, *IMAGE, dtype=F64, generator=generator(1))
    sigmas = torch.tensor([5.0, 3.0, 1.5, 0.7, 0.3], dtype=F64)

    def variance(**options: Any) -> float:
        options = {"weight": "bayes", "tau": tau, "eta": eta, **options}
        out = sample_cpigdm(gaussian(torch.zeros(IMAGE, dtype=F64), tau**2), start, sigmas, measurement=measurement, **options)
        return float(out[..., 1:, 1:].var())

    exact = tau**2 + 0.3**2
    assert variance(spread=1.0) == pytest.approx(exact, rel=0.03)
    assert variance() < (0.97 if eta == 0 else 0.8) * exact


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


@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_what_the_network_would_say_without_the_tilt(tau: float) -> None:
    """Exact for a Gaussian prior of that deviation."""
    mean, x, shift = (torch.randn(1, *IMAGE, dtype=F64, generator=generator(seed)) for seed in (4, 5, 6))
    model, sigma = gaussian(mean, tau**2), torch.tensor(1.5, dtype=F64)
    dual = Dual(ExactPixels(Measurement(x, Identity(IMAGE))), tau, 2.0)
    assert torch.equal(dual.untilted(x, sigma), x)
    dual.shift = shift
    tilted = model(dual.network_input(x, sigma), sigma.expand(1))
    assert float((tilted - model(x, sigma.expand(1))).abs().max()) > 0.1
    torch.testing.assert_close(dual.untilted(tilted, sigma), model(x, sigma.expand(1)))


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
        ({"reach": None}, "reach: got None, expected a number > 0"),
        ({"eta": math.inf}, "eta: got inf"),
        ({"spread": -0.1}, "spread: got -0.1, expected a finite number >= 0"),
        ({"spread": math.inf}, "spread: got inf"),
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
