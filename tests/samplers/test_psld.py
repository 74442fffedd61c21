"""PSLD against the linear theory of its paper, and what every sampler here promises: per image, seeded, checked input."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.analytic import GaussianMixture
from torch import Tensor

from operators import AreaDownscale, Dense, Identity, Mask, Measurement
from prior import networks
from prior.draw import draw
from samplers import sample_psld
from samplers.psld import psld_residuals
from samplers.steps import noise_sampler, vjp

F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The theory (paper section 3.2; algorithms: x0 = S z0, S^T S = I, D = S, E = S^T, one reverse step) -------------------------


class Linear:
    """x0 = S z0 with orthonormal columns S, and an operator with A A^T = I. Latent (1, 1, 6), image (1, 1, 10)."""

    def __init__(self, seen: int, seed: int = 0) -> None:
        self.s = torch.linalg.qr(torch.randn(10, 6, dtype=F64, generator=generator(seed)))[0]
        self.a = torch.linalg.qr(torch.randn(10, seen, dtype=F64, generator=generator(seed + 1)))[0].T
        self.m = self.s.T @ self.a.T @ self.a @ self.s
        self.z0 = torch.randn(1, 1, 1, 6, dtype=F64, generator=generator(seed + 2))
        self.z1 = torch.randn(1, 1, 1, 6, dtype=F64, generator=generator(seed + 3))
        self.measurement = SimpleNamespace(y=self.A(self.decode(self.z0)), operator=self)

    def decode(self, z: Tensor) -> Tensor:
        return z @ self.s.T

    def encode(self, x: Tensor) -> Tensor:
        return x @ self.s

    def A(self, x: Tensor) -> Tensor:
        return x @ self.a.T

    def A_adjoint(self, y: Tensor) -> Tensor:
        return y @ self.a

    A_dagger = A_adjoint

    def step(self, eta: Any, gamma: Any, beta: float = 0.3, **options: Any) -> tuple[Tensor, float]:
        """One reverse step of z1 = sqrt(1 - beta) z0 + sqrt(beta) eps, whose denoiser is c z1, c = sqrt(1 - beta)."""
        c = (1 - beta) ** 0.5
        sigmas = torch.tensor([(beta / (1 - beta)) ** 0.5, 0.0], dtype=F64)
        z = sample_psld(
            lambda x, sigma: c**2 * x,
            self.z1 / c,
            sigmas,
            measurement=self.measurement,
            autoencoder=self,
            omega=eta,
            gamma=gamma,
            squared=True,
            **options,
        )
        return z, c


def dense(toy: Linear, seen: int) -> Dense:
    return Dense(toy.a, (1, 1, 10), (1, 1, seen))


C = (1 - 0.3) ** 0.5


@pytest.mark.parametrize("share", [1.0, 0.0, 0.35])
def test_matrix_steps_recover_z0_exactly(share: float) -> None:
    """(i) eta = M^-1 / 2c; (ii) gamma = M^-2 / 2c; (iii) any eta with gamma = (I / 2c - eta M) M^-2."""
    toy = Linear(seen=9)
    inverse = torch.linalg.inv(toy.m)
    eta = share * inverse / (2 * C)
    gamma = (torch.eye(6, dtype=F64) / (2 * C) - eta @ toy.m) @ inverse @ inverse
    z, _ = toy.step(eta, gamma)
    torch.testing.assert_close(z, toy.z0, rtol=0, atol=1e-10)


def test_error_after_one_step_is_the_formula() -> None:
    """z - z0 = (I - 2c (eta M + gamma M^2)) (c z1 - z0), here with scalar steps."""
    toy = Linear(seen=4)
    z, c = toy.step(0.3, 0.2)
    shrink = torch.eye(6, dtype=F64) - 2 * c * (0.3 * toy.m + 0.2 * toy.m @ toy.m)
    torch.testing.assert_close(z - toy.z0, (c * toy.z1 - toy.z0) @ shrink.T, rtol=0, atol=1e-10)


def test_scalar_steps_are_exact_only_where_m_is_a_multiple_of_the_identity() -> None:
    whole = Linear(seen=10)  # A orthogonal, hence M = I
    z, _ = whole.step(1 / (2 * C), 0.0)
    torch.testing.assert_close(z, whole.z0, rtol=0, atol=1e-10)
    part = Linear(seen=9)
    assert float((part.step(1 / (2 * C), 0.0)[0] - part.z0).norm()) > 0.01


def test_null_modes_keep_the_denoised_value() -> None:
    toy = Linear(seen=3)  # M has rank 3 of 6
    z, c = toy.step(torch.linalg.pinv(toy.m) / (2 * C), 0.0)
    values, vectors = torch.linalg.eigh(toy.m)
    null = vectors[:, values < 1e-9]
    assert null.shape[1] == 3
    torch.testing.assert_close(z @ null, c * toy.z1 @ null, rtol=0, atol=1e-10)
    torch.testing.assert_close(z @ toy.m, toy.z0 @ toy.m, rtol=0, atol=1e-10)


def test_goodness_term_has_no_gradient_where_the_autoencoder_is_perfect() -> None:
    """(v): with S^T S = I, E(D(z)) = z for every z. With another encoder the term moves z."""
    toy = Linear(seen=4)
    plain, _ = toy.step(0.3, 0.0)
    z, _ = toy.step(0.3, 0.7, glue="goodness")
    torch.testing.assert_close(z, plain, rtol=0, atol=1e-10)
    toy.encode = lambda x: 1.1 * x @ toy.s
    z, _ = toy.step(0.3, 0.7, glue="goodness")
    assert float((z - plain).norm()) > 1e-3


@pytest.mark.parametrize("glue", ["pinv", "adjoint", "goodness"])
def test_what_is_glued(glue: str) -> None:
    """Only with the pseudo-inverse does the glued picture meet y where A A^T is not I, here I / 16."""
    operator = AreaDownscale((3, 8, 8), 4)
    g = generator(4)
    z, y = torch.randn(2, 3, 8, 8, dtype=F64, generator=g), torch.randn(2, 3, 2, 2, dtype=F64, generator=g)
    encoded: list[Tensor] = []
    codec = SimpleNamespace(decode=lambda z: 0.5 * z, encode=lambda x: encoded.append(x) or 3 * x)
    fit, apart = psld_residuals(z, Measurement(y, operator), codec, glue)
    (glued,) = encoded
    moved = {"pinv": y - operator.A(0.5 * z), "adjoint": (y - operator.A(0.5 * z)) / 16, "goodness": torch.zeros_like(y)}[glue]
    torch.testing.assert_close(operator.A(glued) - operator.A(0.5 * z), moved)
    torch.testing.assert_close(glued - 0.5 * z, moved.repeat_interleave(4, 2).repeat_interleave(4, 3))
    torch.testing.assert_close(fit, (y - operator.A(0.5 * z)).flatten(1).norm(dim=1))
    torch.testing.assert_close(apart, (3 * glued - z).flatten(1).norm(dim=1))


# The line search ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.0, 0.1])
@pytest.mark.parametrize("seen", [3, 9])
def test_line_search_meets_the_measurement_as_far_as_its_noise(seen: int, sigma: float) -> None:
    toy = Linear(seen)
    noise = sigma * torch.randn(1, 1, 1, seen, dtype=F64, generator=generator(9))
    measurement = Measurement(toy.measurement.y + noise, dense(toy, seen), sigma)
    sigmas = torch.tensor([3.0, 1.0, 0.3, 0.0], dtype=F64)
    z = sample_psld(
        lambda x, sigma: x / (1 + sigma[:, None, None, None] ** 2),
        toy.z1 * 3,
        sigmas,
        measurement=measurement,
        autoencoder=toy,
        gamma=0.0,
        rule="line_search",
        last_steps=12,
    )
    rms = float(measurement.residual_norm(toy.decode(z))) / seen**0.5
    assert rms <= 1.001 * sigma + 1e-6


def test_line_search_step_is_polyaks_through_the_network() -> None:
    """The move d of z0 becomes J^T d ||d||^2 / ||J^T d||^2, here with J a multiple of the identity, so d / J itself."""
    x = torch.randn(1, 3, 6, 4, dtype=F64, generator=generator(1))
    y = torch.zeros(1, 3, 6, 4, dtype=F64)
    sigmas = torch.tensor([2.0, 1.5], dtype=F64)
    out = sample_psld(
        lambda x, sigma: 0.4 * x, x, sigmas, measurement=Measurement(y, Identity((3, 6, 4))), gamma=0.0, rule="line_search"
    )
    z0 = 0.4 * x
    torch.testing.assert_close(out, z0 + 0.75 * (x - z0) - z0 / 0.4, rtol=0, atol=1e-6)


def test_line_search_moves_no_further_than_the_noise_that_is_left() -> None:
    x = torch.randn(2, 3, 6, 4, dtype=F64, generator=generator(1))
    y = torch.ones(2, 3, 6, 4, dtype=F64)
    sigmas = torch.tensor([2.0, 1.5], dtype=F64)
    out = sample_psld(
        lambda x, sigma: 1e-3 * x, x, sigmas, measurement=Measurement(y, Identity((3, 6, 4))), gamma=0.0, rule="line_search"
    )
    free = 1e-3 * x + 0.75 * (x - 1e-3 * x)
    torch.testing.assert_close((out - free).flatten(1).norm(dim=1), torch.full((2,), 1.5 * 72**0.5, dtype=F64))


def test_twenty_calls_with_line_search_beat_twenty_of_the_paper() -> None:
    """On the demo prior, x8 super-resolution of held-out portraits: by 1 dB at least (measured: see benchmarks/results)."""
    unet, autoencoder = networks.load()
    truth = torch.stack([torch.from_numpy(np.array(draw(1_200_000 + i))) for i in range(2)]).movedim(3, 1).float() / 127.5 - 1
    operator = AreaDownscale((3, 128, 128), 8)
    measurement = Measurement(operator.A(truth), operator)
    sigmas = networks.noise_levels().float()[torch.linspace(999, 0, 20).round().long()]
    sigmas = torch.cat([sigmas, torch.zeros(1)])
    x = torch.randn(2, 4, 16, 16, generator=generator(5)) * sigmas[0]

    def psnr(**options: Any) -> float:
        z = sample_psld(partial(networks.denoise, unet), x, sigmas, measurement=measurement, autoencoder=autoencoder, **options)
        with torch.no_grad():
            error = ((autoencoder.decode(z).clamp(-1, 1) - truth) / 2).square().mean()
        return float(-10 * error.log10())

    assert psnr(rule="line_search", omega=0.8, gamma=0.0) > psnr(omega=1.0, gamma=0.1) + 1


# Per image, seeded --------------------------------------------------------------------------------------------------------


def prior(dim: int) -> GaussianMixture:
    g = generator(11)
    u = torch.linalg.qr(torch.randn(3, dim, 2, dtype=F64, generator=g))[0]
    return GaussianMixture(
        torch.full((3,), 1 / 3, dtype=F64), torch.randn(3, dim, dtype=F64, generator=g), torch.full((3,), 0.1, dtype=F64), u,
        torch.full((3, 2), 0.5, dtype=F64),
    )  # fmt: skip


SIGMAS = torch.tensor([5.0, 2.0, 0.7, 0.2, 0.0], dtype=F64)


def run(y: Tensor, operator: Any, x: Tensor, seed: int = 0, sigmas: Tensor = SIGMAS, **options: Any) -> Tensor:
    denoise = prior(x[0].numel()).denoise
    arguments = {"omega": 0.5, "gamma": 0.1, "eta": 0.5, **options}

    def model(x: Tensor, sigma: Tensor, seed: int) -> Tensor:
        return denoise(x, sigma)

    return sample_psld(model, x, sigmas, {"seed": seed}, measurement=Measurement(y, operator), **arguments)


# The line search differentiates numerically, which costs digits.
@pytest.mark.parametrize(("options", "atol"), [({}, 1e-12), ({"rule": "line_search", "gamma": 0.0}, 1e-9)])
@pytest.mark.parametrize("operator", [AreaDownscale((3, 6, 4), 2), Identity((3, 6, 4))])
def test_a_batch_equals_single_runs(operator: Any, options: dict[str, Any], atol: float) -> None:
    x = 5 * torch.randn(3, 3, 6, 4, dtype=F64, generator=generator(1))
    y = operator.A(torch.rand(3, 3, 6, 4, dtype=F64, generator=generator(2)) * 2 - 1)
    batch = run(y, operator, x, seed=4, **options)
    single = torch.cat([run(y[i : i + 1], operator, x[i : i + 1], seed=4 + i, **options) for i in range(3)])
    torch.testing.assert_close(batch, single, rtol=0, atol=atol)


def test_a_mask_for_each_image() -> None:
    keep = torch.rand(2, 1, 6, 4, generator=generator(3)) < 0.6
    x = 5 * torch.randn(2, 3, 6, 4, dtype=F64, generator=generator(1))
    truth = torch.rand(2, 3, 6, 4, dtype=F64, generator=generator(2)) * 2 - 1
    batch = run(Mask(keep).A(truth), Mask(keep), x)
    for i in range(2):
        mask = Mask(keep[i : i + 1])
        single = run(mask.A(truth[i : i + 1]), mask, x[i : i + 1], seed=i)
        torch.testing.assert_close(batch[i : i + 1], single, rtol=0, atol=1e-12)


def test_same_seed_same_result() -> None:
    x = 5 * torch.randn(1, 3, 6, 4, dtype=F64, generator=generator(1))
    y = torch.zeros(1, 3, 6, 4, dtype=F64)
    first, again, other = (run(y, Identity((3, 6, 4)), x, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_noise_is_standard_and_apart_from_the_start_noise() -> None:
    x = torch.zeros(4, 3, 32, 32)
    draw = noise_sampler(x, seed=7)
    noise = torch.stack([draw(), draw()])
    assert abs(float(noise.std()) - 1) < 0.02
    start = torch.randn(x.shape, generator=generator(7))
    for a in (*noise[0], *noise[1]):
        correlation = (start * a).mean((1, 2, 3)).abs()
        assert float(correlation.max()) < 0.1
    assert float((noise[0] * noise[1]).mean().abs()) < 0.05
    assert noise_sampler(x, seed=2**64 - 1)().isfinite().all()


def test_guidance_pulls_to_the_measurement() -> None:
    """Pixel DPS: with the weight up, the residual of the last picture falls well below the unguided one's."""
    operator = AreaDownscale((3, 6, 4), 2)
    x = 5 * torch.randn(1, 3, 6, 4, dtype=F64, generator=generator(1))
    y = operator.A(torch.rand(1, 3, 6, 4, dtype=F64, generator=generator(2)) * 2 - 1)
    free, guided = (run(y, operator, x, omega=w, gamma=0.0, eta=0.0) for w in (0.0, 5.0))
    measurement = Measurement(y, operator)
    assert float(measurement.residual_norm(guided)) < 0.5 * float(measurement.residual_norm(free))


def test_without_gluing_neither_encoder_nor_pseudo_inverse_is_called() -> None:
    """Latent DPS costs no encoder, and works where there is no pseudo-inverse."""

    class Decoder:
        def decode(self, z: Tensor) -> Tensor:
            return z

    operator = Identity((3, 6, 4))
    x = torch.randn(1, 3, 6, 4, dtype=F64, generator=generator(1))
    measurement = SimpleNamespace(y=torch.zeros_like(x), operator=SimpleNamespace(A=operator.A))
    out = sample_psld(prior(72).denoise, x, SIGMAS, measurement=measurement, autoencoder=Decoder(), gamma=0.0)
    assert torch.equal(
        out, sample_psld(prior(72).denoise, x, SIGMAS, measurement=Measurement(measurement.y, operator), gamma=0.0)
    )


def test_callback_gets_the_steps_and_the_residual() -> None:
    seen = []
    y = torch.zeros(2, 3, 6, 4, dtype=F64)
    run(y, Identity((3, 6, 4)), torch.randn(2, 3, 6, 4, dtype=F64, generator=generator(1)), callback=seen.append)
    assert [step["i"] for step in seen] == [0, 1, 2, 3]
    assert [float(step["sigma"]) for step in seen] == SIGMAS[:-1].tolist()
    for step in seen:
        assert not step["x"].requires_grad
        assert not step["denoised"].requires_grad
        torch.testing.assert_close(step["residual"], step["denoised"].flatten(1).norm(dim=1))


def test_input_is_not_changed() -> None:
    x = torch.randn(1, 3, 6, 4, dtype=F64, generator=generator(1))
    before = x.clone()
    run(torch.zeros(1, 3, 6, 4, dtype=F64), Identity((3, 6, 4)), x)
    assert torch.equal(x, before)
    assert not x.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"omega": -1.0}, "omega: got -1.0"),
        ({"gamma": float("nan")}, "gamma: got nan"),
        ({"eta": -0.5}, "eta: got -0.5"),
        ({"glue": "average"}, "glue: got 'average'"),
        ({"rule": "armijo"}, "rule: got 'armijo'"),
        ({"rule": "line_search"}, "omega, gamma: with rule .* gamma 0"),
        ({"inner_steps": 0}, "inner_steps: got 0"),
        ({"sigmas": torch.tensor([2.0, 0.0, 0.0])}, "sigmas: got .* expected a falling list"),
        ({"y": torch.zeros(3, 3, 6, 4)}, "x: got a batch of 1 for a measurement of 3"),
        ({"omega": torch.eye(3)}, r"omega: got a matrix \(3, 3\), expected \(72, 72\)"),
    ],
)
def test_bad_input_is_named(options: dict, message: str) -> None:
    x = torch.zeros(1, 3, 6, 4, dtype=F64)
    with pytest.raises(ValueError, match=message):
        run(options.pop("y", x), Identity((3, 6, 4)), x, **options)


# The vector-Jacobian product ------------------------------------------------------------------------------------------------


def test_vjp_survives_float16() -> None:
    """A cotangent of 1e-7, which a float16 network flushes to zero, comes back as precise as one of 1."""
    weight = torch.randn(64, 64, generator=generator(5)) / 8

    def network(x: Tensor) -> Tensor:
        return torch.tanh(x.half() @ weight.half()).float()

    x = torch.randn(3, 64, generator=generator(6), requires_grad=True)
    v = torch.randn(3, 64, generator=generator(7)) * torch.tensor([[1e-7], [1.0], [1e4]])
    exact = torch.autograd.grad(torch.tanh(x.double() @ weight.double()), x, v.double())[0]
    ours = vjp(network(x), x, v)
    error = (ours - exact).norm(dim=1) / exact.norm(dim=1)
    assert float(error.max()) < 5e-3
    plain = torch.autograd.grad(network(x), x, v)[0]
    assert float(((plain - exact).norm(dim=1) / exact.norm(dim=1)).max()) > 0.1


def test_float16_autoencoder_does_not_lose_the_gradient() -> None:
    """The norm's gradient at a pixel is 1e-3 / 64 here, and smaller by 1000 within the decoder: below all of float16."""

    def decoder(precision: torch.dtype) -> SimpleNamespace:
        def decode(z: Tensor) -> Tensor:
            inside = (1000 * z).to(precision)[..., :, None, :, None].expand(-1, -1, -1, 32, -1, 32)
            return inside.reshape(1, 3, 256, 256).to(z.dtype) / 1000

        return SimpleNamespace(decode=decode)

    operator = AreaDownscale((3, 256, 256), 8)
    measurement = Measurement(torch.rand(1, 3, 32, 32, dtype=F64, generator=generator(2)), operator)
    x = torch.randn(1, 3, 8, 8, dtype=F64, generator=generator(1))
    free, exact, half = (
        sample_psld(
            prior(192).denoise, x, SIGMAS[2:4], measurement=measurement, autoencoder=decoder(precision), omega=omega, gamma=0.0
        )
        for precision, omega in ((F64, 0.0), (F64, 1.0), (torch.float16, 1.0))
    )
    assert float((half - exact).norm() / (exact - free).norm()) < 0.01


def test_vjp_of_zero_is_zero() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    assert torch.equal(vjp(x * 3, x, torch.zeros(2, 4)), torch.zeros(2, 4))
