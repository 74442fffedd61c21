"""The level of white noise in a photo."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .images import CLIPPED, MAD, as_images

_BLOCK = 8


@dataclass(frozen=True, eq=False)
class NoiseEstimate:
    """Standard deviation of white noise, for each image, pooled over its channels.

    Attributes:
        sigma: (B,) in [-1, 1] units.
        low, high: (B,) an interval for sigma, about 95 %. Wide where texture and noise cannot be told apart; low may be 0.
    """

    sigma: Tensor
    low: Tensor
    high: Tensor


def estimate_noise_sigma(image: Tensor, seen: Tensor | None = None) -> NoiseEstimate:
    """White-noise level from the flattest 8 x 8 blocks, after Ponomarenko et al. (2007) and Donoho's MAD.

    In an orthonormal DCT white noise has the same sigma in every coefficient, independently. So the blocks with the least
    texture are chosen by their low frequencies, and sigma is median |coefficient| / 0.6745 of their highest ones, which the
    choice leaves unbiased. Blocks that are exactly constant (flat fills, JPEG) or that touch black or white (where noise is
    cut off) are left out. The interval is widened downwards by what the middle frequencies, and less flat blocks, show above
    the highest: that is texture. It reaches up to the middle frequencies: the noise may be coloured.

    What is measured is all the fine grain of the photo: noise added to it and noise that it had, sqrt(added^2 + own^2).

    Args:
        image: (B, C, H, W) in [-1, 1] units, 8-bit photos included; every channel counts the same.
        seen: of the same shape, 1 where the photo is a measurement: blocks that touch anything else are left out. None: everywhere.

    Raises:
        ValueError: fewer than 256 usable blocks (too small, clipped or saturated, or flat fills), a JPEG that has lost its fine
            noise, or not an image.
    """
    image = as_images("image", image)
    seen = torch.ones_like(image) if seen is None else as_images("seen", seen)
    if seen.shape != image.shape:
        raise ValueError(f"seen: got shape {tuple(seen.shape)}, expected that of the image, {tuple(image.shape)}")
    seen = seen > 0
    for x, where in zip(image, seen, strict=True):
        if _jpeg_ratio(x, where) < 0.45:
            raise ValueError(
                "image: has no fine noise left (JPEG compression, smoothing, or a drawn picture), so that no one sigma describes "
                "it. Give sigma by hand (0 for a clean picture), or take the photo as it came from the camera"
            )
    estimates = torch.tensor([white_noise(*pair) for pair in zip(image, seen, strict=True)], dtype=torch.float64)
    return NoiseEstimate(*estimates.to(torch.float32).unbind(1))


def white_noise(image: Tensor, seen: Tensor) -> tuple[float, float, float]:
    """(sigma, low, high) of one image (C, H, W), where `seen`, (C, H, W), is True."""
    c, h, w = image.shape
    needed, selected = 256, 128
    step = max(3, math.ceil(math.sqrt(c * h * w / 2e5)))  # odd at first, so that blocks fall across the grid of a JPEG
    if min(h, w) < _BLOCK or c * ((h - _BLOCK) // step + 1) * ((w - _BLOCK) // step + 1) < needed:
        raise ValueError(f"image: got {h} x {w} with {c} channels, too small to tell noise from texture; use at least 64 x 64")
    whole = seen.unfold(1, _BLOCK, step).unfold(2, _BLOCK, step).flatten(3).all(3).flatten()
    blocks = image.unfold(1, _BLOCK, step).unfold(2, _BLOCK, step).reshape(-1, _BLOCK, _BLOCK)[whole]
    total = len(blocks)
    if total < needed:
        raise ValueError(f"image: only {total} of its blocks have no lost pixel, {needed} are needed")
    varied = blocks.amax((1, 2)) > blocks.amin((1, 2))
    if int(varied.sum()) < total / 2:
        raise ValueError(
            f"image: {100 * (1 - float(varied.float().mean())):.0f} % of it is exactly constant, so it carries no noise that is"
            " the same everywhere (drawing, strong compression, or none). Give sigma by hand (0 for a clean picture)"
        )
    clipped = float((image[seen].abs() == 1).double().mean()) > 1e-3
    usable = varied & ~((blocks.abs() >= CLIPPED) & (blocks.abs() <= 1)).any(2).any(1) if clipped else varied
    blocks = blocks[usable]
    dct = _dct_matrix(_BLOCK)
    coefficients = dct @ blocks @ dct.T
    order = torch.arange(_BLOCK)[:, None] + torch.arange(_BLOCK)
    low_band, middle_band, top_band = (order >= 1) & (order <= 4), (order >= 5) & (order <= 8), order >= 10
    texture = coefficients[:, low_band].square().sum(1)
    distance = 1 - blocks.mean((1, 2)).abs()  # from black or white
    sigma = 0.0
    for _ in range(3 if clipped else 1):
        # Near black and white only the blocks whose noise happened not to be cut are left; they would read too low.
        inside = distance > 3 * sigma if clipped else torch.ones_like(distance, dtype=torch.bool)
        if int(inside.sum()) < needed:
            raise ValueError(
                f"image: only {int(inside.sum())} of {total} blocks are away from black and white, {needed} are needed; it is"
                " saturated (or too small), and noise is cut off there"
            )
        flattest = coefficients[inside][texture[inside].argsort()]
        count = max(round(0.03 * len(flattest)), selected)

        def mad(blocks: int, band: Tensor, flattest: Tensor = flattest) -> float:
            return float(flattest[:blocks, band].abs().median()) / MAD

        sigma = mad(count, top_band)
    middle, wider = mad(count, middle_band), mad(min(4 * count, len(flattest)), top_band)
    excess = max(middle**2 - sigma**2, wider**2 - sigma**2, 0.0)
    # Asymptotic error of a MAD; 0.4 is measured: blocks overlap, so they are fewer than they seem.
    error = 1.17 / math.sqrt(0.4 * count * int(top_band.sum()))
    low = math.sqrt(max(sigma**2 - 1.5 * excess, 0.0)) * (1 - 2 * error)
    return sigma, low, max(sigma, middle) * (1 + 2 * error)


def _jpeg_ratio(image: Tensor, seen: Tensor) -> float:
    """Size of the high frequencies in blocks on JPEG's grid over that in blocks half way between: 1 without compression.

    Of blocks without lost pixels; 1 where there are none.

    JPEG rounds them to zero on its own grid only; its seams have plenty. Seen: 0.9 to 1.4 with noise of 0.05 on any photo, below
    0.45 where quality 75 to 95 has taken the noise away.
    """
    grey, seen = image.mean(0), seen.all(0)
    dct = _dct_matrix(_BLOCK)
    high = torch.arange(_BLOCK)[:, None] + torch.arange(_BLOCK) >= 8

    def size(offset: int) -> float:
        blocks, whole = (
            plane[offset:, offset:].unfold(0, _BLOCK, _BLOCK).unfold(1, _BLOCK, _BLOCK).reshape(-1, _BLOCK, _BLOCK)
            for plane in (grey, seen)
        )
        blocks = blocks[whole.flatten(1).all(1)]
        return float((dct @ blocks @ dct.T)[:, high].abs().median()) if len(blocks) else math.nan

    if min(grey.shape) < 4 * _BLOCK:
        return 1.0
    on, between = size(0), size(4)
    return on / max(between, 1e-9) if between > 0 and on >= 0 else 1.0  # not a number is neither


def _dct_matrix(n: int) -> Tensor:
    """Orthonormal DCT-II, (n, n) float64."""
    i = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi * (2 * i + 1) * i[:, None] / (2 * n)) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix
