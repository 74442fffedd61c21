"""Operator nodes: what happened to the photo."""

from comfy_api.latest import io
from torch import Tensor

from ..operators import AreaDownscale, Mask
from ..operators.base import Shape
from .types import CATEGORY, LinearOperatorType, OperatorRecipe


class MaskOperator(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PosteriorMask",
            display_name="Missing Pixels (Mask)",
            category=f"{CATEGORY}/operators",
            description="The photo lost the pixels under a mask: objects to remove, scratches, dead lines. The others are kept exactly.",
            search_aliases=["inpaint", "hole", "remove object", "scratch", "missing pixels", "restore"],
            inputs=[
                io.Mask.Input(
                    "mask", tooltip="1 where the picture is lost and will be filled in. The same size as the picture."
                ),
                io.Float.Input(
                    "threshold",
                    default=0.5,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="A pixel is lost when its mask value is at least this; a pixel is either known or lost, nothing between.",
                ),
            ],
            outputs=[
                LinearOperatorType.Output("operator", tooltip="What happened to the photo; connect it to a Measurement node.")
            ],
        )

    @classmethod
    def execute(cls, mask: Tensor, threshold: float) -> io.NodeOutput:
        if mask.ndim == 2:
            mask = mask[None]
        keep = (mask < threshold)[:, None]
        if not bool(keep.flatten(1).any(1).all()):
            raise ValueError("mask: covers the whole picture, so that nothing is known; invert it if it marks what to keep")
        height, width = keep.shape[-2:]

        def bind(shape: Shape) -> Mask:
            if shape[1:] != (height, width):
                raise ValueError(
                    f"mask: is {width} x {height} but the picture is {shape[2]} x {shape[1]}; make the mask on this picture, or "
                    "bring both to one size"
                )
            return Mask(keep, channels=shape[0])

        lost = 1 - float(keep.double().mean())
        return io.NodeOutput(OperatorRecipe(f"{lost:.1%} of the pixels missing", bind, lambda shape: shape))


class DownscaleOperator(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        factor = io.Int.Input(
            "factor",
            default=4,
            min=1,
            max=64,
            tooltip="The restored picture is this many times wider and higher than the photo.",
        )
        return io.Schema(
            node_id="PosteriorDownscale",
            display_name="Downscale",
            category=f"{CATEGORY}/operators",
            description="The photo was made smaller: the restored picture, made smaller in the same way, gives the photo back.",
            search_aliases=["super resolution", "upscale", "enlarge", "restore", "downsample"],
            inputs=[
                io.DynamicCombo.Input(
                    "method",
                    options=[io.DynamicCombo.Option("area", [factor])],
                    tooltip="How it was made smaller. area: each pixel is the mean of a block (binning, box filter).",
                ),
            ],
            outputs=[
                LinearOperatorType.Output("operator", tooltip="What happened to the photo; connect it to a Measurement node.")
            ],
        )

    @classmethod
    def execute(cls, method: dict) -> io.NodeOutput:
        factor = method["factor"]
        return io.NodeOutput(
            OperatorRecipe(
                f"area downscaling by {factor}",
                lambda shape: AreaDownscale(shape, factor),
                lambda shape: (shape[0], shape[1] * factor, shape[2] * factor),
            )
        )


NODES = [MaskOperator, DownscaleOperator]
