"""Downscale: the photo was made smaller."""

import math

from comfy_api.latest import io

from ...operators import AreaDownscale, BicubicDownscale, LanczosDownscale
from ...operators.checks import Shape
from ..pictures import shown
from ..types import CATEGORY, OperatorRecipe
from .sockets import FIRST, RESULT, example


class Downscale(io.ComfyNode):
    METHODS = {"bicubic": BicubicDownscale, "lanczos": LanczosDownscale}

    @classmethod
    def define_schema(cls) -> io.Schema:
        tooltip = "The restored picture is this many times wider and higher than the photo."
        whole = io.Int.Input("factor", default=4, min=1, max=64, tooltip=tooltip)
        any_factor = io.Float.Input("factor", default=4.0, min=1.0, max=64.0, step=0.5, round=0.0001, tooltip=tooltip)
        return io.Schema(
            node_id="PosteriorDownscale",
            display_name="Downscale",
            category=f"{CATEGORY}/operators",
            description="The photo was made smaller: the restored picture, made smaller in the same way, gives the photo back.",
            search_aliases=["super resolution", "upscale", "enlarge", "restore", "downsample", "resize"],
            inputs=[
                io.DynamicCombo.Input(
                    "method",
                    options=[
                        io.DynamicCombo.Option("area", [whole]),
                        io.DynamicCombo.Option("bicubic", [any_factor]),
                        io.DynamicCombo.Option("lanczos", [any_factor]),
                    ],
                    tooltip="How it was made smaller. area: mean of each block (binning, box filter). bicubic, lanczos: as Pillow and "
                    "most photo programs do, any factor.",
                ),
                FIRST,
            ],
            outputs=[RESULT],
        )

    @classmethod
    def execute(cls, method: dict, operator: OperatorRecipe | None = None) -> io.NodeOutput:
        kind, factor = method["method"], method["factor"]
        make = AreaDownscale if kind == "area" else cls.METHODS[kind]

        def full_shape(shape: Shape) -> Shape:
            # The largest picture whose downscaled size is the photo's; for whole factors, factor times the photo.
            return shape[0], *(math.floor(n * factor + 1e-6) for n in shape[1:])

        recipe = OperatorRecipe(f"{kind} downscaling by {factor:g}", lambda full: make(full, factor), full_shape)
        return io.NodeOutput(recipe.after(operator), ui=shown(cls, example(recipe)))
