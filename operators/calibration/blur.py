"""The width of a Gaussian blur, from an edge or from a whole photo."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from .images import CLIPPED, LEVEL, as_images
from .noise import white_noise

SAMPLED = 2**15  # pixels


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
    crop = as_images("crop", crop, one=True)[0]
    _, h, w = crop.shape
    if min(h, w) < 8:
        raise ValueError(f"crop: got {h} x {w}, expected at least 8 x 8 pixels around the edge")
    clipped = float((crop.abs() >= CLIPPED).double().mean())
    if clipped > 0.05:
        raise ValueError(
            f"crop: {100 * clipped:.0f} % of it is black or white, which cuts the edge's tails; take one between greys"
        )
    colours = crop.flatten(1) - crop.flatten(1).mean(1, keepdim=True)
    weights = torch.linalg.eigh(colours @ colours.T).eigenvectors[:, -1]  # the channels' mix that shows the edge best
    picture = (weights @ colours).reshape(h, w)
    y, x = (v.flatten() for v in torch.meshgrid(_centred(h), _centred(w), indexing="ij"))
    guess, values = _first_guess(x, y, picture), picture.flatten()
    # Where the search begins best shows in a sample of a large crop, for a second instead of minutes.
    some = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))[:SAMPLED]
    fits = [_fit_edge(x[some], y[some], values[some], guess, width) for width in (0.6, 1.5, 3.0, 6.0)]
    best = min(fits, key=lambda fit: float(fit[1].square().sum()))[0]
    p, residual, jacobian = _fit_edge(x, y, values, best, math.exp(float(best[2])))
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
            f"crop: the edge is as sharp as pixels show (sigma {sigma:.2f}, told from 0.5 on); leave out the blur, there is none to undo"
        )
    return BlurEstimate(sigma, low, high, height)


def _centred(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.float64) - (n - 1) / 2


def _first_guess(x: Tensor, y: Tensor, picture: Tensor) -> Tensor:
    """The parameters of an edge (angle, centre, log width, a, b, plane x, plane y), all but its width."""
    down, across = torch.gradient(picture)
    tensor = torch.stack((across.flatten(), down.flatten()))
    direction = torch.linalg.eigh(tensor @ tensor.T).eigenvectors[:, -1]
    values = picture.flatten()
    centre = _largest_step(direction[0] * x + direction[1] * y, values)
    height = values.max() - values.min()
    sign = torch.sign((values * (direction[0] * x + direction[1] * y - centre)).sum())
    p = torch.tensor([math.atan2(direction[1], direction[0]), centre, 0, 0, 0, 0, 0], dtype=torch.float64)
    p[3], p[4] = values.median() - sign * height / 2, sign * height
    return p


def _largest_step(along: Tensor, values: Tensor) -> float:
    """Where values change most clearly, by their means over lines a pixel apart."""
    first = along.floor().min()
    lines = (along - first).long()
    count = torch.bincount(lines).double().cumsum(0)
    total = torch.bincount(lines, values).cumsum(0)
    reach = 4
    before, middle, after = (slice(i * reach, len(count) - (2 - i) * reach) for i in range(3))
    left, right = count[middle] - count[before], count[after] - count[middle]
    change = (total[after] - total[middle]) / right.clamp(min=1) - (total[middle] - total[before]) / left.clamp(min=1)
    # In units of its noise, which is large in the corners, where lines are short.
    clear = change.abs() * (left * right / (left + right).clamp(min=1)).sqrt()
    return float(first) + reach + 1 + int(clear.argmax()) if clear.numel() else 0.0


def _fit_edge(x: Tensor, y: Tensor, values: Tensor, p: Tensor, width: float) -> tuple[Tensor, Tensor, Tensor]:
    """Levenberg-Marquardt from parameters of `_first_guess` and a width. Returns better ones, the residual and the Jacobian."""
    p = p.clone()
    p[2] = math.log(width)

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
    image = as_images("image", image, one=True)
    if min(image.shape[2:]) < 64:
        raise ValueError(f"image: got {image.shape[2]} x {image.shape[3]}, expected at least 64 x 64")
    grey = image.mean(1, keepdim=True)
    noise = white_noise(grey[0], torch.ones_like(grey[0], dtype=torch.bool))[0]
    top, left = (max(n - 1536, 0) // 2 for n in image.shape[2:])
    grey = grey[..., top : top + 1536, left : left + 1536]  # has edges enough
    for scale in (1.0, 1.5, 2.0):
        gradient, ratio = _strongest_edges(grey, scale)
        noise_of_gradient = noise / (scale**2 * math.sqrt(8 * math.pi))
        if noise_of_gradient <= 0.05 * (float(ratio.median()) - 1) * float(gradient.median()):
            break
    else:
        raise ValueError(f"image: noise ({noise:.3f}) hides how wide its edges are; use a crop with one long edge instead")
    sigma = math.sqrt(max(scale**2 / (float(ratio.median()) ** 2 - 1) - scale**2, 0.0))
    if sigma < 1.4:
        raise ValueError(
            f"image: its edges read as {sigma:.1f} pixels wide; below 1.4 a sharp photo may read the same. Use a crop with one long edge instead"
        )
    contrast = float(gradient.median()) * sigma * math.sqrt(2 * math.pi)
    if contrast > 2 or sigma > min(grey.shape[2:]) / 8:  # a ramp is as an edge of any width
        raise ValueError("image: has no edges to measure; use a crop with one long edge instead")
    return BlurEstimate(sigma, 0.75 * sigma, 1.5 * sigma, contrast)


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
    if len(gradient) < 50 or float(gradient.max()) < LEVEL:
        raise ValueError("image: has no edges to measure; use a crop with one long edge instead")
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
