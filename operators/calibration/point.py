"""The blur's kernel, from one point of light."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d

from .images import CLIPPED, LEVEL, MAD, as_images

# Pixels a side of a square: far above any blur, and a whole photo with a bright sky would be searched for minutes.
LARGEST = 1024


@dataclass(frozen=True, eq=False)
class PointEstimate:
    """A blur kernel as it was seen.

    Attributes:
        kernel: (h, w) float64 with odd sizes, sum 1, >= 0; its centroid within half a pixel of the centre.
        error: standard error of every tap, from the noise and unevenness around the point.
        relative_error: ||error|| / ||kernel|| over all taps.
        contrast: height of the brightest tap above the background, in [-1, 1] units; negative for a dark speck.
    """

    kernel: Tensor
    error: float
    relative_error: float
    contrast: float


def estimate_blur_from_point(crop: Tensor) -> PointEstimate:
    """Any blur's kernel from a crop around one point that should be sharp: a star, a lamp far away, a reflection, a speck of dust.

    What a blurred photo shows of a point is the kernel itself, on a background. The background is a plane fitted to a frame of
    a tenth of the crop (by iterated least squares without outliers). The kernel is what stands out from all that is in the frame:
    the connected region around the brightest pixel, and a rim of two pixels. A point between two pixels, or one wider than a
    pixel, adds its own width to the kernel. On photographs with noise up to 0.02 the kernels of `tests/operators/test_point.py` come
    back to 1 % (disks) to 17 % (lines a pixel wide) of their norm.

    Args:
        crop: (1, C, H, W) in [-1, 1] units, at least 11 x 11, at most as many pixels as 1024 x 1024, with even background on
            all sides of the blurred point.

    Raises:
        ValueError: nothing or more than one thing stands out, it reaches the border, its brightest part is clipped to white or
            black, its kernel would be noise by more than a quarter, it is as sharp as pixels are, or more than one image.
    """
    crop = as_images("crop", crop, one=True)[0]
    _, h, w = crop.shape
    if min(h, w) < 11:
        raise ValueError(f"crop: got {h} x {w}, expected at least 11 x 11 pixels around the point")
    if h * w > LARGEST**2:
        raise ValueError(
            f"crop: got {h} x {w}, expected at most as many pixels as {LARGEST} x {LARGEST}; crop the point and the even area around it"
        )
    frame = torch.ones(h, w, dtype=torch.bool)
    rim = max(2, min(h, w) // 10)
    frame[rim:-rim, rim:-rim] = False
    light = torch.stack([channel - _background(channel, frame) for channel in crop])
    # The channels' mix in which the point stands out best from the noise of the frame.
    noise = (light[:, frame].abs().median(1).values / MAD).clamp(min=LEVEL / 2)
    energy = (_means(light) / noise[:, None, None]).square().sum(0)
    colour = _means(light).flatten(1)[:, int(energy.argmax())]
    weights = colour / noise.square()
    picture = (weights[:, None, None] * light).sum(0) / weights.abs().sum().clamp(min=1e-30)
    smooth = _means(picture[None])[0]
    sigma = max(float(picture[frame].square().mean().sqrt()), LEVEL / 2)
    # Noise falls by 3 in the mean of nine pixels, uneven background does not: nothing in the frame may stand out.
    unevenness, peak = float(smooth[frame].max()), float(picture.max())
    above = (picture > max(5 * sigma, 1.2 * float(picture[frame].max()), 0.02 * peak)) | (
        smooth > max(1.5 * sigma, 1.2 * unevenness, 0.02 * peak)
    )
    if not above.any() or unevenness > 0.15 * peak:
        raise ValueError(
            f"crop: nothing stands out clearly from its border, which varies by {max(sigma, unevenness):.3f}; take one brighter point, "
            "with even background on all sides"
        )
    region = _connected(above, int(smooth.argmax()))
    region = _grow(region, 2)
    if bool((region & frame).any()):
        raise ValueError("crop: what stands out reaches its border; take a larger crop, with even background around the point")
    others = float(picture[above & ~region].clamp(min=0).sum()) / float(picture[region].sum())
    if others > 0.02:
        raise ValueError(
            f"crop: more than one thing stands out, {100 * others:.0f} % of the light is elsewhere; crop a single point"
        )
    clipped = (crop * torch.sign(colour)[:, None, None] >= CLIPPED) & region
    if bool(clipped.any()):
        raise ValueError(
            f"crop: {int(clipped.any(0).sum())} pixels of the point are white or black, where its height is cut off; take a fainter one"
        )
    total = float(picture[region].sum())
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in (h, w))
    taps = torch.zeros_like(picture)
    taps[region] = _onto_simplex(picture[region] / total)
    core = torch.where(taps > 0.1 * taps.max(), taps, 0.0)  # what uneven background adds far out would pull at the centre
    core = core / core.sum()
    centre = float((core.sum(1) * rows).sum()), float((core.sum(0) * columns).sum())
    spread = [
        float((core.sum(1 - axis) * (position - centre[axis]).square()).sum()) for axis, position in enumerate((rows, columns))
    ]
    error = sigma / total
    relative = error * math.sqrt(int(region.sum())) / float(taps.norm())
    if relative > 0.25:
        raise ValueError(f"crop: noise would be {100 * relative:.0f} % of the kernel; crop a brighter point")
    if max(spread) < 0.25:
        raise ValueError(
            "crop: the point is as sharp as pixels show (under half a pixel); leave out the blur, there is none to undo"
        )
    kernel = _cut_out(taps, [round(c) for c in centre])
    return PointEstimate(kernel, error, relative, math.copysign(peak, float(colour @ weights.abs())))


def _background(channel: Tensor, frame: Tensor) -> Tensor:
    """The plane through the pixels of the frame, (H, W)."""
    h, w = channel.shape
    y, x = torch.meshgrid(torch.linspace(-1, 1, h).double(), torch.linspace(-1, 1, w).double(), indexing="ij")
    plane = torch.stack((torch.ones_like(x), x, y), -1)
    used = frame
    for _ in range(4):
        fit = torch.linalg.lstsq(plane[used], channel[used][:, None]).solution[:, 0]
        residual = (channel - plane @ fit).abs()
        used = frame & (residual <= 3 * max(float(residual[frame].median()) / MAD, LEVEL))
    return plane @ fit


def _means(pictures: Tensor) -> Tensor:
    """Of the nine pixels around each. (C, H, W) -> same."""
    return avg_pool2d(pictures[None], 3, 1, 1, count_include_pad=False)[0]


def _grow(region: Tensor, pixels: int) -> Tensor:
    side = 2 * pixels + 1
    return max_pool2d(region[None, None].double(), side, 1, pixels)[0, 0] > 0


def _connected(mask: Tensor, seed: int) -> Tensor:
    """The part of a mask connected to one of its pixels, gaps of a pixel bridged."""
    region = torch.zeros_like(mask)
    region.view(-1)[seed] = True
    bridged = _grow(mask, 1)
    while True:
        grown = _grow(region, 1) & bridged
        if torch.equal(grown, region):
            return region & mask
        region = grown


def _onto_simplex(values: Tensor) -> Tensor:
    """The nearest numbers >= 0 of sum 1: max(v - t, 0). Setting negative ones to 0 alone would leave the noise that is positive."""
    descending = values.sort(descending=True).values
    thresholds = (descending.cumsum(0) - 1) / torch.arange(1, len(values) + 1)
    return (values - thresholds[descending > thresholds][-1]).clamp(min=0)


def _cut_out(taps: Tensor, centre: list[int]) -> Tensor:
    """The smallest odd window around a pixel that holds all taps."""
    used = taps.nonzero()
    reach = [int((used[:, axis] - c).abs().max()) for axis, c in enumerate(centre)]
    kernel = torch.zeros([2 * r + 1 for r in reach], dtype=taps.dtype)
    offset = torch.tensor(reach) - torch.tensor(centre)
    index = used + offset
    kernel[index[:, 0], index[:, 1]] = taps[used[:, 0], used[:, 1]]
    return kernel
