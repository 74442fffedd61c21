"""Read-outs: does a result agree with the photo, and how near is it to the truth where that is known."""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from comfy_api.latest import io
from torch import Tensor

from ..operators import ConvergenceError, Measurement
from ..samplers import measured
from . import host
from .measurement import ROUNDED, check_result, each_photo, photo_image, single, which
from .pictures import VISIBLE, below, beside, heat, shown
from .types import CATEGORY, MeasurementType, to_signal

EXACT = 1e-5  # root mean square on the 0 to 1 scale; what float32 pictures leave
ROUNDING = 0.5 / 255  # the most that 8 bits change a value
WINDOW = 11  # of SSIM, pixels
FORMATS = {"PSNR": "PSNR {:.2f} dB", "SSIM": "SSIM {:.4f}", "LPIPS": "LPIPS {:.4f}"}
LPIPS_TRUNK = "alexnet-owt-7be5be79.pth"  # as torchvision names the weights in torch's cache


class Consistency(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PosteriorConsistency",
            display_name="Consistency",
            category=f"{CATEGORY}/read-outs",
            description="Does the result agree with the photo? Degrades it as the photo was, compares, and says so in words and in a "
            "picture. Tells when no result could agree, because the photo has more noise than was said, or another operator made it.",
            search_aliases=["residual", "agreement", "check", "verify", "operator mismatch", "restore"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="The result, as it was restored: not resized. Of a batch of photos one for each, or as many for each, those of the "
                    "first photo first, as Restore gives them.",
                ),
                MeasurementType.Input("measurement", tooltip="The measurement it was restored from."),
                io.Float.Input(
                    "gain",
                    default=10.0,
                    min=1.0,
                    max=1000.0,
                    step=1.0,
                    tooltip="How many times the difference is enlarged in the picture; mid-grey is no difference.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "picture", tooltip="The photo y, the result degraded A x, and their difference; a row for each photo."
                ),
                io.Float.Output(
                    "relative",
                    tooltip="|A x - y| / |y| over what was measured, y on the 0 to 1 scale; worst picture of the batch.",
                ),
                io.Float.Output(
                    "sigmas",
                    tooltip="|A x - y|, root mean square, divided by the noise: near 1 is right. Infinite for a noise-free photo that is "
                    "not met; worst picture of the batch.",
                ),
                io.Boolean.Output("agrees", tooltip="Whether all pictures agree with all photos, as far as the noise allows."),
            ],
        )

    @classmethod
    def execute(cls, image: Tensor, measurement: Measurement, gain: float) -> io.NodeOutput:
        x = check_result("image", image, measurement, several=True)
        measurement = host.stoppable(measurement, torch.float64)
        pictures, lines, readings = [], [], []
        groups = each_photo(x, measurement)
        for results, own in groups:
            rows, found = degraded_again(results, single(own), gain)
            pictures.append(below(*rows))
            for i, parts in enumerate(zip(*found, strict=True)):
                best = None if all(part.agrees for part in parts) else best_residuals(own.select(i if len(own.y) > 1 else 0))
                readings.append(parts)
                for k, part in enumerate(parts):
                    result = {"picture": (len(pictures) - 1, len(groups)), "sample": (i, len(results))}
                    result = result if len(groups) > 1 else {"picture": (i, len(results))}
                    lines.append(which(**result, photo=(k, len(parts))) + verdict(part, best, k))
        relative, sigmas = zip(*map(overall, readings), strict=True)
        agrees = all(part.agrees for parts in readings for part in parts)
        picture = torch.cat(pictures)
        ui = shown(cls, picture, text="\n".join(lines), names=("photo", "result, degraded", f"difference x {gain:g}"))
        return io.NodeOutput(picture, max(relative), max(sigmas), agrees, ui=ui)


def degraded_again(x: Tensor, photos: list[Measurement], gain: float) -> tuple[list[Tensor], list[list["Agreement"]]]:
    """For each of combined photos: photo, degraded result and their difference side by side, and how far apart they are, image by image."""
    tall = max(photo.y.shape[2] for photo in photos)
    rows, found = [], []
    for photo in photos:
        again = photo.operator.A(x)
        y = photo.y.expand_as(again)
        panels = [photo_image(v) for v in (y, again, (gain * (again - y)).clamp(-1, 1))]
        rows.append(beside(*panels, height=tall * max(1, VISIBLE // tall)))
        found.append(compared(again, photo))
    return rows, found


@dataclass(frozen=True)
class Agreement:
    """How far a picture, degraded again, is from a photo.

    Attributes:
        residual: ||A x - y|| over what was measured, on the 0 to 1 scale.
        size: ||y|| over what was measured, black being 0.
        count: of values that were measured.
        sigma: of the noise, on the 0 to 1 scale.
    """

    residual: float
    size: float
    count: int
    sigma: float

    @property
    def rms(self) -> float:
        """Root mean square of A x - y."""
        return self.residual / self.count**0.5

    @property
    def relative(self) -> float:
        """||A x - y|| / ||y||."""
        return ratio(self.residual, self.size)

    @property
    def sigmas(self) -> float:
        """The root mean square over the noise; near 1 for the truth, and for every sample of the exact posterior."""
        return 0.0 if self.sigma == 0 and self.agrees else ratio(self.rms, self.sigma)

    @property
    def limit(self) -> float:
        """The largest root mean square that is agreement: a quarter above the noise, or more where few values were measured.

        For the truth, (rms / sigma)^2 is chi-square over `count`, so that rms / sigma spreads by 1 / sqrt(2 count).
        """
        return self.sigma * (1 + max(0.25, 4 / (2 * self.count) ** 0.5)) if self.sigma else ROUNDING

    @property
    def agrees(self) -> bool:
        """Whether the picture could be the truth, as far as the residual tells."""
        return self.rms <= self.limit


def ratio(a: float, b: float) -> float:
    """a / b; 0 / 0 is 0."""
    return a / b if b > 0 else math.inf if a > 0 else 0.0


def compared(again: Tensor, photo: Measurement) -> list[Agreement]:
    """A x, (B, c, h, w) in [-1, 1], with its photo, image by image."""
    y = photo.y.expand_as(again)
    seen = measured(photo.operator, photo.y).expand_as(again)
    residual = (seen * (again - y) / 2).flatten(1).norm(dim=1)
    size = (seen * (y + 1) / 2).flatten(1).norm(dim=1)
    rows = zip(residual.tolist(), size.tolist(), seen.flatten(1).sum(1).tolist(), strict=True)
    return [Agreement(r, s, int(n), photo.sigma / 2) for r, s, n in rows]


def overall(parts: Sequence[Agreement]) -> tuple[float, float]:
    """`relative` and `sigmas` of one picture against several photos, each weighed by its noise."""
    residual, size = (math.hypot(*(getattr(part, name) for part in parts)) for name in ("residual", "size"))
    weighed = sum(part.count * part.sigmas**2 for part in parts)
    return ratio(residual, size), (weighed / sum(part.count for part in parts)) ** 0.5


def verdict(found: Agreement, best: list[float] | str | None, k: int) -> str:
    """An agreement with photo k in words, and where there is none whether there could be: `best` as from `best_residuals`."""
    noise = f", {found.sigmas:.2f} times the noise" if found.sigma else ""
    text = f"|A x - y| {found.rms:.3g}, {found.relative:.2%} of |y|{noise}: "
    if not found.agrees:
        return f"{text}does not agree. {remedy(found.limit, best, k)}"
    if found.sigma == 0:
        return f"{text}agrees {'exactly' if found.rms <= EXACT else 'to the rounding of 8 bits'}"
    if found.sigmas < 0.5:
        return f"{text}agrees, nearer than the noise: some of the photo's noise is in it, as after Finish"
    return f"{text}agrees within the noise"


def remedy(limit: float, best: list[float] | str, k: int) -> str:
    """What to do about a result that does not agree with photo k: nothing helps when the photos are not of these operators."""
    if isinstance(best, str):
        return f"Whether any picture could is not known ({best})"
    if best[k] <= limit:
        return (
            "It can be met: more steps bring it closer, and so does the Finish node, which Restore includes. If they do not, check the "
            "operator: a blur that is too wide can be met, too, by a picture that looks wrong; Estimate Blur reads it from the photo"
        )
    if len(best) > 1:
        return (
            f"The best compromise between the photos leaves {best[k]:.3g} here: they are not of one picture, or an operator did not make "
            f"its photo. Check that they are aligned, and each operator; or set sigma to {max(best[k], ROUNDED):.2g}"
        )
    return (
        f"No likely picture brings it below {best[k]:.3g}. If the photo was a JPEG, or Estimate Noise reads about as much, set sigma to "
        f"{max(best[k], ROUNDED):.2g}. Else this operator did not make it: check its kind, numbers and order; Estimate Blur reads a blur's width"
    )


def best_residuals(measurement: Measurement) -> list[float] | str:
    """What the picture that fits best leaves of |A x - y|, root mean square on the 0 to 1 scale, for each combined photo.

    Without noise ||(I - A A^+) y||, exactly. With noise the residual of argmin ||A x - y||^2 / sigma^2 + ||x||^2: pictures are
    spread about 1 in each direction, so that what A passes on by less than sigma is noise, and a photo with more there is not
    a photo through A. Masks, downscaling, and black and white can give any photo: a single one then has 0, whoever made it.

    Args:
        measurement: of one picture, in float64.

    Returns:
        The residuals, or why they are not known: the iterations of an operator without a closed form do not end.
    """
    start = torch.zeros((1, *measurement.operator.in_shape), dtype=measurement.y.dtype)
    weight = 1 / measurement.sigma**2 if measurement.sigma else math.inf
    try:
        best = measurement.operator.prox_l2(start, measurement.y, weight)
    except ConvergenceError as fault:
        return str(fault)
    return [compared(photo.operator.A(best), photo)[0].rms for photo in single(measurement)]


class Compare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PosteriorCompare",
            display_name="Compare",
            category=f"{CATEGORY}/read-outs",
            description="How near a result is to the truth, where that is known: PSNR, SSIM, both pictures and a map of the error. LPIPS "
            "too, where the package lpips and its weights are installed already.",
            search_aliases=["PSNR", "SSIM", "LPIPS", "error map", "difference", "quality", "metrics"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Image.Input("image", tooltip="The result."),
                io.Image.Input("truth", tooltip="The picture as it was before it was degraded; one, or one for each result."),
                io.Float.Input(
                    "brightest",
                    default=0.2,
                    min=0.001,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Error, on the 0 to 1 scale, that is the brightest colour of the map.",
                ),
            ],
            outputs=[
                io.Image.Output("picture", tooltip="The result, the truth, and a heat map of the error: black is none."),
                io.Float.Output("psnr", tooltip="Peak signal-to-noise ratio in dB; higher is nearer. Mean over the batch."),
                io.Float.Output("ssim", tooltip="Structural similarity, 1 is identical. Mean over the batch."),
            ],
        )

    @classmethod
    def execute(cls, image: Tensor, truth: Tensor, brightest: float) -> io.NodeOutput:
        a, b = to_signal("image", image), to_signal("truth", truth)
        if a.shape[2:] != b.shape[2:]:
            raise ValueError(
                f"image: is {a.shape[3]} x {a.shape[2]}, but truth is {b.shape[3]} x {b.shape[2]}; connect pictures of one size"
            )
        if len(b) not in (1, len(a)):
            raise ValueError(f"image: got a batch of {len(a)} for {len(b)} pictures at truth; they must be equal, or truth one")
        if min(a.shape[2:]) < WINDOW:
            raise ValueError(
                f"image: is {a.shape[3]} x {a.shape[2]}; SSIM looks at windows of {WINDOW} x {WINDOW} pixels; connect larger pictures"
            )
        # As they are shown and saved: from black to white, nothing beyond.
        a, b = (((v + 1) / 2).clamp(0, 1) for v in (a, b.expand_as(a)))
        error = (a - b).square().mean(1)
        values = {"PSNR": -10 * error.mean((1, 2)).log10(), "SSIM": ssim(a, b)}
        if (perceived := lpips_distance(a, b)) is not None:
            values["LPIPS"] = perceived
        lines = []
        for i in range(len(a)):
            name = f"picture {i + 1}: " if len(a) > 1 else ""
            lines.append(name + ", ".join(FORMATS[key].format(float(value[i])) for key, value in values.items()))
        first, second = (v.movedim(1, -1).float() for v in (a, b))
        picture = beside(first, second, heat((error.sqrt() / brightest).clamp(0, 1).float()))
        means = (float(values[key].mean()) for key in ("PSNR", "SSIM"))
        ui = shown(cls, picture, text="\n".join(lines), names=("result", "truth", f"error, white {brightest:g} up"))
        return io.NodeOutput(picture, *means, ui=ui)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity as Wang et al. (2004) define it: Gaussian windows of 11 x 11, sigma 1.5, mean over places and channels.

    Args:
        a, b: (B, C, H, W) in [0, 1], sides of 11 or more.

    Returns:
        (B,).
    """
    try:
        from kornia.metrics import ssim as ssim_map  # comes with ComfyUI
    except ImportError as error:
        raise ValueError(
            "image: cannot be compared, for SSIM needs kornia, which is in ComfyUI's requirements.txt; install those again"
        ) from error

    # Windows that lie inside the picture only; eps is no part of the definition.
    return ssim_map(a, b, WINDOW, max_val=1.0, eps=0.0, padding="valid").mean((1, 2, 3))


def lpips_distance(a: Tensor, b: Tensor) -> Tensor | None:
    """LPIPS (Zhang et al., 2018) with AlexNet, (B,), where all it needs is on this machine; else None. Never downloads.

    Args:
        a, b: (B, 3, H, W) in [0, 1].
    """
    trunk = Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_TRUNK
    if importlib.util.find_spec("lpips") is None or not trunk.is_file() or min(a.shape[2:]) < 32:  # what AlexNet needs
        return None
    import lpips

    network = lpips.LPIPS(net="alex", verbose=False).eval()
    return network(2 * a.float() - 1, 2 * b.float() - 1).flatten(1).mean(1)


NODES = [Consistency, Compare]
