"""Calibration nodes: what happened to the photo, read from the photo itself."""

import re
from collections.abc import Callable
from typing import TypeVar

import torch
from comfy_api.latest import io
from torch import Tensor

from ..operators import Blur, gaussian_kernel
from ..operators.calibration import (
    estimate_blur_from_edge,
    estimate_blur_from_point,
    estimate_gaussian_blur,
    estimate_noise_sigma,
    estimate_stripe_mask,
)
from .operators import kernel_picture
from .pictures import shown
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
            description="How much noise the photo carries, from its flattest parts, with an interval. Says so when it cannot tell. "
            "Measurement from Photo reads it by itself when its noise is set to estimated.",
            search_aliases=["noise level", "sigma", "grain", "denoise"],
            is_output_node=True,
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
        return io.NodeOutput(*values, ui=shown(cls, text="\n".join(lines)))


class EstimateStripes(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PosteriorEstimateStripes",
            display_name="Find Stripes",
            category=f"{CATEGORY}/calibration",
            description="Finds dead rows and columns of a photo; connect lost to Missing Pixels. Says so when there are none.",
            search_aliases=["destripe", "dead lines", "scan lines", "stripes"],
            is_output_node=True,
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
        return io.NodeOutput(lost, ui=shown(cls, lost[..., None].expand(-1, -1, -1, 3), text=text))


class EstimateBlur(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PosteriorEstimateBlur",
            display_name="Estimate Blur",
            category=f"{CATEGORY}/calibration",
            description="What the blur is. From a crop of one point of light: any shape of blur. From a crop of a straight edge that should "
            "be sharp: the width of a Gaussian blur, within a few percent. From the whole photo: the same, within a factor of 1.5. Says "
            "so when it cannot tell.",
            search_aliases=["deblur", "point spread function", "slanted edge", "estimate blur", "motion blur", "star"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Image.Input(
                    "photo",
                    tooltip="A crop with one straight edge between two even areas, a crop with one point of light on an even background, or "
                    "the whole photo.",
                ),
                io.Combo.Input(
                    "method",
                    options=["edge", "whole photo", "point"],
                    default="edge",
                    tooltip="edge: the picture is a crop of one edge. point: a crop of one star, far lamp, reflection or speck; gives the blur's "
                    "shape, shaken or out of focus. whole photo: a rough figure, when there is neither.",
                ),
            ],
            outputs=[
                LinearOperatorType.Output("operator", tooltip="This blur, reflecting at the border."),
                io.Float.Output(
                    "sigma", tooltip="Width of the blur in pixels, standard deviation; for a point, over both directions."
                ),
            ],
        )

    @classmethod
    def execute(cls, photo: Tensor, method: str) -> io.NodeOutput:
        if method == "point":
            point = of_photo(estimate_blur_from_point, photo)
            taps, sigma = point.kernel, spread(point.kernel)
            label = f"blur of {taps.shape[1]} x {taps.shape[0]} pixels"
            text = f"{label}, noise {point.relative_error:.0%} of it"
        else:
            found = of_photo(estimate_blur_from_edge if method == "edge" else estimate_gaussian_blur, photo)
            taps, sigma = gaussian_kernel(found.sigma), found.sigma
            label = f"gaussian blur of {sigma:.2f} pixels"
            text = f"sigma {sigma:.2f} pixels ({found.low:.2f} to {found.high:.2f})"
            if found.low < sigma / 2:
                text += "\nthis edge says little: take a straighter one between evener areas, or where it is noisy a longer one"
        recipe = OperatorRecipe(label, lambda full: Blur(taps, full, "reflect"))
        return io.NodeOutput(recipe, sigma, ui=shown(cls, kernel_picture(taps), text=text))


def spread(taps: Tensor) -> float:
    """Standard deviation of a kernel in pixels, over both directions."""
    variance = 0.0
    for weights in (taps.sum(1), taps.sum(0)):
        position = torch.arange(len(weights), dtype=taps.dtype)
        mean = (weights * position).sum()
        variance += float((weights * (position - mean).square()).sum()) / 2
    return variance**0.5


NODES = [EstimateNoise, EstimateStripes, EstimateBlur]
