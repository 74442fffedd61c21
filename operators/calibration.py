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
        margin: how clear cut the mask is, > 3: the least odd lost line is this many times as odd as the oddest kept one.
    """

    keep: Tensor
    orientation: str
    period: int | None
    width: int | None
    offset: int | None
    lines: int
    margin: float


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
        ValueError: fewer than 256 usable blocks (too small, clipped or saturated, or flat fills), a JPEG that has lost its fine
            noise, or not an image.
    """
    image = _as_images("image", image)
    for x in image:
        if _jpeg_ratio(x) < 0.45:
            raise ValueError(
                "image: has no fine noise left (JPEG compression, smoothing, or a drawn picture), so that no one sigma describes "
                "it. Give sigma by hand, 0 for a clean picture, or take the photo as it came from the camera"
            )
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


def _jpeg_ratio(image: Tensor) -> float:
    """Size of the high frequencies in blocks on JPEG's grid over that in blocks half way between: 1 without compression.

    JPEG rounds them to zero on its own grid only; its seams have plenty. Seen: 0.9 to 1.4 with noise of 0.05 on any photo, below
    0.45 where quality 75 to 95 has taken the noise away.
    """
    grey = image.mean(0)
    dct = _dct_matrix(_BLOCK)
    high = torch.arange(_BLOCK)[:, None] + torch.arange(_BLOCK) >= 8

    def size(offset: int) -> float:
        blocks = grey[offset:, offset:].unfold(0, _BLOCK, _BLOCK).unfold(1, _BLOCK, _BLOCK).reshape(-1, _BLOCK, _BLOCK)
        return float((dct @ blocks @ dct.T)[:, high].abs().median())

    return size(0) / max(size(4), 1e-9) if min(grey.shape) >= 4 * _BLOCK and size(4) > 0 else 1.0


def _dct_matrix(n: int) -> Tensor:
    """Orthonormal DCT-II, (n, n) float64."""
    i = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi * (2 * i + 1) * i[:, None] / (2 * n)) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix


# Stripes --------------------------------------------------------------------------------------------------------------


def estimate_stripe_mask(image: Tensor) -> StripeEstimate:
    """Find lost rows or columns: dead lines (constant, plus noise) and outliers (nothing in common with their neighbours).

    Dead: the distance of every line to the colour of the flattest one has a gap, of a factor 3, between the lost lines and
    all others. Outliers: so has the distance of every line to the most alike of its neighbours. In both cases the lost lines
    must be less smooth along themselves than the kept ones, so that a low-contrast picture is not taken for its own defect.
    On 9 photos with -1, 0 or noise in the lost lines, and noise of 0 and 0.05 on top, the mask is right to the line in 86 %,
    refused in 13 % and wrong in 1 %, where both rows and columns are lost and only the one or the other is found.

    Args:
        image: (1, C, H, W) in [-1, 1] units.

    Raises:
        ValueError: no clear lost lines (none, too faint against the picture, or bars at the border only), or more than one
            image.
    """
    image = _as_images("image", image, one=True)[0]
    rows, margin_rows = _lost_lines(image)
    columns, margin_columns = _lost_lines(image[:, ~rows].transpose(1, 2))
    if rows.any() and columns.any():  # the columns were in the way of the rows' statistics
        rows, margin_rows = _lost_lines(image[:, :, ~columns])
    if not (rows.any() or columns.any()):
        raise ValueError("image: no clearly lost lines found; draw the mask by hand, or give period, width and offset")
    keep = (~rows[:, None] & ~columns).to(torch.float32)[None, None]
    patterns = [_period(lost) for lost in (rows, columns) if lost.any()]
    period, width, offset = patterns[0] if patterns[0] == patterns[-1] else (None, None, None)
    orientation = "both" if len(patterns) == 2 else "horizontal" if rows.any() else "vertical"
    lines = int(rows.sum() + columns.sum())
    return StripeEstimate(keep, orientation, period, width, offset, lines, min(margin_rows, margin_columns))


_LEVEL = 0.006  # under one 8-bit level: differences below it say nothing
_GAP = 3.0


def _lost_lines(image: Tensor) -> tuple[Tensor, float]:
    """Which rows of (C, H, W) are lost, (H,) bool, and by what margin."""
    lines = image.transpose(0, 1).float()
    lost, margin = torch.zeros(len(lines), dtype=torch.bool), math.inf
    colour = lines.median(2, keepdim=True).values
    spread = _quantile((lines - colour).abs(), 0.8)
    candidates = torch.ones_like(lost)
    for _ in range(12):  # the flattest line may be a sky; then the next flattest, of another colour
        if not candidates.any():
            break
        seed = int(torch.where(candidates, spread, math.inf).argmin())
        distance = _quantile((lines - colour[seed]).abs(), 0.6)
        below, above = _gaps(distance[~lost])[0]
        dead = (distance <= below) & ~lost
        if above / below > _GAP and dead[seed] and _is_loss(lines, lost, dead):
            lost, margin = lost | dead, min(margin, above / below)
        candidates &= ~lost & (distance > max(1.3 * float(distance[seed]), 1.5 * _LEVEL))
        candidates[seed] = False
    kept = torch.nonzero(~lost).flatten()
    distance = _distance_to_neighbours(lines[kept])
    below, above = _gaps(distance)[-1]
    outlier = torch.zeros_like(lost)
    outlier[kept[distance >= above]] = True
    if above / below > _GAP and _is_loss(lines, lost, outlier, 2.0):
        lost, margin = lost | outlier, min(margin, above / below)
    return lost, margin


def _quantile(lines: Tensor, q: float) -> Tensor:
    """Of each line's values, (N, C, W) -> (N,)."""
    values = lines.flatten(1)
    return values.kthvalue(max(1, round(q * values.shape[1])), 1).values


def _gaps(values: Tensor) -> list[tuple[float, float]]:
    """Neighbours in the sorted values that are more than the gap apart, (below, above), smallest first; [(inf, inf)] if none."""
    values = values.clamp(min=_LEVEL).sort().values
    wide = torch.nonzero(values[1:] > _GAP * values[:-1]).flatten().tolist()
    return [(float(values[i]), float(values[i + 1])) for i in wide] or [(math.inf, math.inf)]


def _distance_to_neighbours(lines: Tensor) -> Tensor:
    """Median absolute difference of each line to the most alike of the 8 on either side. lines: (N, C, W) -> (N,)."""
    best = torch.full((len(lines),), math.inf, dtype=lines.dtype)
    for k in range(1, min(8, len(lines) - 1) + 1):
        difference = (lines[k:] - lines[:-k]).abs().flatten(1).median(1).values
        best[k:] = torch.minimum(best[k:], difference)
        best[:-k] = torch.minimum(best[:-k], difference)
    return best


def _is_loss(lines: Tensor, lost: Tensor, more: Tensor, smoother: float = 0.5) -> bool:
    """Whether `more` lost lines are stripes: narrow, not only at the border, and less smooth along themselves than the rest.

    smoother: how many times as smooth as the kept ones they may be.
    """
    both = (lost | more).to(torch.int8)
    kept = ~(lost | more)
    steps = torch.diff(torch.cat((both.new_zeros(1), both, both.new_zeros(1))))
    first, end = torch.nonzero(steps == 1).flatten(), torch.nonzero(steps == -1).flatten()
    narrow = bool((end - first <= max(len(lines) // 8, 1)).all())
    inside = bool(((first > 0) & (end < len(lines))).any())
    return (
        inside
        and narrow
        and int(kept.sum()) >= 0.15 * len(lines)
        and _smoothness(lines[more]) < smoother * _smoothness(lines[kept])
    )


def _smoothness(lines: Tensor) -> float:
    """Correlation of neighbouring pixels along the lines; 0 for constant lines and for white noise."""
    deviation = lines - lines.mean(2, keepdim=True)
    left, right = deviation[..., :-1], deviation[..., 1:]
    power = float(left.square().sum() + right.square().sum()) / 2
    return float((left * right).sum()) / power if power > left.numel() * _LEVEL**2 else 0.0


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

    a + b Phi((x cos t + y sin t - c) / s) + plane is fitted to all pixels by least squares (Levenberg-Marquardt). A slanted
    edge is best, since it samples the profile between pixels. The variance of a pixel's own aperture, which a sharp picture
    has too, is taken off: sigma^2 = s^2 - 1/12. The interval is the fit's standard error, widened for residuals that are
    correlated (an edge that is not quite the model) and by 5 % + 0.02 (1 + 1 / s) pixels for the model itself.

    What is measured is the blur of the edge: if the thing photographed is itself soft, that is included.

    Args:
        crop: (1, C, H, W) in [-1, 1] units, at least 8 x 8, holding the edge and 2 sigma on either side of it.

    Raises:
        ValueError: no clear edge, not one straight edge, an edge that is clipped, or wider than the crop, or sharper than
            0.5 pixels, or more than one image.
    """
    crop = _as_images("crop", crop, one=True)[0]
    _, h, w = crop.shape
    if min(h, w) < 8:
        raise ValueError(f"crop: got {h} x {w}, expected at least 8 x 8 pixels around the edge")
    clipped = float((crop.abs() >= _CLIPPED).double().mean())
    if clipped > 0.05:
        raise ValueError(
            f"crop: {100 * clipped:.0f} % of it is black or white, which cuts the edge's tails; take one between greys"
        )
    colours = crop.flatten(1) - crop.flatten(1).mean(1, keepdim=True)
    weights = torch.linalg.eigh(colours @ colours.T).eigenvectors[:, -1]  # the channels' mix that shows the edge best
    picture = (weights @ colours).reshape(h, w)
    y, x = (v.flatten() for v in torch.meshgrid(_centred(h), _centred(w), indexing="ij"))
    fits = [_fit_edge(x, y, picture, start) for start in (0.6, 1.5, 3.0, 6.0)]
    p, residual, jacobian = min(fits, key=lambda fit: float(fit[1].square().sum()))
    angle, centre, width, height = float(p[0]), float(p[1]), math.exp(float(p[2])), abs(float(p[4]))
    along = x * math.cos(angle) + y * math.sin(angle) - centre
    rms = float(residual.square().mean().sqrt())
    lags = [residual.reshape(h, w).roll((i, j), (0, 1)).flatten() for i in range(-2, 3) for j in range(-2, 3)]
    correlated = max(1.0, sum(float(residual @ lag) for lag in lags) / max(float(residual @ residual), 1e-30))
    structure = rms * math.sqrt(correlated / len(lags))  # what is left of the residual in means over 5 x 5 pixels
    if not height > max(4 * rms, 12 * structure):
        raise ValueError(
            f"crop: no clear straight edge, its height {height:.3f} is not far above what is unexplained, {rms:.3f}; "
            "crop one straight edge between two even areas"
        )
    if not min(-float(along.min()), float(along.max())) > 2 * width:
        raise ValueError(
            f"crop: the edge is {width:.1f} pixels wide (1 sigma), so the crop must reach 2 sigma to either side of it"
        )
    covariance = torch.linalg.pinv(jacobian.T @ jacobian) * rms**2 * correlated
    error = 2 * width * math.sqrt(float(covariance[2, 2])) + (0.05 + 3 * structure / height) * width + 0.02 * (1 + 1 / width)
    sigma, low, high = (
        math.sqrt(max(s, 0.0) ** 2 - 1 / 12) if s > 12**-0.5 else 0.0 for s in (width, width - error, width + error)
    )
    if sigma < 0.5:
        raise ValueError(
            f"crop: the edge is as sharp as pixels show (sigma {sigma:.2f}, told from 0.5 on); there is no blur to undo"
        )
    return BlurEstimate(sigma, low, high, height)


def _centred(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.float64) - (n - 1) / 2


def _fit_edge(x: Tensor, y: Tensor, picture: Tensor, width: float) -> tuple[Tensor, Tensor, Tensor]:
    """Levenberg-Marquardt from a starting width. Returns the parameters (angle, centre, log width, a, b, plane x, plane y), the
    residual and the Jacobian."""
    down, across = torch.gradient(picture)
    tensor = torch.stack((across.flatten(), down.flatten()))
    direction = torch.linalg.eigh(tensor @ tensor.T).eigenvectors[:, -1]
    strength = (direction @ tensor).square()
    centre = float((strength * (direction[0] * x + direction[1] * y)).sum() / strength.sum().clamp(min=1e-30))
    values = picture.flatten()
    height = values.max() - values.min()
    sign = torch.sign((values * (direction[0] * x + direction[1] * y - centre)).sum())
    p = torch.tensor([math.atan2(direction[1], direction[0]), centre, math.log(width), 0, 0, 0, 0], dtype=torch.float64)
    p[3], p[4] = values.median() - sign * height / 2, sign * height

    def evaluate(p: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin, s = torch.cos(p[0]), torch.sin(p[0]), torch.exp(p[2])
        z = (x * cos + y * sin - p[1]) / s
        step, density = torch.special.ndtr(z), torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
        model = p[3] + p[4] * step + p[5] * x + p[6] * y
        slope = p[4] * density
        columns = (slope * (y * cos - x * sin) / s, -slope / s, -slope * z, torch.ones_like(x), step, x, y)
        return values - model, torch.stack(columns, 1)

    residual, jacobian = evaluate(p)
    damping = 1e-2
    for _ in range(60):
        normal = jacobian.T @ jacobian
        scale = normal.diagonal().clamp(min=1e-12)
        trial = p + torch.linalg.solve(normal + damping * torch.diag(scale), jacobian.T @ residual)
        trial[2] = trial[2].clamp(math.log(0.1), math.log(1e3))
        trial_residual, trial_jacobian = evaluate(trial)
        gain = 1 - float(trial_residual.square().sum() / residual.square().sum().clamp(min=1e-30))
        if gain > 0:
            p, residual, jacobian, damping = trial, trial_residual, trial_jacobian, damping / 5
        else:
            damping *= 5
        if 0 <= gain < 1e-9 or damping > 1e9:
            break
    return p, residual, jacobian


def estimate_gaussian_blur(image: Tensor) -> BlurEstimate:
    """Gaussian blur from a whole photo, to a factor 1.5 and no better, by blurring it again (Zhuo and Sim, 2011).

    At a step edge of width sigma, a blur s lowers the gradient by R = sqrt(1 + s^2 / (sigma^2 + s0^2)), s0 a first smoothing.
    sigma is the median over the strongest 2 % of the ridges of the gradient, which are taken for step edges. They need not be:
    lines and textures read too narrow (-35 %), soft things too wide (+30 %). That is the interval, [0.75, 1.5] sigma, measured
    on photos; below 1.4 pixels a sharp photo may read the same. For anything better see `estimate_blur_from_edge`.

    Args:
        image: (1, C, H, W) in [-1, 1] units, at least 64 x 64.

    Raises:
        ValueError: a photo that may be sharp, one with too much noise or too few edges, one on which
            `estimate_noise_sigma` refuses, or more than one image.
    """
    image = _as_images("image", image, one=True)
    if min(image.shape[2:]) < 64:
        raise ValueError(f"image: got {image.shape[2]} x {image.shape[3]}, expected at least 64 x 64")
    noise = _noise(image[0])[0] / math.sqrt(image.shape[1])
    top, left = (max(n - 1536, 0) // 2 for n in image.shape[2:])
    grey = image[..., top : top + 1536, left : left + 1536].mean(1, keepdim=True)  # has edges enough
    for scale in (1.0, 1.5, 2.0):
        gradient, ratio = _strongest_edges(grey, scale)
        noise_of_gradient = noise / (scale**2 * math.sqrt(8 * math.pi))
        if noise_of_gradient <= 0.05 * (float(ratio.median()) - 1) * float(gradient.median()):
            break
    else:
        raise ValueError(f"image: noise ({noise:.3f}) hides how wide its edges are; use a crop with one long edge instead")
    sigma = math.sqrt(max(scale**2 / (float(ratio.median()) ** 2 - 1) - scale**2, 0.0))
    if sigma < 1.4:
        raise ValueError(f"image: its edges are {sigma:.1f} pixels wide, as in sharp photos; a blur below 1.4 cannot be told")
    return BlurEstimate(sigma, 0.75 * sigma, 1.5 * sigma, float(gradient.median()) * sigma * math.sqrt(2 * math.pi))


def _strongest_edges(grey: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradient of the picture smoothed by `scale`, and how much a second smoothing lowers it, at the strongest 2 % of ridges."""
    once = _smooth(grey, scale)
    across, down, size = _gradient(once)
    again = _gradient(_smooth(once, scale))[2]
    middle = size[..., 1:-1, 1:-1]
    horizontal = (across.abs() >= down.abs())[..., 1:-1, 1:-1]
    left, right, above, below = size[..., 1:-1, :-2], size[..., 1:-1, 2:], size[..., :-2, 1:-1], size[..., 2:, 1:-1]
    ridge = torch.where(horizontal, (middle >= left) & (middle >= right), (middle >= above) & (middle >= below))
    margin = math.ceil(4 * scale) + 2
    inside = (..., slice(margin, -margin), slice(margin, -margin))
    gradient, ratio = middle[inside][ridge[inside]], (middle / again[..., 1:-1, 1:-1].clamp(min=1e-12))[inside][ridge[inside]]
    if len(gradient) < 50 or float(gradient.max()) < _LEVEL:
        raise ValueError("image: has no edges to measure")
    strongest = gradient.topk(max(50, round(0.02 * len(gradient))))
    return strongest.values, ratio[strongest.indices].clamp(min=1 + 1e-9)


def _smooth(v: Tensor, sigma: float) -> Tensor:
    """Gaussian smoothing of (1, 1, H, W), borders replicated."""
    reach = math.ceil(4 * sigma)
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=v.dtype) / sigma) ** 2)
    taps = taps / taps.sum()
    v = pad(v, (reach, reach, reach, reach), mode="replicate")
    return conv2d(conv2d(v, taps[None, None, :, None]), taps[None, None, None, :])


def _gradient(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Central differences (across, down) and their length."""
    across = (v[..., 1:-1, 2:] - v[..., 1:-1, :-2]) / 2
    down = (v[..., 2:, 1:-1] - v[..., :-2, 1:-1]) / 2
    return across, down, torch.hypot(across, down)


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
