"""Calibration nodes: what happened to the photo, read from the photo itself."""

import re
from collections.abc import Callable
from typing import TypeVar

from comfy_api.latest import io, ui
from torch import Tensor

from ..operators import Blur, gaussian_kernel
from ..operators.calibration import estimate_blur_from_edge, estimate_gaussian_blur, estimate_noise_sigma, estimate_stripe_mask
from . import host
from .operators import kernel_picture
from .types import CATEGORY, LinearOperatorType, OperatorRecipe, to_signal

Estimate = TypeVar("Estimate")


def of_photo(estimate: Callable[[Tensor], Estimate], photo: Tensor) -> Estimate:
    """Run an estimator, and let its refusal name the node's input."""
    try:
        return estimate(to_signal("photo", photo))
    except ValueError as refusal:
        raise ValueError(re.sub(r"^(image|crop):", "photo:", str(refusal))) from refusal


class EstimateNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PosteriorEstimateNoise",
            display_name="Estimate Noise",
            category=f"{CATEGORY}/calibration",
            description="How much noise the photo carries, from its flattest parts, with an interval; connect sigma to Measurement from "
            "Photo. Says so when it cannot tell.",
            search_aliases=["noise level", "sigma", "grain", "denoise"],
            hidden=[io.Hidden.unique_id],
            inputs=[io.Image.Input("photo", tooltip="The photo as it is: not resized, not sharpened.")],
            outputs=[
                io.Float.Output("sigma", tooltip="Standard deviation of the noise on the 0 to 1 scale; mean over a batch."),
                io.Float.Output("low", tooltip="Lower end of a 95 % interval."),
                io.Float.Output("high", tooltip="Upper end of a 95 % interval."),
            ],
        )

    @classmethod
    def execute(cls, photo: Tensor) -> io.NodeOutput:
        found = of_photo(estimate_noise_sigma, photo)
        rows = zip(found.sigma.tolist(), found.low.tolist(), found.high.tolist(), strict=True)
        lines = [f"noise {s / 2:.4f} ({low / 2:.4f} to {high / 2:.4f})" for s, low, high in rows]
        values = (float(v.mean()) / 2 for v in (found.sigma, found.low, found.high))
        host.show_text(cls, "\n".join(lines))
        return io.NodeOutput(*values, ui=ui.PreviewText("\n".join(lines)))


class EstimateStripes(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PosteriorEstimateStripes",
            display_name="Find Stripes",
            category=f"{CATEGORY}/calibration",
            description="Finds dead rows and columns of a photo; connect lost to Missing Pixels. Says so when there are none.",
            search_aliases=["destripe", "dead lines", "scan lines", "stripes"],
            hidden=[io.Hidden.unique_id],
            inputs=[io.Image.Input("photo", tooltip="The striped photo as it is, one picture.")],
            outputs=[io.Mask.Output("lost", tooltip="1 on the dead lines.")],
        )

    @classmethod
    def execute(cls, photo: Tensor) -> io.NodeOutput:
        found = of_photo(estimate_stripe_mask, photo)
        regular = "" if found.period is None else f", {found.width} wide every {found.period}, the first at {found.offset}"
        lost = 1 - found.keep[:, 0].float()
        text = f"{found.lines} lost lines, {found.orientation}{regular}"
        host.show_text(cls, text)
        return io.NodeOutput(lost, ui=ui.PreviewText(text))


class EstimateBlur(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PosteriorEstimateBlur",
            display_name="Estimate Blur",
            category=f"{CATEGORY}/calibration",
            description="How strong a Gaussian blur is: from a crop of a straight edge that should be sharp (within a few percent), or from "
            "the whole photo (within a factor of 1.5). Says so when it cannot tell.",
            search_aliases=["deblur", "point spread function", "slanted edge", "estimate blur"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Image.Input("photo", tooltip="A crop with one straight edge between two even areas, or the whole photo."),
                io.Combo.Input(
                    "method",
                    options=["edge", "whole photo"],
                    default="edge",
                    tooltip="edge: the picture is a crop of one edge. whole photo: a rough figure, when there is no such edge.",
                ),
            ],
            outputs=[
                LinearOperatorType.Output("operator", tooltip="A Gaussian blur of this width, reflecting at the border."),
                io.Float.Output("sigma", tooltip="Width of the blur in pixels, standard deviation."),
            ],
        )

    @classmethod
    def execute(cls, photo: Tensor, method: str) -> io.NodeOutput:
        estimate = estimate_blur_from_edge if method == "edge" else estimate_gaussian_blur
        found = of_photo(estimate, photo)
        taps = gaussian_kernel(found.sigma)
        recipe = OperatorRecipe(f"gaussian blur of {found.sigma:.2f} pixels", lambda full: Blur(taps, full, "reflect"))
        host.show_text(cls, f"sigma {found.sigma:.2f} pixels ({found.low:.2f} to {found.high:.2f})")
        return io.NodeOutput(recipe, found.sigma, ui=ui.PreviewImage(kernel_picture(taps), cls=cls))


NODES = [EstimateNoise, EstimateStripes, EstimateBlur]
