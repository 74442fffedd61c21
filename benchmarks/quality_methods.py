"""What quality.py compares: tasks and methods on the demo prior's latents and on its sibling's pixels."""

import copy
import hashlib
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import scipy.signal
import torch
from skimage.restoration import wiener
from torch import Tensor

from benchmarks.psld_rules import sample_by_rule
from operators import (
    BicubicDownscale,
    Blur,
    Grayscale,
    Identity,
    LinearOperator,
    Mask,
    Measurement,
    box_mask,
    gaussian_kernel,
    motion_kernel,
    random_mask,
    stripe_mask,
)
from prior import networks
from samplers import fill_unseen, sample_cpigdm, sample_psld, start_level

Tasks = dict[str, Callable[[], LinearOperator]]
Method = Callable[..., Tensor]  # (prior, measurement, calls, seed, **options) -> pictures before Finish
SHAPE, SMALL = (3, 128, 128), (3, networks.PIXEL_SIDE, networks.PIXEL_SIDE)
DENOISE_SIGMA = 0.2


def free_form() -> Tensor:
    """Keep-mask, (1, 1, 128, 128): a scrawl of three strokes is lost."""
    path = torch.linspace(0, 2 * math.pi, 400)
    row, column = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    keep = torch.ones(128, 128)
    for x, y in ((64 + 40 * path.cos(), 64 + 22 * (2 * path).sin()), (20 + 14 * path, 30 + 6 * (3 * path).sin())):
        distance = ((column[..., None] - x) ** 2 + (row[..., None] - y) ** 2).amin(-1)
        keep[distance < 16] = 0
    return keep[None, None]


TASKS: Tasks = {
    "downscale_4": lambda: BicubicDownscale(SHAPE, 4),
    "downscale_8": lambda: BicubicDownscale(SHAPE, 8),
    "box": lambda: Mask(box_mask(SHAPE, (48, 56), (40, 36))),
    "random_80": lambda: Mask(random_mask(SHAPE, 0.8)),
    "free_form": lambda: Mask(free_form()),
    "gaussian_blur": lambda: Blur(gaussian_kernel(3.0), SHAPE, "reflect"),
    "motion_blur": lambda: Blur(motion_kernel(15.0, 30.0), SHAPE, "circular"),
    "stripes": lambda: Mask(stripe_mask(SHAPE, 16, 6)),
    "denoise": lambda: Identity(SHAPE),
    "grayscale": lambda: Grayscale(SHAPE),
}
SMALL_TASKS: Tasks = {
    "downscale_4": lambda: BicubicDownscale(SMALL, 4),
    "box": lambda: Mask(box_mask(SMALL, (12, 14), (10, 9))),
    "random_80": lambda: Mask(random_mask(SMALL, 0.8)),
    "gaussian_blur": lambda: Blur(gaussian_kernel(1.0), SMALL, "reflect"),
    "grayscale": lambda: Grayscale(SMALL),
}


class Rounded:
    """An autoencoder that computes in another precision than that of what it is given."""

    def __init__(self, autoencoder: networks.Autoencoder, dtype: torch.dtype) -> None:
        # A copy: the original stays in float32, to compare pictures with.
        self.autoencoder = copy.deepcopy(autoencoder).to(dtype)
        self.dtype = dtype

    def decode(self, z: Tensor) -> Tensor:
        return self.autoencoder.decode(z.to(self.dtype)).to(z.dtype)

    def encode(self, image: Tensor) -> Tensor:
        return self.autoencoder.encode(image.to(self.dtype)).to(image.dtype)


class Prior:
    """A network with the start and the noise levels of a run, and the feature space that pictures are compared in.

    Args:
        pixels: the sibling on 32 x 32 pixels.
        precision: that the networks of a run compute in, "float32" or "bfloat16"; everything else is float32.
    """

    def __init__(self, pixels: bool, precision: str = "float32") -> None:
        self.unet, autoencoder = networks.load()
        autoencoder = autoencoder.to(memory_format=torch.channels_last)
        self.shape: tuple[int, int, int] = (4, 16, 16)
        if pixels:
            self.unet, self.shape = networks.load_pixels(), SMALL
        self.dtype = getattr(torch, precision)
        self.unet = self.unet.to(self.dtype)
        self.encode_features = autoencoder.encode
        exact = self.dtype == torch.float32
        self.vae = None if pixels else autoencoder if exact else Rounded(autoencoder, self.dtype)

    def model(self, x: Tensor, sigma: Tensor, seed: int = 0) -> Tensor:
        return networks.denoise(lambda x, t: self.unet(x.to(self.dtype), t).to(x.dtype), x, sigma)

    def noise(self, count: int, seed: int) -> Tensor:
        """Image i as in a run of its own with seed + i."""
        return torch.stack([torch.randn(self.shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)])

    def start(self, count: int, seed: int) -> Tensor:
        """Noise at the highest level."""
        return self.noise(count, seed) * (1 + float(networks.noise_levels()[-1]) ** 2) ** 0.5

    def sigmas(self, calls: int) -> Tensor:
        """Timesteps evenly spaced from the noisiest to the cleanest, as the papers have them; then 0."""
        levels = networks.noise_levels().float()
        return torch.cat([levels[torch.linspace(len(levels) - 1, 0, calls).round().long()], torch.zeros(1)])

    def midpoints(self, calls: int, start: float) -> Tensor:
        """The middle timesteps of equal parts below sigma = start, as the Restore node has them; then 0."""
        levels = networks.noise_levels().float()
        top = float((levels <= start).sum() - 1)
        times = top * (1 - (torch.arange(calls) + 0.5) / calls)
        below = times.long()
        return torch.cat([torch.lerp(levels[below].log(), levels[below + 1].log(), times - below).exp(), torch.zeros(1)])

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """The encoder's latents; small pictures are enlarged to what it knows."""
        if pictures.shape[-1] != SHAPE[-1]:
            pictures = torch.nn.functional.interpolate(pictures, size=SHAPE[1:], mode="bicubic", align_corners=False)
        return self.encode_features(pictures)


def weights_id(pixels: bool) -> str:
    """Of all networks that the rows depend on."""
    files = [networks.WEIGHTS, networks.PIXEL_WEIGHTS] if pixels else [networks.WEIGHTS]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


# Without a diffusion prior ---------------------------------------------------------------------------------------------------


def baseline(prior: Prior, measurement: Measurement, calls: int, seed: int) -> Tensor:
    """What one would do without a prior: bicubic enlargement, smooth fill, Wiener filters, the gray picture."""
    operator, y = measurement.operator, measurement.y
    if isinstance(operator, BicubicDownscale):
        return torch.nn.functional.interpolate(y, size=operator.in_shape[1:], mode="bicubic", align_corners=False)
    if isinstance(operator, Identity):
        planes = [[scipy.signal.wiener(plane, 5, measurement.sigma**2) for plane in image.double().numpy()] for image in y]
        return torch.from_numpy(np.array(planes)).float()
    if isinstance(operator, Grayscale):
        return y.expand(-1, 3, -1, -1)
    if isinstance(operator, Blur) and measurement.sigma:
        # Against a Laplacian prior; the balance is the best of the steps 1, 3, 10 on the tuning split at both noise levels.
        mode, balance = ("wrap", 0.3) if operator.boundary == "circular" else (operator.boundary, 0.1)
        psf, edge = operator.kernel.numpy(), operator.in_shape[1] // 4
        wide = np.pad(y.double().numpy(), ((0, 0), (0, 0), (edge, edge), (edge, edge)), mode=mode)
        sharp = np.array([[wiener(plane, psf, balance, clip=False) for plane in image] for image in wide])
        return torch.from_numpy(sharp[..., edge:-edge, edge:-edge].copy()).float()
    return fill_unseen(measurement)


def decoder_only(prior: Prior, measurement: Measurement, calls: int, seed: int) -> Tensor:
    """No diffusion prior: the latent whose picture fits the measurement, by 150 steps of Adam from zero."""
    z = torch.zeros(len(measurement.y), *prior.shape, requires_grad=True)
    optimizer = torch.optim.Adam([z], lr=0.08)
    for _ in range(150):
        residual = measurement.operator.A(prior.vae.decode(z)) - measurement.y
        loss = residual.square().sum() / 4 + 1e-3 * z.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return prior.vae.decode(z)


# With a diffusion prior -------------------------------------------------------------------------------------------------------


def sampled(solve: Method, by_midpoints: bool = False, **options: Any) -> Method:
    def run(
        prior: Prior,
        measurement: Measurement,
        calls: int,
        seed: int,
        midpoints: bool = by_midpoints,
        several: bool = False,
        denoise: float = 1.0,
        **others: Any,
    ) -> Tensor:
        """midpoints: as the Restore node runs it, the noise added to the filled photo; otherwise from noise alone, as the papers do.

        several: from the highest level, as Restore draws several samples of one photo.
        denoise: below 1, without midpoints, the last of evenly spaced levels, from the filled photo: stock nodes with a Start Latent.
        """
        vae = prior.vae
        x, sigmas = prior.start(len(measurement.y), seed), prior.sigmas(round(calls / denoise))[-calls - 1 :]
        if midpoints or denoise < 1:
            if midpoints:
                level = start_level(measurement, measurement.operator.in_shape[-1] // prior.shape[-1])
                sigmas = prior.midpoints(calls, math.inf if several else level)
            with torch.no_grad():
                filled = fill_unseen(measurement).clamp(-1, 1)
                filled = filled if vae is None else vae.encode(filled)
            x = filled + sigmas[0] * prior.noise(len(filled), seed)
        arguments = {"measurement": measurement, "autoencoder": vae, **options, **others}
        z = solve(prior.model, x, sigmas, {"seed": seed}, **arguments)
        with torch.no_grad():
            return z if vae is None else vae.decode(z)

    return run


METHODS: dict[str, Method] = {
    "baseline": baseline,
    "decoder_only": decoder_only,
    "latent_dps": sampled(sample_psld, omega=1.0, gamma=0.0),
    "psld_paper": sampled(sample_psld, omega=1.0, gamma=0.1),
    "psld_line_search": sampled(sample_psld, by_midpoints=True, omega=0.8, gamma=0.0, rule="line_search"),
    "psld_rule": sampled(sample_by_rule),
    "cpigdm": sampled(sample_cpigdm, by_midpoints=True),
    "cpigdm_encoder": sampled(sample_cpigdm, by_midpoints=True, consistency="encoder"),
}
COMPARED = [
    "baseline_0",
    "decoder_only_0",
    "latent_dps_50",
    "latent_dps_100",
    "psld_paper_50",
    "psld_paper_100",
    "psld_paper_250",
    "psld_line_search_20",
    "psld_line_search_50",
    "cpigdm_5",
    "cpigdm_10",
    "cpigdm_20",
    "cpigdm_encoder_10",
]


# Published for pixels --------------------------------------------------------------------------------------------------------


def fresh_noise(prior: Prior, count: int, seed: int) -> Callable[[], Tensor]:
    """Noise for each step, image i as in a run of its own with seed + i."""
    rngs = [torch.Generator().manual_seed(10_000 + seed + i) for i in range(count)]
    return lambda: torch.stack([torch.randn(prior.shape, generator=rng) for rng in rngs])


def published_cpigdm(
    prior: Prior, measurement: Measurement, calls: int, seed: int, start: float = 0.6, **others: Any
) -> Tensor:
    """As published for pictures: evenly in the time of its process, from the filled photo plus noise; w 15, with noise 2.

    Args:
        start: the first time, 0.6 in the paper's super-resolution.
    """
    t = torch.linspace(start, 0.001, calls + 1)
    sigmas = torch.expm1(9.95 * t**2 + 0.1 * t).sqrt()
    sigmas[-1] = 0
    x = fill_unseen(measurement) + sigmas[0] * prior.noise(len(measurement.y), seed)
    options = {"weight": "paper", "w": 2.0 if measurement.sigma else 15.0, "jacobian": "vp", **others}
    return sample_cpigdm(prior.model, x, sigmas, {"seed": seed}, measurement=measurement, **options)


def diffpir(prior: Prior, measurement: Measurement, calls: int, seed: int, strength: float = 8.0, zeta: float = 0.3) -> Tensor:
    """DiffPIR (Zhu et al. 2023): a proximal step on the data term after each denoising, then noise, new in the share zeta.

    As in its program, sigma is on the 0 to 1 scale there and not below .001, and nothing is corrected in the last step.
    """
    x, sigmas = prior.start(len(measurement.y), seed), prior.sigmas(calls)
    spread = max(measurement.sigma / 2, 0.001) ** 2
    noise = fresh_noise(prior, len(x), seed)
    for sigma, after in itertools.pairwise(sigmas):
        with torch.no_grad():
            x0 = prior.model(x, sigma)
        if after > 0:  # argmin_x |A x - y|^2 / spread + strength / sigma^2 |x - x0|^2
            x0 = measurement.operator.prox_l2(x0, measurement.y, float(sigma**2 / (strength * spread)))
        x = x0 + after * ((1 - zeta) ** 0.5 * (x - x0) / sigma + zeta**0.5 * noise())
    return x


def taken(ratio: float, values: Tensor) -> Tensor:
    """Lambda / s^2 of DDNM+, Lambda = min(1, s sigma_fresh / sigma_y), at the eigenvalues s^2."""
    return (values / ratio).sqrt().clamp(max=1) / values.clamp(min=1e-9)


def left(ratio: float, values: Tensor) -> Tensor:
    """The factor of the fresh noise that is still to be drawn where x0 took the photo's."""
    return (1 - (taken(ratio, values) ** 2 * values * ratio)).clamp(min=0).sqrt()


def ddnm(prior: Prior, measurement: Measurement, calls: int, seed: int, share: float = 0.85) -> Tensor:
    """DDNM (Wang et al., ICLR 2023): x0 takes its seen part from the photo; with noise DDNM+, by singular directions.

    In the next x each direction's fresh noise, sigma_next * share in all, is partly the photo's own, sigma_y / s: x0 takes as
    much of A^+ (y - A x0) as has room in it (their Lambda), and the rest is drawn. The photo's noise, unlike drawn noise, is the
    same in every step: it adds up in directions that the operator nearly loses, and behind a blur the published rule is noisy.
    """
    operator, y, spread = measurement.operator, measurement.y, measurement.sigma
    x, sigmas = prior.start(len(y), seed), prior.sigmas(calls)
    noise = fresh_noise(prior, len(x), seed)
    for sigma, after in itertools.pairwise(sigmas):
        with torch.no_grad():
            x0 = prior.model(x, sigma)
        room, eps, drawn = float(after) * share, (x - x0) / sigma, noise()
        miss = y - operator.A(x0)
        if spread and room:
            ratio = (spread / room) ** 2  # of the variances, for a direction of eigenvalue 1
            x0 = x0 + operator.A_adjoint(operator.gram(miss, partial(taken, ratio)))
            drawn = operator.spectral(drawn, partial(left, ratio))
        elif not spread:
            x0 = x0 + operator.A_dagger(miss)
        x = x0 + float(after) * (1 - share**2) ** 0.5 * eps + room * drawn
    return x


PIXEL_METHODS: dict[str, Method] = {
    "baseline": baseline,
    "dps": sampled(sample_psld, omega=1.0, gamma=0.0, eta=1.0),
    "pigdm": sampled(sample_cpigdm, weight="bayes", tau=math.inf, integrator="discrete", jacobian="k", eta=1.0),
    "ddnm": ddnm,
    "diffpir": diffpir,
    "cpigdm_paper": published_cpigdm,
    "cpigdm_bayes": sampled(sample_cpigdm, weight="bayes"),
    "psld_line_search": METHODS["psld_line_search"],
    "cpigdm": METHODS["cpigdm"],
}
PIXEL_COMPARED = [
    "baseline_0",
    "dps_100",
    *(f"{name}_{calls}" for name in ("pigdm", "ddnm", "diffpir") for calls in (20, 100)),
    "psld_line_search_20",
    *(f"{name}_{calls}" for name in ("cpigdm_paper", "cpigdm_bayes", "cpigdm") for calls in (5, 10, 20)),
]
