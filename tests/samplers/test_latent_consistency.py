"""Steps towards A D(z) = y of any size: photos of many pixels, and of large values."""

import pytest
import torch
from torch import Tensor

from operators import AreaDownscale, Identity, Measurement
from operators.base import LinearOperator
from samplers.held import Reachable
from samplers.latent_consistency import LOOK_AHEAD, _ratio, closer, match_by_decoder, spread_of
from samplers.pixels import noise_norm


class Nearest:
    """Four channels to colours, as much as Stable Diffusion's latents have, each latent pixel 8 x 8 pixels of them."""

    COLOURS = torch.tensor([[0.35, 0.20, 0.21], [0.38, 0.29, 0.15], [-0.19, 0.19, 0.24], [-0.27, -0.30, -0.45]])

    def decode(self, z: Tensor) -> Tensor:
        colours = torch.einsum("bchw,cd->bdhw", z, self.COLOURS.to(z))
        return colours.repeat_interleave(8, -1).repeat_interleave(8, -2)


def moved(operator: LinearOperator, y: Tensor, z: Tensor, autoencoder: Nearest | None, steps: int) -> tuple[float, float]:
    """||A D(z) - y|| before and after."""
    measurement = Measurement(y, operator)
    z, before = match_by_decoder(z, measurement, autoencoder, steps, noise_norm(measurement))
    image = z if autoencoder is None else autoencoder.decode(z)
    return float(before), float(measurement.residual_norm(image))


@pytest.mark.parametrize("steps", [1, 2])
def test_a_photo_of_many_pixels(steps: int) -> None:
    """The gradient of a white one of 2048 x 2048 squares to 6e8; divided by 1e-30 for 0 that is no float32."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(1, 4, 256, 256, generator=g)
    y = torch.ones(1, 3, 2048, 2048)
    before, after = moved(Identity((3, 2048, 2048)), y, z, Nearest(), steps)
    assert after < 0.9 * before


def test_a_photo_of_large_values() -> None:
    operator = AreaDownscale((3, 64, 64), 8)
    y = 1e5 * torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    before, after = moved(operator, y, torch.zeros(1, 3, 64, 64), None, 3)
    assert after < before


def test_directions_begin_anew_where_the_quotient_is_beyond_float32() -> None:
    """The next numbers above 0 are no denominators."""
    a, b = torch.tensor([1.0, 1e-3, 3.0, 0.0]), torch.tensor([0.0, 1e-42, 2.0, 0.0])
    assert _ratio(a, b).tolist() == [0.0, 0.0, 1.5, 0.0]


def test_nothing_to_do() -> None:
    """A gradient of 0 throughout is 0 / 0 in the choice of directions."""
    z = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    operator = AreaDownscale((3, 64, 64), 8)
    before, after = moved(operator, operator.A(z), z, None, 3)
    assert after == before == 0


@pytest.mark.parametrize("apart", [0.0, 1.0])
def test_with_noise_a_prior_counts_too(apart: float) -> None:
    """Steps without end lead to the mean of z ~ N(mean, spread^2) given y; not to the best fit, which takes in noise."""
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(2, 4, 4, 4, generator=g, dtype=torch.float64)
    y = torch.randn(2, 3, 32, 32, generator=g, dtype=torch.float64)  # no latent comes near: the discrepancy principle stays out
    measurement, spread = Measurement(y, Identity((3, 32, 32)), 0.8), 0.1
    decoder = Nearest()
    colours = decoder.COLOURS.double()
    inner = 64 * colours @ colours.T + torch.eye(4, dtype=torch.float64) * (0.8 / spread) ** 2
    back = torch.einsum("bdhw,cd->bchw", 64 * torch.nn.functional.avg_pool2d(y - decoder.decode(mean), 8), colours)
    expected = mean + torch.einsum("ce,behw->bchw", torch.linalg.inv(inner), back)
    z = mean - apart * (expected - mean)
    out, _ = match_by_decoder(z, measurement, decoder, 40, noise_norm(measurement), (mean, spread))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)
    free, _ = match_by_decoder(z, measurement, decoder, 40, noise_norm(measurement))
    assert float((free - mean).norm()) > 2 * float((out - mean).norm())
    # Where half of the latent is held the other half ends where it would.
    half = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    half[..., :2] = False
    z = mean - apart * half.double() * (expected - mean)
    held, _ = match_by_decoder(z, measurement, decoder, 40, noise_norm(measurement), (mean, spread), free=half)
    assert torch.equal(held[..., :2], mean[..., :2])
    torch.testing.assert_close(held[..., 2:], expected[..., 2:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("apart", [0.2, 1.0, 3.0])
def test_a_start_within_the_noise_goes_back_to_the_prior_until_the_noise_ends(apart: float) -> None:
    """A tilted network may have gone too far towards y."""
    g = torch.Generator().manual_seed(0)
    decoder, mean = Nearest(), torch.randn(2, 4, 4, 4, generator=g, dtype=torch.float64)
    y = decoder.decode(mean + apart * torch.randn(mean.shape, generator=g, dtype=torch.float64))
    measurement = Measurement(y, Identity((3, 32, 32)), 0.3)
    goal = 0.3 * (3 * 32 * 32) ** 0.5
    start = mean + 0.95 * (y_latent(decoder, y, mean) - mean)
    assert float(measurement.residual_norm(decoder.decode(start)).max()) < 0.8 * goal
    out, _ = match_by_decoder(start, measurement, decoder, 40, noise_norm(measurement), (mean, 0.003))
    expected = measurement.residual_norm(decoder.decode(mean)).clamp(max=goal)
    torch.testing.assert_close(measurement.residual_norm(decoder.decode(out)), expected, rtol=0.01, atol=0)
    assert bool(((out - mean).flatten(1).norm(dim=1) < (start - mean).flatten(1).norm(dim=1)).all())


def test_what_agrees_better_than_the_noise_stays() -> None:
    """Sigma may be given too large: pushed away from y until the residual is that large, a good picture would be ruined."""
    g = torch.Generator().manual_seed(0)
    decoder, mean = Nearest(), torch.randn(2, 4, 4, 4, generator=g, dtype=torch.float64)
    y = decoder.decode(mean) + 0.1 * torch.randn(2, 3, 32, 32, generator=g, dtype=torch.float64)
    measurement = Measurement(y, Identity((3, 32, 32)), 0.3)
    out, _ = match_by_decoder(mean, measurement, decoder, 10, noise_norm(measurement), (mean, 0.2))
    assert torch.equal(out, mean)


def test_an_image_that_has_arrived_stays_whatever_the_others_do() -> None:
    g = torch.Generator().manual_seed(0)
    decoder, z = Nearest(), torch.randn(2, 4, 4, 4, generator=g, dtype=torch.float64)
    y = decoder.decode(
        z + torch.tensor([0.1, 3.0])[:, None, None, None] * torch.randn(z.shape, generator=g, dtype=torch.float64)
    )
    both = Measurement(y, Identity((3, 32, 32)), 0.3)
    together, _ = match_by_decoder(z, both, decoder, 12, 0.1 * noise_norm(both), (z, 1.0))
    for i in range(2):
        one = both.select(i)
        alone, _ = match_by_decoder(z[i : i + 1], one, decoder, 12, 0.1 * noise_norm(one), (z[i : i + 1], 1.0))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-12)
        residual = one.residual_norm(decoder.decode(alone))
        torch.testing.assert_close(residual, 0.1 * noise_norm(one), rtol=2e-3, atol=0)


def test_the_last_step_keeps_a_way_back_that_ends_on_the_noise() -> None:
    """And gives up what ends further away than both the noise and the start."""
    g = torch.Generator().manual_seed(0)
    decoder, z = Nearest(), torch.randn(3, 4, 4, 4, generator=g, dtype=torch.float64)
    measurement = Measurement(decoder.decode(z), Identity((3, 32, 32)), 0.3)
    goal = 0.3 * (3 * 32 * 32) ** 0.5
    away = torch.randn(z.shape, generator=g, dtype=torch.float64)
    unit = away / measurement.residual_norm(decoder.decode(z + away))[:, None, None, None]
    ended = z + unit * (goal * torch.tensor([0.9, 1.0005, 1.1]))[:, None, None, None]
    start = z + 0.1 * unit
    fit = measurement.residual_norm(decoder.decode(start))
    out = closer(ended, start, fit, measurement, decoder, noise_norm(measurement))
    assert torch.equal(out, torch.stack([ended[0], ended[1], start[2]]))


def y_latent(decoder: Nearest, y: Tensor, near: Tensor) -> Tensor:
    """The latent of y that is nearest to another one."""
    inverse = torch.linalg.pinv(decoder.COLOURS.double())
    missing = torch.nn.functional.avg_pool2d(y - decoder.decode(near), 8)
    return near + torch.einsum("bdhw,dc->bchw", missing, inverse)


def test_how_far_the_network_may_be_off() -> None:
    """As far as the noise lets it at first, and never less than a rest."""
    spreads = [spread_of(torch.tensor(sigma)) for sigma in (1e3, 1.0, 0.0)]
    assert spreads[0] == pytest.approx((1 + spreads[2] ** 2) ** 0.5, rel=1e-5)
    assert spreads[1] == pytest.approx((0.5 + spreads[2] ** 2) ** 0.5)
    assert spreads[2] == pytest.approx(0.2)
    assert spread_of(torch.tensor(2.0), tau=0.5) == pytest.approx((4 / 17 + 0.1**2) ** 0.5)
    assert spread_of(torch.tensor(2.0), tau=0.01) < 0.011
    assert spread_of(torch.tensor(2.0), tau=float("inf")) == pytest.approx((4 + 0.2**2) ** 0.5)


class Bent:
    """Colours through tanh, in any precision; keeps of each time that it decodes whether a graph is built."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.graphs = dtype, []

    def decode(self, z: Tensor) -> Tensor:
        self.graphs.append(torch.is_grad_enabled())
        return (2 * Nearest().decode(z)).tanh().to(self.dtype).to(z.dtype)


@pytest.mark.parametrize(
    ("dtype", "last", "graphs"),
    [
        (torch.float32, False, [True, True, True, True, False]),
        (torch.float32, True, [True, False, True, False, True, False, True, False]),
        (torch.bfloat16, False, [True, True, True, True, False]),
        (torch.bfloat16, True, [True, False, True, False, True, False, True, False]),
    ],
)
def test_decodes_once_for_each_step_and_in_the_last_twice(dtype: torch.dtype, last: bool, graphs: list[bool]) -> None:
    g = torch.Generator().manual_seed(0)
    y = 0.5 * torch.randn(2, 3, 32, 32, generator=g)  # out of reach
    measurement, decoder = Measurement(y, Identity((3, 32, 32))), Bent(dtype)
    z, fit = match_by_decoder(torch.randn(2, 4, 4, 4, generator=g), measurement, decoder, 4, torch.zeros(2), last=last)
    assert decoder.graphs == graphs
    assert fit.shape == (2,)
    assert not z.requires_grad


@pytest.mark.parametrize(("off", "seed"), [(0.5, 0), (0.5, 1), (1.0, 0), (1.0, 1), (1.5, 2)])
def test_each_image_ends_on_its_goal_whatever_the_others_do(off: float, seed: int) -> None:
    """What is interpolated is confirmed where z is, before it counts: as an end, and where no step seems to lead down.

    A step may land below the goal, for this decoder is far from linear.
    """
    g = torch.Generator().manual_seed(seed)
    decoder = Bent(torch.float64)
    truth = 0.3 * torch.randn(4, 4, 4, 4, generator=g, dtype=torch.float64)
    measurement = Measurement(decoder.decode(truth), Identity((3, 32, 32)))
    start = truth + off * torch.randn(4, 4, 4, 4, generator=g, dtype=torch.float64)
    goal = measurement.residual_norm(decoder.decode(start)) * torch.tensor([0.6, 0.3, 0.1, 0.05], dtype=torch.float64)
    z, _ = match_by_decoder(start, measurement, decoder, 60, goal)
    ratio = measurement.residual_norm(decoder.decode(z)) / goal
    assert ((ratio > 0.7) & (ratio < 1.001)).all(), ratio
    for i in range(4):
        alone = Measurement(measurement.y[i : i + 1], measurement.operator)
        torch.testing.assert_close(match_by_decoder(start[i : i + 1], alone, decoder, 60, goal[i : i + 1])[0], z[i : i + 1])


def test_a_look_ahead_in_a_small_hole_is_no_longer() -> None:
    """It is measured where the latent may move, or a decoder would be looked at far from where it is."""
    seen: list[Tensor] = []

    class Watched(Nearest):
        def decode(self, z: Tensor) -> Tensor:
            seen.append(z.detach())
            return super().decode(z)

    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(1, 4, 16, 16, generator=g), torch.randn(1, 3, 128, 128, generator=g)
    hole = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    hole[..., 3:5, 6:8] = True
    measurement = Reachable(Measurement(y, Identity((3, 128, 128)), 0.1), hole)
    match_by_decoder(z, measurement, Watched(), 2, noise_norm(measurement), free=hole)
    first = (seen[1] - seen[0])[:, :, 3:5, 6:8]
    assert float(first.square().mean().sqrt()) == pytest.approx(LOOK_AHEAD, rel=1e-4)


def test_only_what_the_free_part_reaches_counts() -> None:
    free = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    free[..., 1:3, 1:3] = True
    part = Reachable(Measurement(torch.ones(2, 3, 32, 32), Identity((3, 32, 32)), 0.5), free)
    expected = torch.zeros(2, 3, 32, 32)
    expected[..., 8:24, 8:24] = 1
    assert torch.equal(part.y, expected)
    assert torch.equal(part.A(torch.full((2, 3, 32, 32), 3.0)), 3 * expected)
    torch.testing.assert_close(noise_norm(part), torch.full((2,), 0.5 * (3 * 256) ** 0.5))
    blocks = Reachable(Measurement(torch.ones(1, 3, 2, 2), AreaDownscale((3, 32, 32), 16)), free)
    assert torch.equal(blocks.rows, torch.ones(1, 3, 2, 2))  # each has a quarter of it
