"""C-PiGDM through an autoencoder: a toy one, by how near its pictures come to the measurement, and that of the demo prior."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.analytic import gaussian
from support.mixture import karras
from torch import Tensor

from operators import AreaDownscale, Measurement
from prior import networks
from prior.draw import draw
from samplers import fill_unseen, sample_cpigdm, sample_psld
from samplers.latent_consistency import match_by_decoder, spread_of

F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# A toy autoencoder -----------------------------------------------------------------------------------------------------------


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
    model = options.pop("model", gaussian(torch.zeros(1, 1, 4, 4, dtype=F64), 1.0))
    out = sample_cpigdm(model, start, karras(calls, 10.0), {"seed": first}, measurement=measurement, autoencoder=toy, **options)
    return SimpleNamespace(z=out, residual=measurement.residual_norm(toy.decode(out)), entries=16)


@pytest.mark.parametrize("bent", [False, True])
@pytest.mark.parametrize("options", [{}, {"weight": "bayes"}], ids=str)
@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3])
def test_final_residual_is_that_of_the_noise(bent: bool, options: dict[str, Any], noise: float) -> None:
    """The discrepancy principle: within 0.9 to 1.1 sigma sqrt(m). Without fresh noise, which lets 16 values vary by more."""
    out = latent_run(Toy(bent), noise, last_steps=30, eta=0.0, stop=0.92, **options)
    ratio = out.residual / (noise * out.entries**0.5)
    assert ((ratio > 0.9) & (ratio < 1.1)).all(), ratio


@pytest.mark.parametrize("bent", [False, True])
@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3])
def test_no_sample_is_further_from_the_photo_than_the_noise(bent: bool, noise: float) -> None:
    """As shipped, samples of 16 values may be nearer to the photo than the noise: down to 0.6 with the stop, to 0.3 without it."""
    for stop, least in ((0.92, 0.6), (0.0, 0.3)):
        out = latent_run(Toy(bent), noise, last_steps=30, stop=stop)
        ratio = out.residual / (noise * out.entries**0.5)
        assert ((ratio > least) & (ratio < 1.1)).all(), (stop, ratio)


@pytest.mark.parametrize(("options", "tilted"), [({}, True), ({"weight": "bayes"}, False)], ids=str)
def test_steps_through_the_decoder_stay_near_what_the_network_says_without_the_tilt(
    options: dict[str, Any], tilted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the mean of the prior, of deviation tau, given x: what earlier steps learnt of y is not counted again."""
    seen, tau = [], 0.5
    model = gaussian(torch.zeros(1, 1, 4, 4, dtype=F64), tau**2)

    def spy(z: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        seen.append((z, *arguments[-2]))
        return match_by_decoder(z, *arguments, **named)

    monkeypatch.setattr("samplers.spaces.match_by_decoder", spy)
    states: list[dict[str, Any]] = []
    latent_run(Toy(False), 0.1, model=model, tau=tau, reach=10.0, callback=states.append, **options)
    assert len(seen) == len(states) == 10
    for (start, mean, spread), state in zip(seen, states, strict=True):
        sigma = state["sigma"]
        torch.testing.assert_close(mean, model(state["x"], sigma))
        assert spread == pytest.approx(spread_of(sigma, tau))
        assert torch.equal(start, state["denoised"])
    assert any(float((start - mean).abs().max()) > 0.01 for start, mean, _ in seen) == tilted


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_one_consistency_step_while_x_is_mostly_noise(tau: float, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, goals = [], []

    def spy(
        z: Tensor, measurement: Any, autoencoder: Any, steps: int, goal: Tensor, *others: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        counts.append(steps)
        goals.append(goal / (0.1 * 16**0.5))  # over the noise
        return match_by_decoder(z, measurement, autoencoder, steps, goal, *others, **named)

    monkeypatch.setattr("samplers.spaces.match_by_decoder", spy)
    latent_run(Toy(False), 0.1, tau=tau, inner_steps=3, last_steps=7, stop=0.8)
    assert counts == [1 if sigma > 4 * tau else 3 for sigma in karras(10, 10.0)[:-2].tolist()] + [7]
    assert {1, 3} < set(counts)
    expected = torch.full((10, 4), 0.8, dtype=F64)  # a mean may lie nearer to y than a sample
    expected[-1] = 1
    torch.testing.assert_close(torch.stack(goals).to(F64), expected)


def test_the_weight_of_the_paper_has_no_use_for_tau() -> None:
    plain, given = (latent_run(Toy(True), 0.3, weight="paper", **options).z for options in ({}, {"tau": 0.2}))
    assert torch.equal(plain, given)


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


def rounding(network: torch.nn.Module, precision: torch.dtype) -> torch.nn.Module:
    """The network with the rounding of a precision, of its weights and of what each layer gives.

    In float32: sums are of float32 in bfloat16 networks, too, which processors that do not multiply it take minutes for.
    """
    for parameter in network.parameters():
        parameter.data = parameter.data.to(precision).float()
    for layer in network.modules():
        if not list(layer.children()):
            layer.register_forward_hook(lambda _layer, _given, out: out.to(precision).float())
    return network


class Photo:
    """Held-out portraits made smaller, with noise, and the demo prior's networks with the rounding of any precision."""

    def __init__(self, precision: torch.dtype, factor: int = 4, count: int = 1) -> None:
        unet, autoencoder = networks.load()
        self.unet, self.autoencoder, self.dtype = rounding(unet, precision), rounding(autoencoder, precision), precision
        drawn = np.stack([draw(1_200_000 + i) for i in range(count)])
        self.truth = torch.from_numpy(drawn).movedim(3, 1).float() / 127.5 - 1
        operator = AreaDownscale((3, 128, 128), factor)
        y = operator.A(self.truth)
        self.measurement = Measurement(y + 0.04 * torch.randn(y.shape, generator=generator(1)), operator, 0.04)

    def decode(self, z: Tensor) -> Tensor:
        return self.autoencoder.decode(z.to(self.dtype).float())

    def model(self, x: Tensor, sigma: Tensor, seed: int) -> Tensor:
        """As a host does it: x in float32, the network in its precision."""
        level = sigma.reshape(-1, 1, 1, 1)
        t = (sigma[:, None].log() - networks.noise_levels().float().log()).abs().argmin(1)
        return x - level * self.unet((x / (1 + level**2).sqrt()).to(self.dtype).float(), t)

    def restore(self, solve: Callable[..., Tensor], calls: int, **options: Any) -> tuple[list[float], float]:
        """PSNR in dB, and ||A x - y|| / (sigma sqrt(m)), the largest."""
        sigmas = networks.noise_levels().float()[torch.linspace(999, 0, calls).round().long()]
        x = torch.randn(len(self.truth), 4, 16, 16, generator=generator(5)) * sigmas[0]
        sigmas = torch.cat([sigmas, torch.zeros(1)])
        z = solve(self.model, x, sigmas, {"seed": 0}, measurement=self.measurement, autoencoder=self, **options)
        with torch.no_grad():
            image = self.decode(z)
        error = ((image.clamp(-1, 1) - self.truth) / 2).square().mean((1, 2, 3))
        residual = self.measurement.residual_norm(image) / (0.04 * self.measurement.y[0].numel() ** 0.5)
        return (-10 * error.log10()).tolist(), float(residual.max())


@pytest.mark.parametrize(
    ("solve", "calls", "options"),
    [
        (sample_cpigdm, 4, {"last_steps": 4}),
        (sample_psld, 6, {"rule": "line_search", "gamma": 0.0, "omega": 0.8, "last_steps": 4}),
    ],
)
def test_bfloat16_networks_give_pictures_as_good(solve: Callable[..., Tensor], calls: int, options: dict[str, Any]) -> None:
    """x4, eight portraits: the line search's finite difference is above the decoder's rounding, which would cost decibels.

    The mean within 1 dB: two runs that differ by any rounding draw other details, which moves single portraits by .8 dB here and by
    up to 3.6 on x2. float16 has three bits more.
    """
    exact, low = (Photo(precision, 4, 8).restore(solve, calls, **options)[0] for precision in (torch.float32, torch.bfloat16))
    assert abs(np.mean(low) - np.mean(exact)) < 1


@pytest.mark.parametrize(
    ("steps", "last", "bounds"), [(1, False, (0.96, 1.0)), (4, False, (0.985, 1.015)), (10, True, (0.985, 1.015))]
)
def test_bfloat16_networks_come_as_near_to_the_photo(steps: int, last: bool, bounds: tuple[float, float]) -> None:
    """x2, four portraits, the decoder in bfloat16: its finite differences are above the rounding.

    That makes a single step's longer, which ends 1 to 3 % nearer; with those of float32 it is up to 1 % further, with a fifth of
    them up to 14 %.
    """
    exact, low = Photo(torch.float32, 2, 4), Photo(torch.bfloat16, 2, 4)
    with torch.no_grad():
        z = exact.autoencoder.encode(exact.truth) + 0.3 * torch.randn(4, 4, 16, 16, generator=generator(3))
    residuals = []
    for photo in (exact, low):
        out, _ = match_by_decoder(z, exact.measurement, photo, steps, torch.zeros(4), (z, 0.3), last)
        with torch.no_grad():
            residuals.append(exact.measurement.residual_norm(exact.decode(out)))
    ratio = residuals[1] / residuals[0]
    assert ((ratio > bounds[0]) & (ratio < bounds[1])).all(), ratio


def test_a_sigma_that_is_given_too_large_costs_little() -> None:
    """x4, said to be five times as noisy as it is: 2.6 dB below a run that knows better (measured), and above one that stops at that noise."""
    photo = Photo(torch.float32)
    (known,), _ = photo.restore(sample_cpigdm, 6)
    photo.measurement = Measurement(photo.measurement.y, photo.measurement.operator, 0.2)
    (overstated,), _ = photo.restore(sample_cpigdm, 6)
    (stopped,), _ = photo.restore(sample_cpigdm, 6, stop=0.92)
    assert overstated > stopped + 1
    assert overstated > known - 3


def test_five_calls_beat_twenty_of_psld() -> None:
    """x8 super-resolution: nearer to the truth than the paper's rule, and not further from the photo than its noise."""
    photo = Photo(torch.float32, factor=8)
    (psnr,), residual = photo.restore(sample_cpigdm, 5)
    assert residual < 1.1
    assert 0.9 < photo.restore(sample_cpigdm, 5, stop=0.92)[1] < 1.1
    assert psnr > photo.restore(sample_psld, 20, gamma=0.0)[0][0] + 1
