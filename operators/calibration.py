"""Measure the degradation on the photo itself: noise level, lost lines, and the width of a Gaussian blur.

Every function takes images (B, C, H, W) in [-1, 1] units and returns its estimate with an interval, or raises ValueError
saying why this photo does not tell.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

_MAD = 0.6744897501960817  # median |n| of a standard normal
_CLIPPED = 1 - 1 / 255  # at least this far from grey, a pixel of an 8-bit photo is black or white
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


@dataclass(frozen=True, eq=False)
class StripeEstimate:
    """Lost lines of one image.

    Attributes:
        keep: (1, 1, H, W) float, 1 = observed, as `Mask` takes it.
        orientation: "horizontal" (rows are lost), "vertical" (columns are lost) or "both".
        period, width, offset: lines `offset + k * period ... + width - 1` are lost, in pixels; None when the lines are not
            periodic. For "both" they describe the rows, and must describe the columns too or else are None.
        lines: how many rows and columns are lost, together.
        doubtful: how many further lines look half lost; 0 when the mask is clear cut.
    """

    keep: Tensor
    orientation: str
    period: int | None
    width: int | None
    offset: int | None
    lines: int
    doubtful: int


@dataclass(frozen=True)
class BlurEstimate:
    """Standard deviation of a Gaussian blur, in pixels.

    Attributes:
        sigma: the estimate.
        low, high: an interval for it, about 95 %.
        contrast: height of the edge (of the typical edge, when there are many), in [-1, 1] units.
    """

    sigma: float
    low: float
    high: float
    contrast: float


# Noise ----------------------------------------------------------------------------------------------------------------


def estimate_noise_sigma(image: Tensor) -> NoiseEstimate:
    """White-noise level from the flattest 8 x 8 blocks, after Ponomarenko et al. (2007) and Donoho's MAD.

    In an orthonormal DCT white noise has the same sigma in every coefficient, independently. So the blocks with the least
    texture are chosen by their low frequencies, and sigma is median |coefficient| / 0.6745 of their highest ones, which the
    choice leaves unbiased. Blocks that are exactly constant (flat fills, JPEG) or that touch black or white (where noise is
    cut off) are left out. The interval is widened downwards by what the middle frequencies, and less flat blocks, show above
    the highest: that is texture. It reaches up to the middle frequencies: the noise may be coloured.

    What is measured is all the fine grain of the photo: noise added to it and noise that it had, sqrt(added^2 + own^2).

    Args:
        image: (B, C, H, W) in [-1, 1] units, 8-bit photos included; every channel counts the same.

    Raises:
        ValueError: fewer than 256 usable blocks (too small, clipped or saturated, or flat fills), or not an image.
    """
    image = _as_images("image", image)
    estimates = torch.tensor([_noise(x) for x in image], dtype=torch.float64)
    return NoiseEstimate(*estimates.to(torch.float32).unbind(1))


def _noise(image: Tensor) -> tuple[float, float, float]:
    """(sigma, low, high) of one image (C, H, W)."""
    c, h, w = image.shape
    needed, selected = 256, 128
    step = max(3, math.ceil(math.sqrt(c * h * w / 2e5)))  # odd at first, so that blocks fall across the grid of a JPEG
    if min(h, w) < _BLOCK or c * ((h - _BLOCK) // step + 1) * ((w - _BLOCK) // step + 1) < needed:
        raise ValueError(f"image: got {h} x {w} with {c} channels, too small to tell noise from texture; use at least 64 x 64")
    blocks = image[:, None].unfold(2, _BLOCK, step).unfold(3, _BLOCK, step).reshape(-1, _BLOCK, _BLOCK)
    total = len(blocks)
    varied = blocks.amax((1, 2)) > blocks.amin((1, 2))
    if int(varied.sum()) < total / 2:
        raise ValueError(
            f"image: {100 * (1 - float(varied.float().mean())):.0f} % of it is exactly constant, so it carries no noise that is"
            " the same everywhere (drawing, strong compression, or sigma = 0)"
        )
    clipped = float((image.abs() == 1).double().mean()) > 1e-3
    usable = varied & ~((blocks.abs() >= _CLIPPED) & (blocks.abs() <= 1)).any(2).any(1) if clipped else varied
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
            return float(flattest[:blocks, band].abs().median()) / _MAD

        sigma = mad(count, top_band)
    middle, wider = mad(count, middle_band), mad(min(4 * count, len(flattest)), top_band)
    excess = max(middle**2 - sigma**2, wider**2 - sigma**2, 0.0)
    # Asymptotic error of a MAD; 0.4 is measured: blocks overlap, so they are fewer than they seem.
    error = 1.17 / math.sqrt(0.4 * count * int(top_band.sum()))
    low = math.sqrt(max(sigma**2 - 1.5 * excess, 0.0)) * (1 - 2 * error)
    return sigma, low, max(sigma, middle) * (1 + 2 * error)


def _dct_matrix(n: int) -> Tensor:
    """Orthonormal DCT-II, (n, n) float64."""
    i = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi * (2 * i + 1) * i[:, None] / (2 * n)) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix


# Stripes --------------------------------------------------------------------------------------------------------------


def estimate_stripe_mask(image: Tensor) -> StripeEstimate:
    """Find lost rows or columns: lines that are constant (dead) or that have nothing in common with their neighbours.

    A run of lines is lost when (1) each is far flatter than the lines around it, or uncorrelated with all of them, and (2) it
    is entered and left by a jump all along the line, several times what neighbouring good lines differ by. (2) keeps skies and
    other flat bands of the scene. The period is the one that explains every lost line with a single width.

    Args:
        image: (1, C, H, W) in [-1, 1] units.

    Raises:
        ValueError: no lost lines, or more than one image.
    """
    image = _as_images("image", image, one=True)[0]
    rows, doubtful_rows = _lost_lines(image)
    columns, doubtful_columns = _lost_lines(image.transpose(1, 2))
    if not (rows.any() or columns.any()):
        raise ValueError("image: no lost lines found; draw the mask by hand, or give period, width and offset")
    keep = (~rows[:, None] & ~columns).to(torch.float32)[None, None]
    if not keep.any():
        raise ValueError("image: every line looks lost; it is flat or pure noise")
    patterns = [_period(lost) for lost in (rows, columns) if lost.any()]
    period, width, offset = patterns[0] if patterns[0] == patterns[-1] else (None, None, None)
    orientation = "both" if len(patterns) == 2 else "horizontal" if rows.any() else "vertical"
    lines, doubtful = int(rows.sum() + columns.sum()), doubtful_rows + doubtful_columns
    return StripeEstimate(keep, orientation, period, width, offset, lines, doubtful)


def _lost_lines(image: Tensor) -> tuple[Tensor, int]:
    """Which rows of (C, H, W) are lost, (H,) bool, and how many more are in doubt."""
    raise NotImplementedError


def _period(lost: Tensor) -> tuple[int | None, int | None, int | None]:
    """(period, width, offset) if the lost lines are exactly periodic with at least two full stripes, else Nones."""
    n = len(lost)
    line = torch.arange(n)
    edges = torch.nonzero(lost[1:] & ~lost[:-1]).flatten() + 1
    starts = ([0] if lost[0] else []) + edges.tolist()
    if len(starts) >= 2:
        period = starts[-1] - starts[-2]  # both starts may be trusted: a stripe cut by the border is the first one
        width = int(lost[starts[-2] : starts[-1]].sum())
        offset = starts[-1] % period
        if bool((((line - offset) % period < width) == lost).all()):
            return period, width, offset
    return None, None, None


# Blur -----------------------------------------------------------------------------------------------------------------


def estimate_blur_from_edge(crop: Tensor) -> BlurEstimate:
    """Gaussian blur from a crop around one straight edge between two even areas, by fitting its edge spread function.

    The model a + b Phi((x cos t + y sin t - c) / s) + plane is fitted to all pixels by least squares (Levenberg-Marquardt).
    A slanted edge is best, since it samples the profile between pixels. The variance 1/12 of a pixel's own aperture, which a
    sharp picture has too, is taken off: sigma^2 = s^2 - 1/12.

    Args:
        crop: (1, C, H, W) in [-1, 1] units, at least 8 x 8.

    Raises:
        ValueError: no edge, not one straight edge, an edge that is clipped or wider than the crop, or one that is sharp.
    """
    raise NotImplementedError


def estimate_gaussian_blur(image: Tensor) -> BlurEstimate:
    raise NotImplementedError


def _as_images(name: str, image: Tensor, one: bool = False) -> Tensor:
    """Check a batch of images and return it in float64 on the CPU, detached."""
    if not isinstance(image, Tensor) or not image.is_floating_point():
        kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"{name}: got {kind}, expected a floating-point tensor")
    if image.ndim != 4 or 0 in image.shape or (one and len(image) != 1):
        raise ValueError(f"{name}: got shape {tuple(image.shape)}, expected ({1 if one else 'batch'}, channels, height, width)")
    image = image.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(image).all()):
        raise ValueError(f"{name}: has NaN or infinite values")
    return image
