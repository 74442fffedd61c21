"""Measurement nodes: what was observed, y = A x + noise."""

import torch
from comfy_api.latest import io
from torch import Tensor

from ..operators import LinearOperator, Measurement, Scale, Stack
from .types import CATEGORY, LinearOperatorType, MeasurementType, OperatorRecipe, to_image, to_signal

OUTPUTS = [
    MeasurementType.Output("measurement", tooltip="The degraded photo, what happened to it, and its noise."),
    io.Image.Output("degraded", tooltip="The degraded photo as a picture; lost pixels are mid-grey."),
    io.Mask.Output("lost", tooltip="1 on the pixels of the full picture that the photo says nothing about."),
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
            y = y + 2 * sigma * measured(a, y) * torch.stack(draws).double()
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
        if a.out_shape[0] == 1:
            y = grey(y)
        if tuple(y.shape[1:]) != a.out_shape:
            raise ValueError(
                f"photo: is {y.shape[3]} x {y.shape[2]}, but {operator.label} gives {a.out_shape[2]} x {a.out_shape[1]} from any "
                "picture near that size; check the operator's numbers"
            )
        # Whatever the photo shows where pixels are lost is no measurement.
        return output(measured(a, y) * y, a, sigma)


class CombineMeasurements(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PosteriorCombineMeasurements",
            display_name="Combine Measurements",
            category=f"{CATEGORY}/measurement",
            description="Two photos of the same picture, degraded in different ways, become one measurement: a burst, or a sharp "
            "black-and-white photo with a small colour one.",
            search_aliases=["stack", "burst", "fuse", "pansharpen"],
            inputs=[
                MeasurementType.Input("first", tooltip="A measurement of the picture."),
                MeasurementType.Input("second", tooltip="Another measurement of the same picture, of the same full size."),
            ],
            outputs=[MeasurementType.Output("measurement", tooltip="Both together, each weighed by its noise.")],
        )

    @classmethod
    def execute(cls, first: Measurement, second: Measurement) -> io.NodeOutput:
        parts = (first, second)
        if first.operator.in_shape != second.operator.in_shape:
            raise ValueError(
                f"second: measures a picture of {second.operator.in_shape}, but first one of {first.operator.in_shape} (channels, "
                "height, width); both must be of the same picture"
            )
        if len(first.y) != len(second.y):
            raise ValueError(f"second: is a batch of {len(second.y)}, but first one of {len(first.y)}; they must be equal")
        sigmas = [part.sigma for part in parts]
        if min(sigmas) == 0 < max(sigmas):
            raise ValueError(
                "first, second: one is noise-free (sigma 0) and the other is not; give both a sigma above 0, or both 0"
            )
        # A common noise level: a photo and its operator scaled alike say the same with another sigma.
        common = min(sigmas)
        gains = [1.0 if common == 0 else common / sigma for sigma in sigmas]
        scaled = [Scale(part.operator.out_shape, gain) @ part.operator for part, gain in zip(parts, gains, strict=True)]
        stack = Stack(scaled)
        y = stack.join([gain * part.y for part, gain in zip(parts, gains, strict=True)])
        return io.NodeOutput(Measurement(y, stack, common))


def measured(operator: LinearOperator, y: Tensor) -> Tensor:
    """1 on the values of y that depend on the picture, 0 where a mask took them. (1 or B, *out_shape)."""
    ones = torch.ones((len(y), *operator.in_shape), dtype=y.dtype)
    return (operator.A(ones).abs() > 1e-9).to(y.dtype)


def grey(y: Tensor) -> Tensor:
    """(B, 3, H, W) with equal channels -> (B, 1, H, W); a photo in colour is not a black-and-white measurement."""
    if float((y.amax(1) - y.amin(1)).max()) > 4 / 255:
        raise ValueError(
            "photo: is in colour, but the operator says black and white. Remove its tint in a photo program first, or leave "
            "out the Black and White node"
        )
    return y.mean(1, keepdim=True)


def output(y: Tensor, operator: LinearOperator, sigma: float) -> io.NodeOutput:
    reached = operator.A_adjoint(torch.ones_like(y)).abs().amax(1)
    lost = (reached <= 1e-9 * reached.max()).float()
    # Users think of noise on the 0 to 1 scale; from here on everything is in [-1, 1].
    return io.NodeOutput(Measurement(y, operator, 2 * sigma), to_image(y), lost)


NODES = [MeasureSimulate, MeasurementFromPhoto, CombineMeasurements]
