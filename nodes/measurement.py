"""Measurement nodes: what was observed, y = A x + noise."""

import torch
from comfy_api.latest import io
from torch import Tensor

from ..operators import LinearOperator, Measurement
from .types import CATEGORY, LinearOperatorType, MeasurementType, OperatorRecipe, to_image, to_signal

OUTPUTS = [
    MeasurementType.Output("measurement", tooltip="The degraded photo, what happened to it, and its noise."),
    io.Image.Output("degraded", tooltip="The degraded photo as a picture; lost pixels are mid-grey."),
]


def sigma_input(default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input("sigma", default=default, min=0.0, max=1.0, step=0.005, round=0.0001, tooltip=tooltip)


class MeasureSimulate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PosteriorMeasureSimulate",
            display_name="Measure (simulate)",
            category=f"{CATEGORY}/measurement",
            description="Degrade a good picture on purpose, to see how well it can be restored.",
            search_aliases=["degrade", "simulate", "forward model", "add noise"],
            inputs=[
                io.Image.Input("image", tooltip="The good picture, full size."),
                LinearOperatorType.Input("operator", tooltip="What shall happen to it."),
                sigma_input(0.0, "Noise added, as a standard deviation on the 0 to 1 scale; 0.02 is a little, 0.1 a lot."),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**63 - 1, control_after_generate=True, tooltip="Seed of the noise."
                ),
            ],
            outputs=OUTPUTS,
        )

    @classmethod
    def execute(cls, image: Tensor, operator: OperatorRecipe, sigma: float, seed: int) -> io.NodeOutput:
        x = to_signal("image", image)
        a = operator.bind(tuple(x.shape[1:]))
        y = a.A(x)
        if sigma > 0:
            draws = [torch.randn(y.shape[1:], generator=torch.Generator().manual_seed(seed + i)) for i in range(len(y))]
            y = y + 2 * sigma * a.project_range(torch.stack(draws).double())  # lost pixels stay lost
        return output(y, a, sigma)


class MeasurementFromPhoto(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PosteriorMeasurementFromPhoto",
            display_name="Measurement from Photo",
            category=f"{CATEGORY}/measurement",
            description="Your photo is the measurement. With a downscale operator the restored picture is larger than the photo; "
            "with a mask it has the photo's size and the holes are filled.",
            search_aliases=["restore", "my photo", "measurement", "upscale", "inpaint"],
            inputs=[
                io.Image.Input("photo", tooltip="The degraded photo as it is. Do not resize it before."),
                LinearOperatorType.Input("operator", tooltip="What happened to it."),
                sigma_input(
                    0.0,
                    "Noise in the photo, as a standard deviation on the 0 to 1 scale. 0 trusts every pixel; 0.02 is a clean phone "
                    "photo, 0.05 to 0.1 a grainy one.",
                ),
            ],
            outputs=OUTPUTS,
        )

    @classmethod
    def execute(cls, photo: Tensor, operator: OperatorRecipe, sigma: float) -> io.NodeOutput:
        y = to_signal("photo", photo)
        a = operator.bind(operator.full_shape(tuple(y.shape[1:])))
        # What no picture can explain is not measured: above all, whatever the photo shows under the mask.
        return output(a.project_range(y), a, sigma)


def output(y: Tensor, operator: LinearOperator, sigma: float) -> io.NodeOutput:
    # Users think of noise on the 0 to 1 scale; from here on everything is in [-1, 1].
    return io.NodeOutput(Measurement(y, operator, 2 * sigma), to_image(y))


NODES = [MeasureSimulate, MeasurementFromPhoto]
