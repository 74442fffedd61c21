"""Calibration on real photographs with known degradations."""

import io
import math

import numpy
import pytest
import skimage.data
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, pad

from operators.calibration import (
    estimate_blur_from_edge,
    estimate_gaussian_blur,
    estimate_noise_sigma,
    estimate_stripe_mask,
)
from prior.draw import VALIDATION_SEED, draw

PHOTOS = ("camera", "astronaut", "coffee", "chelsea", "brick", "moon", "page", "rocket", "coins", "retina", "cell")
WERE_JPEG = ("page", "coins")  # with next to no noise of their own: refused until some is added
SIGMAS = (0.01, 0.02, 0.05, 0.1, 0.2)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def photo(name: str, size: int = 300) -> Tensor:
    """The middle of a photo of scikit-image, (1, C, <= size, <= size) in [-1, 1]."""
    picture = torch.from_numpy(getattr(skimage.data, name)()).double() / 127.5 - 1
    picture = picture[None] if picture.ndim == 2 else picture.permute(2, 0, 1)[:3]
    top, left = (max(n - size, 0) // 2 for n in picture.shape[1:])
    return picture[None, :, top : top + size, left : left + size]


def portrait(i: int) -> Tensor:
    """A picture of the demo, (1, 3, 128, 128) in [-1, 1]."""
    return torch.from_numpy(draw(VALIDATION_SEED + i)).permute(2, 0, 1)[None].double() / 127.5 - 1


def noisy(x: Tensor, sigma: float, seed: int = 0) -> Tensor:
    return x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


def as_8_bit(x: Tensor) -> Tensor:
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    reach = math.ceil(4 * sigma)
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=x.dtype) / sigma) ** 2)
    taps = taps / taps.sum()
    x = pad(x, (reach, reach, reach, reach), mode="replicate").transpose(0, 1)
    return conv2d(conv2d(x, taps[None, None, :, None]), taps[None, None, None, :]).transpose(0, 1)


def edge(angle: float, sigma: float, noise: float = 0.0, contrast: float = 1.0, size: int = 33) -> Tensor:
    """A half plane, area-sampled, then blurred: (1, 1, size, size)."""
    fine = 8
    n = size + 40
    t = (torch.arange(n * fine, dtype=torch.float64) + 0.5) / fine - n / 2
    side = t * math.cos(math.radians(angle)) + t[:, None] * math.sin(math.radians(angle)) + 0.3
    sharp = avg_pool2d((side > 0).double()[None, None], fine) - 0.5
    return noisy(contrast * gaussian_blur(sharp, sigma)[..., 20:-20, 20:-20], noise)


# Noise


@pytest.fixture(scope="module")
def noise_table() -> dict[tuple[str, float, bool], tuple[float, float, float, float]]:
    """(photo, sigma, clipped and rounded to 8 bits) -> (sigma, low, high, the photo's own grain by the same estimate)."""
    torch.set_num_threads(1)
    table = {}
    for name in PHOTOS:
        x = photo(name)
        own = 0.0 if name in WERE_JPEG else float(estimate_noise_sigma(x).sigma)
        for sigma in SIGMAS[name in WERE_JPEG :]:
            for eight_bit in (False, True) if sigma in (0.01, 0.05, 0.2) else (False,):
                y = noisy(x, sigma)
                e = estimate_noise_sigma(as_8_bit(y) if eight_bit else y)
                table[name, sigma, eight_bit] = (float(e.sigma), float(e.low), float(e.high), own)
    return table


@pytest.mark.parametrize(("sigma", "limit"), [(0.02, 0.12), (0.05, 0.06), (0.1, 0.06), (0.2, 0.06)])
def test_noise_of_photos_is_measured(noise_table: dict, sigma: float, limit: float) -> None:
    errors = {name: abs(noise_table[name, sigma, False][0] / sigma - 1) for name in PHOTOS}
    assert max(errors.values()) < limit, errors


@pytest.mark.parametrize("eight_bit", [False, True])
def test_noise_adds_to_the_grain_of_the_photo(noise_table: dict, eight_bit: bool) -> None:
    """At 0.01, hardly more than a level of 8 bits, the photo's own grain counts."""
    rounding = 2 / 255 / math.sqrt(12) if eight_bit else 0.0
    for name in set(PHOTOS) - set(WERE_JPEG):
        sigma, _, _, own = noise_table[name, 0.01, eight_bit]
        # Where flat parts are clipped it is not the same parts that are measured before and after.
        assert 0.9 * 0.01 < sigma < 1.15 * math.hypot(0.01, own, rounding), name


def test_noise_interval_covers_on_photos(noise_table: dict) -> None:
    """The truth is sigma, or with the photo's own grain: nobody knows that grain but by the same estimate."""
    inside = [
        low <= math.hypot(sigma, own, 0.0023 * eight_bit) and high >= sigma
        for (_, sigma, eight_bit), (_, low, high, own) in noise_table.items()
    ]
    strictly = [low <= sigma <= high for (_, sigma, _), (_, low, high, _) in noise_table.items()]
    assert sum(inside) >= 0.95 * len(inside)
    assert sum(strictly) >= 0.8 * len(strictly)


def test_noise_interval_is_narrow_on_photos(noise_table: dict) -> None:
    widths = sorted((high - low) / (2 * sigma) for (_, sigma, _), (_, low, high, _) in noise_table.items() if sigma >= 0.05)
    assert widths[len(widths) // 2] < 0.1


def test_noise_interval_covers_pure_noise() -> None:
    torch.set_num_threads(1)
    pictures = torch.cat([noisy(torch.zeros(1, 1, 96, 96, dtype=torch.float64), 0.1, seed) for seed in range(120)])
    e = estimate_noise_sigma(pictures)
    covered = ((e.low <= 0.1) & (e.high >= 0.1)).double().mean()
    assert covered >= 0.9
    assert abs(float(e.sigma.mean()) / 0.1 - 1) < 0.01


@pytest.mark.parametrize("name", ["grass", "gravel"])
def test_noise_says_when_texture_hides_it(name: str) -> None:
    """Nothing flat in them: the estimate is wrong, and the interval has to say so."""
    e = estimate_noise_sigma(noisy(photo(name), 0.01))
    assert float(e.low) < 0.01 < float(e.high)
    assert float(e.high) > 3 * float(e.low)


@pytest.mark.parametrize("name", ["camera", "astronaut", "brick"])
def test_noise_refuses_a_jpeg_that_lost_it(name: str) -> None:
    y = as_8_bit(noisy(photo(name, 256), 0.05))
    file = io.BytesIO()
    levels = ((y[0].permute(1, 2, 0).squeeze(-1) + 1) * 127.5).round().to(torch.uint8).numpy()
    Image.fromarray(levels).save(file, "JPEG", quality=75)
    decoded = torch.from_numpy(numpy.array(Image.open(file))).double() / 127.5 - 1
    decoded = decoded[None, None] if decoded.ndim == 2 else decoded.permute(2, 0, 1)[None]
    assert float(estimate_noise_sigma(y).sigma) == pytest.approx(0.05, rel=0.1)
    with pytest.raises(ValueError, match="JPEG"):
        estimate_noise_sigma(decoded)


def test_noise_is_per_image_and_pooled_over_channels() -> None:
    x = photo("chelsea", 192)
    batch = torch.cat([noisy(x, 0.05), noisy(x, 0.15)])
    e, singles = estimate_noise_sigma(batch), [estimate_noise_sigma(v[None]) for v in batch]
    assert torch.equal(e.sigma, torch.cat([s.sigma for s in singles]))
    assert torch.allclose(e.sigma, torch.tensor([0.05, 0.15]), rtol=0.1)
    assert torch.equal(e.sigma, estimate_noise_sigma(batch.flip(1)).sigma)


def test_noise_ignores_flat_fills_and_clipped_parts() -> None:
    y = noisy(photo("camera"), 0.1).clamp(-1, 1)
    y[..., :120, :] = 0.25  # a caption
    y[..., 300:, :] = noisy(torch.full_like(y[..., 300:, :], 1.0), 0.1).clamp(-1, 1)  # a burnt-out sky
    assert float(estimate_noise_sigma(y).sigma) == pytest.approx(0.1, rel=0.08)


def test_noise_is_not_read_too_low_next_to_white() -> None:
    ramp = torch.linspace(0.6, 1.1, 256, dtype=torch.float64).expand(1, 1, 256, 256)
    errors = [float(estimate_noise_sigma(noisy(ramp, 0.1, seed).clamp(-1, 1)).sigma) / 0.1 - 1 for seed in range(8)]
    assert abs(sum(errors) / len(errors)) < 0.03


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(1, 3, 20, 20), "too small"),
        (torch.zeros(1, 1, 128, 128), "constant"),
        (noisy(torch.ones(1, 1, 128, 128), 0.2).clamp(-1, 1), "saturated"),
        (noisy(torch.linspace(0.75, 1.1, 256).expand(1, 1, 256, 256), 0.1).clamp(-1, 1), "saturated"),  # would read 4 % low
        (torch.full((1, 1, 128, 128), torch.nan), "NaN"),
        (torch.zeros(1, 128, 128), "shape"),
        (torch.zeros(1, 1, 128, 128, dtype=torch.uint8), "uint8"),
    ],
)
def test_noise_refuses(image: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_noise_sigma(image)


# Stripes


def lines(n: int, period: int, width: int, offset: int) -> Tensor:
    return (torch.arange(n) - offset) % period < width


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("fill", [-1.0, 0.0, None])
@pytest.mark.parametrize("name", ["camera", "coffee", "chelsea", "hubble_deep_field"])
def test_stripes_are_found_to_the_line(name: str, fill: float | None, noise: float) -> None:
    x = photo(name, 200)
    _, _, h, w = x.shape
    cases = {
        ("horizontal", 8, 3, 0): (lines(h, 8, 3, 0), None),
        ("horizontal", 2, 1, 1): (lines(h, 2, 1, 1), None),
        ("horizontal", 9, 3, 8): (lines(h, 9, 3, 8), None),  # the first stripe is cut by the border
        ("vertical", 16, 4, 5): (None, lines(w, 16, 4, 5)),
        ("both", 9, 2, 4): (lines(h, 9, 2, 4), lines(w, 9, 2, 4)),
    }
    for case, (rows, columns) in cases.items():
        if fill is None and (case[0] != "horizontal" or name == "camera"):
            continue  # it may refuse there
        lost = torch.zeros(h, w, dtype=torch.bool)
        lost |= rows[:, None] if rows is not None else False
        lost |= columns if columns is not None else False
        filling = noisy(torch.zeros_like(x), 0.5, 1) if fill is None else torch.full_like(x, fill)
        e = estimate_stripe_mask(noisy(torch.where(lost, filling, x), noise).clamp(-1, 1))
        assert (e.orientation, e.period, e.width, e.offset) == case
        assert torch.equal(e.keep[0, 0] == 0, lost)
        assert e.lines == int(lost.all(1).sum() + lost.all(0).sum())
        assert e.margin > 2.5


def test_irregular_stripes_have_no_period() -> None:
    x = photo("astronaut", 256)
    lost = torch.rand(256, generator=torch.Generator().manual_seed(0)) < 0.15
    e = estimate_stripe_mask(torch.where(lost[:, None], -1.0, x))
    assert (e.period, e.width, e.offset) == (None, None, None)
    assert torch.equal(e.keep[0, 0].amax(1) == 0, lost)


@pytest.mark.parametrize("name", [*PHOTOS, "grass", "gravel", "hubble_deep_field", "text"])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_no_stripes_in_intact_photos(name: str, noise: float) -> None:
    with pytest.raises(ValueError, match="no clearly lost lines"):
        estimate_stripe_mask(noisy(photo(name, 224), noise).clamp(-1, 1))


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_a_drawn_stripe_is_no_defect(noise: float) -> None:
    """Shirts with a stripe across: it ends where the shirt does."""
    for i in range(12):
        with pytest.raises(ValueError, match="no clearly lost lines"):
            estimate_stripe_mask(noisy(portrait(i), noise).clamp(-1, 1))


def test_stripes_are_found_on_drawn_portraits() -> None:
    lost = lines(128, 9, 2, 4)
    for i in range(8):
        for fill in (-1.0, 0.0):
            e = estimate_stripe_mask(noisy(torch.where(lost[:, None], fill, portrait(i)), 0.02).clamp(-1, 1))
            assert torch.equal(e.keep[0, 0].amax(1) == 0, lost)


def test_bars_at_the_border_are_no_stripes() -> None:
    x = photo("camera", 256)
    x[..., :20, :] = x[..., -20:, :] = -1
    with pytest.raises(ValueError, match="no clearly lost lines"):
        estimate_stripe_mask(x)


def test_stripes_take_one_image() -> None:
    with pytest.raises(ValueError, match="expected \\(1, channels"):
        estimate_stripe_mask(torch.zeros(2, 1, 64, 64))


# Blur


@pytest.mark.parametrize("angle", [0.0, 6.0, 45.0, 100.0])
@pytest.mark.parametrize("sigma", [0.8, 1.0, 2.0, 4.0])
def test_blur_of_a_clean_edge(sigma: float, angle: float) -> None:
    e = estimate_blur_from_edge(edge(angle, sigma))
    assert e.sigma == pytest.approx(sigma, rel=0.03)
    assert e.low < sigma < e.high < 1.3 * e.low
    assert e.contrast == pytest.approx(1, rel=0.02)


def test_a_faint_narrow_edge_in_a_large_crop() -> None:
    """Of its hundreds of thousands of pixels few show the edge."""
    rows, columns = torch.meshgrid(torch.arange(600.0).double() - 299.5, torch.arange(600.0).double() - 299.5, indexing="ij")
    along = columns * math.cos(0.1) + rows * math.sin(0.1) - 150
    edge = 0.3 * (torch.special.ndtr(along / math.sqrt(0.8**2 + 1 / 12)) - 0.5)
    noise = 0.02 * torch.randn(600, 600, generator=torch.Generator().manual_seed(1))
    found = estimate_blur_from_edge((edge + noise)[None, None].expand(1, 3, -1, -1))
    assert found.low <= 0.8 <= found.high
    assert found.sigma == pytest.approx(0.8, abs=0.02)


def test_blur_of_a_noisy_edge_is_covered() -> None:
    covered = []
    for noise in (0.02, 0.1):
        for sigma in (0.7, 1.5, 3.0):
            for angle in (3.0, 20.0, 50.0, 95.0):
                e = estimate_blur_from_edge(edge(angle, sigma, noise))
                covered.append(e.low <= sigma <= e.high)
                assert e.sigma == pytest.approx(sigma, rel=0.04 + noise)
    assert sum(covered) >= 0.95 * len(covered)


@pytest.mark.parametrize("sigma", [1.0, 2.0, 3.0])
def test_blur_of_edges_in_a_photo(sigma: float) -> None:
    """Crops around straight edges; the truth adds what the edge measures before it is blurred (0 if too sharp to tell)."""
    x = photo("camera", 512)
    for row, column, own in ((90, 170, 0.78), (126, 112, 0.3), (304, 264, 0.3)):
        crop = gaussian_blur(x, sigma)[..., row - 12 : row + 13, column - 12 : column + 13]
        e = estimate_blur_from_edge(crop)
        truth = math.hypot(sigma, own)
        assert e.sigma == pytest.approx(truth, rel=0.15)
        assert e.low <= truth <= e.high


def test_an_edge_between_two_colours_of_equal_grey() -> None:
    y = edge(10, 1.5)
    assert estimate_blur_from_edge(torch.cat([y, -y, 0 * y], 1)).sigma == pytest.approx(1.5, rel=0.03)


@pytest.mark.parametrize(
    ("crop", "message"),
    [
        (torch.zeros(1, 1, 6, 20), "at least 8 x 8"),
        (noisy(torch.zeros(1, 1, 24, 24), 0.1), "no clear straight edge"),
        (torch.zeros(1, 1, 24, 24), "no clear straight edge"),
        (edge(10, 1.0) * edge(100, 1.0) * 2, "no clear straight edge"),
        ((2.5 * edge(10, 1.0)).clamp(-1, 1), "black or white"),
        (edge(10, 5.0, size=15), "2 sigma"),
        (edge(10, 0.2), "sharp"),
        (torch.zeros(2, 1, 24, 24), "shape"),
    ],
)
def test_edge_refuses(crop: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_blur_from_edge(crop)


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_blind_blur_keeps_its_promise(noise: float) -> None:
    """To a factor 1.5 wherever it answers; and without noise it answers on most photos from 2 pixels on."""
    answers = 0
    photos = [photo(name, 256) for name in PHOTOS if name != "cell"]  # a micrograph, out of focus by 2.7 pixels as it is
    for sigma in (1.5, 2.0, 3.0):
        for x in photos:
            try:
                e = estimate_gaussian_blur(noisy(gaussian_blur(x, sigma), noise))
            except ValueError:
                continue
            answers += sigma >= 2
            assert e.low <= sigma <= e.high
    assert noise > 0 or answers >= 0.8 * 2 * len(photos)


@pytest.mark.parametrize("name", ["camera", "astronaut", "coffee", "chelsea", "brick", "page", "rocket", "coins", "grass"])
def test_blind_blur_refuses_sharp_photos(name: str) -> None:
    with pytest.raises(ValueError, match="sharp"):
        estimate_gaussian_blur(photo(name))


def test_blind_blur_refuses_noise() -> None:
    with pytest.raises(ValueError, match="noise"):
        estimate_gaussian_blur(noisy(gaussian_blur(photo("grass"), 3.0), 0.2))


def test_blind_blur_reads_the_noise_of_a_grey_photo_from_its_three_equal_channels() -> None:
    grey = noisy(gaussian_blur(photo("camera", 256), 2.0), 0.05).mean(1, keepdim=True)
    for image in (grey, grey.expand(-1, 3, -1, -1)):
        with pytest.raises(ValueError, match=r"noise \(0\.0[3-9]"):
            estimate_gaussian_blur(image)


@pytest.mark.parametrize("side", [64, 256])
def test_blind_blur_refuses_a_ramp(side: int) -> None:
    ramp = torch.linspace(-0.9, 0.9, side).expand(1, 3, side, side)
    with pytest.raises(ValueError, match=r"no edges|constant"):
        estimate_gaussian_blur(ramp)


def test_inputs_are_not_changed() -> None:
    x = photo("camera", 128)
    inputs = {
        estimate_noise_sigma: noisy(x, 0.1).clamp(-1, 1),
        estimate_stripe_mask: torch.where(lines(128, 8, 2, 1)[:, None], -1.0, x),
        estimate_gaussian_blur: gaussian_blur(x, 3.0),
        estimate_blur_from_edge: edge(5, 1.0),
    }
    for estimate, y in inputs.items():
        before = y.clone()
        estimate(y)
        assert torch.equal(y, before), estimate
