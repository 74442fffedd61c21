"""One node from measurement to picture, for everybody who does not want to build the graph."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from comfy_api.latest import io
from torch import Tensor

from ..operators import Crop, Identity, Measurement
from ..samplers import fill_unseen, measured, sample_cpigdm, sample_psld, start_level
from . import host
from .finish import finish
from .measurement import which
from .pictures import heat, shown
from .plot import residual_plot
from .samplers import LIGHTER, LIGHTER_TEXT, run_inputs
from .types import CATEGORY, MeasurementType, to_image, to_signal

log = logging.getLogger("comfyui-posterior")
CALLS = {  # network calls; PSLD's also take a gradient through the network
    "C-PiGDM": {"fast": 5, "balanced": 10, "best": 20},
    "PSLD": {"fast": 20, "balanced": 50, "best": 100},
}
SOLVERS = {  # with what `stock_sampler` takes
    "C-PiGDM": (sample_cpigdm, {"network_gradient": False, "lighter": LIGHTER, "consistency": "decoder"}),
    "PSLD": (sample_psld, {"rule": "line_search", "omega": 0.8, "gamma": 0.0}),
}
# With the sampler's own, eta 2 and no spread, samples of one photo come out too much alike (benchmarks/results/latent_tuning.md).
SEVERAL = {"eta": 0.5, "spread": 2.0}
NEXT_SAMPLE = 1_000_003  # from the seed of a photo's sample to the next one's


class Restore(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PosteriorRestore",
            display_name="Restore",
            category=CATEGORY,
            description="Restore a photo in one node: samples the posterior under your checkpoint, decodes, and makes the result agree with "
            "the photo. Any picture size.",
            search_aliases=[
                "posterior",
                "super resolution",
                "upscale",
                "inpaint",
                "deblur",
                "destripe",
                "denoise",
                "colorize",
                "restore photo",
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The diffusion model: SD 1.x, SD 2.x, SDXL, SD3 or another that the samplers know."
                ),
                io.Vae.Input("vae", tooltip="The VAE of the model."),
                io.Conditioning.Input("positive", tooltip="What the picture shows."),
                MeasurementType.Input("measurement", tooltip="The photo and what happened to it; from a Measurement node."),
                io.Combo.Input(
                    "method",
                    options=list(CALLS),
                    default="C-PiGDM",
                    tooltip="C-PiGDM: 5 to 20 network calls without a gradient through the network. PSLD: a gradient through the network at "
                    "each of 20 to 100 calls, more memory.",
                ),
                io.Combo.Input(
                    "quality",
                    options=["fast", "balanced", "best"],
                    default="balanced",
                    tooltip="Network calls: C-PiGDM 5, 10 or 20; PSLD 20, 50 or 100.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=True,
                    tooltip="Seed of the first photo; those of the next ones count up. Another seed is another picture that agrees with the photo.",
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Strength of the prompt; 1 is off and twice as fast.",
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="What it does not show. Needed when cfg is not 1."),
                io.Int.Input(
                    "samples",
                    default=1,
                    min=1,
                    max=64,
                    optional=True,
                    advanced=True,
                    tooltip="How many results for each photo, for the Uncertainty node: where they differ, the details are invented. With more than "
                    "one, each starts from the highest noise level, and C-PiGDM draws it with the noise that its means leave out (eta .5, spread 2): they differ "
                    "more, in holes nearly as much as they are wrong, and the first is not the picture that a single one would be, which is closer to the truth. PSLD's differ by their "
                    "start alone.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=host.schedulers(),
                    default=host.MIDPOINTS,
                    optional=True,
                    advanced=True,
                    tooltip="How the noise levels are spaced. midpoints: the middle of equal parts of the model's time, so that none of few "
                    "network calls goes to the very ends. They begin where noise just hides what is wrong with the filled photo, higher for large "
                    "holes; for several samples at the model's highest level. The others are ComfyUI's, most from the model's highest level on.",
                ),
                *run_inputs(LIGHTER_TEXT),
            ],
            outputs=[
                io.Image.Output("image", tooltip="The restored pictures: all samples of the first photo, then of the next."),
                io.Float.Output(
                    "residual", tooltip="|A x - y|, root mean square on the 0 to 1 scale, worst picture of the batch."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: object,
        vae: object,
        positive: list,
        measurement: Measurement,
        method: str,
        quality: str,
        seed: int,
        cfg: float,
        negative: list | None = None,
        samples: int = 1,
        scheduler: str = host.MIDPOINTS,
        memory: str = "auto",
        check_gradients: bool = False,
    ) -> io.NodeOutput:
        if negative is None and cfg != 1:
            raise ValueError(
                f"negative: not connected, but cfg is {cfg}. Connect a prompt (an empty one will do), or set cfg to 1"
            )
        negative = positive if negative is None else negative
        exact = measurement.to("cpu", torch.float64)
        # A measurement that cannot be met is found out before the sampling, not after.
        finish(fill_unseen(host.stoppable(exact)), exact)
        window, wide = widened(exact, host.side_multiple(vae, model))
        filled = to_image(fill_unseen(host.stoppable(wide))).clamp(0, 1)
        on_pixels = host.works_on_pixels(vae)  # past its VAE, which rounds to bfloat16 on most GPUs
        solve, options = SOLVERS[method]
        if method == "C-PiGDM" and samples > 1:
            options = {**options, **SEVERAL}
        run = {"memory": memory, "unique_id": host.node_id(cls), "plan": host.Plan()}
        images, worst, texts, curves, notes, count = [], 0.0, [], [], [], len(filled) * samples
        if isinstance(exact.operator, Identity) and exact.sigma == 0:
            notes.append(
                "nothing to restore: the photo is said to be whole and noise-free. Give its Measurement node a sigma above 0"
            )
        if count > len(filled) > 1:
            notes.append(f"{len(filled)} pictures, {samples} samples of each: for Uncertainty set its per_photo to {samples}")
        with keeping(cls, images, count):
            # One picture at a time: it takes the memory of one, and comes out the same to the bit in any batch.
            for i in range(len(filled)):
                first = filled[i : i + 1]
                start = to_signal("measurement", first).float() if on_pixels else vae.encode(first)
                # Several samples are to differ as much as the posterior's, and start from the highest level.
                level = None
                if scheduler == host.MIDPOINTS and samples == 1:
                    level = start_level(host.stoppable(exact.select(i)), vae.upscale_ratio)
                sigmas = host.sigmas_of(model, CALLS[method][quality], scheduler, level)
                for k in range(samples):
                    check = check_gradients and i == k == 0
                    photo = wide.select(i)
                    curves.append([])
                    sampler = host.stock_sampler(
                        noting(solve, photo, curves[-1]),
                        photo.to(torch.float32),
                        vae,
                        check_gradients=check,
                        notes=notes,
                        title=f"result {len(images) + 1} of {count}, " if count > 1 else "",
                        **run,
                        **options,
                    )
                    # Photo i of a batch comes out as it would with seed + i alone.
                    number = (seed + i + k * NEXT_SAMPLE) % 2**63
                    part = (len(images), count)
                    latent = host.sample_latents(model, positive, negative, cfg, sampler, sigmas, start, number, part)
                    decoded = to_image(latent).clamp(0, 1) if on_pixels else vae.decode(latent)
                    if not bool(torch.isfinite(decoded).all()):
                        raise ValueError(
                            "vae: the picture it decodes has NaN or infinite values; start ComfyUI with --fp32-vae, or use another VAE"
                        )
                    image, rms, text = finish(window(to_signal("vae", decoded)), exact.select(i))
                    images.append(image)
                    worst = max(worst, rms)
                    name = which(picture=(i, len(filled)), sample=(k, samples))
                    texts += [name + line for line in text.split("\n")]
            pictures, plot = torch.cat(images), residual_plot(curves, exact.sigma / 2)
            previews = [pictures] if plot is None else [pictures, plot]
            return io.NodeOutput(pictures, worst, ui=shown(cls, *previews, text="\n".join([*texts, *notes])))


@contextlib.contextmanager
def keeping(node: type[io.ComfyNode], images: list[Tensor], count: int) -> Iterator[None]:
    """Inside, where a run of several pictures is cancelled or fails, those that are done are saved."""
    try:
        yield
    except BaseException:  # the host's for a cancelled run is no Exception
        if images:
            line = f"ended early: what was done, {len(images)} of {count} pictures, {host.saved(images)}"
            log.warning(line)
            host.show_text(node, line)
        raise


def noting(solve: Callable[..., Tensor], photo: Measurement, curve: list[float]) -> Callable[..., Tensor]:
    """A sampler that also writes down |A x - y| at each step, root mean square on the 0 to 1 scale; `photo` is one."""
    count = float(measured(photo.operator, photo.y).expand_as(photo.y).sum())

    def run(*given: object, callback: Callable[[dict], None], **options: object) -> Tensor:
        def note(step: dict) -> None:
            curve.append(float(step["residual"].max()) / 2 / count**0.5)
            callback(step)

        curve.clear()  # a run that ran out of memory begins again
        return solve(*given, callback=note, **options)

    return run


def widened(measurement: Measurement, ratio: int) -> tuple[Callable[[Tensor], Tensor], Measurement]:
    """The measurement of a picture whose sides are multiples of `ratio`: the margin around the old one is free.

    Returns:
        What takes such a picture back to the old one, and the measurement.
    """
    channels, *size = measurement.operator.in_shape
    wide = [-(-side // ratio) * ratio for side in size]
    if wide == size:
        return lambda x: x, measurement
    corner = [(outer - inner) // 2 for outer, inner in zip(wide, size, strict=True)]
    crop = Crop((channels, *wide), tuple(size), tuple(corner))
    return crop.A, replace(measurement, operator=measurement.operator @ crop)


class Uncertainty(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PosteriorUncertainty",
            is_output_node=True,
            display_name="Uncertainty",
            category=CATEGORY,
            description="Which details are invented: the mean of several results for one photo, and how much they differ at each pixel.",
            search_aliases=["posterior mean", "standard deviation", "statistics", "heat map", "confidence"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Image.Input(
                    "samples",
                    tooltip="Results for the same photo with different seeds, as a batch; from Restore with samples > 1.",
                ),
                io.Int.Input(
                    "per_photo",
                    default=0,
                    min=0,
                    max=4096,
                    optional=True,
                    advanced=True,
                    tooltip="Of a batch with several photos: how many samples each has, one photo after the other. 0: all are of one photo.",
                ),
                io.Float.Input(
                    "brightest",
                    default=0.2,
                    min=0.001,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="Standard deviation, on the 0 to 1 scale, that is the brightest colour of the map.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "mean", tooltip="The mean of the samples: smoother than each of them, and closer to the truth on average."
                ),
                io.Image.Output(
                    "map", tooltip="Standard deviation at each pixel as a heat map: black is certain, white is invented."
                ),
                io.Mask.Output("deviation", tooltip="The same as a mask: 0 is certain, 1 is at or above `brightest`."),
            ],
        )

    @classmethod
    def execute(cls, samples: Tensor, per_photo: int = 0, brightest: float = 0.2) -> io.NodeOutput:
        pictures = (to_signal("samples", samples).movedim(1, -1) + 1) / 2  # in float64
        count = per_photo or len(samples)
        if count < 2:
            raise ValueError("samples: got one for each photo, but a map needs at least 2; set Restore's samples to 2 or more")
        if len(samples) % count:
            raise ValueError(f"samples: got {len(samples)} pictures, expected a multiple of per_photo, {count}")
        groups = pictures.unflatten(0, (-1, count))
        # Over colours too: one number for each pixel.
        deviation = groups.var(1).mean(-1).sqrt()
        share = (deviation / brightest).clamp(0, 1).float()
        mean, picture = groups.mean(1).float(), heat(share)
        text = f"{len(groups)} photo{'s' * (len(groups) > 1)}, {count} samples of each"
        return io.NodeOutput(mean, picture, share, ui=shown(cls, mean, picture, text=text))


NODES = [Restore, Uncertainty]
