"""Black and White, and Noise Only: what acts on each pixel alone."""

import torch
from comfy_api.latest import io

from ...operators import Grayscale, Identity
from ..pictures import shown
from ..types import CATEGORY, OperatorRecipe
from .sockets import FIRST, RESULT, example


class GrayscaleOperator(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        share = {"min": 0.0, "max": 1.0, "step": 0.01}
        return io.Schema(
            node_id="PosteriorGrayscale",
            display_name="Black and White",
            category=f"{CATEGORY}/operators",
            description="The photo lost its colours: the restored picture is in colour, and its brightness is the photo's.",
            search_aliases=["colorize", "colourise", "grayscale", "black and white", "restore"],
            inputs=[
                io.DynamicCombo.Input(
                    "weights",
                    options=[
                        io.DynamicCombo.Option("Rec.709", []),
                        io.DynamicCombo.Option("Rec.601", []),
                        io.DynamicCombo.Option("equal", []),
                        io.DynamicCombo.Option(
                            "custom",
                            [
                                io.Float.Input(
                                    "red", default=0.3, **share, tooltip="Weight of red; the three are divided by their sum."
                                ),
                                io.Float.Input("green", default=0.6, **share, tooltip="Weight of green."),
                                io.Float.Input("blue", default=0.1, **share, tooltip="Weight of blue."),
                            ],
                        ),
                    ],
                    tooltip="How colours became brightness. Rec.709: modern displays and programs. Rec.601: JPEG and old television.",
                ),
                FIRST,
            ],
            outputs=[RESULT],
        )

    @classmethod
    def execute(cls, weights: dict, operator: OperatorRecipe | None = None) -> io.NodeOutput:
        kind = weights["weights"]
        if kind == "custom":
            values = torch.tensor([weights[name] for name in ("red", "green", "blue")], dtype=torch.float64)
            if not float(values.sum()) > 0:
                raise ValueError("weights: red, green and blue are all 0; set at least one above 0")
            chosen: str | tuple[float, ...] = tuple((values / values.sum()).tolist())
        else:
            chosen = kind.removeprefix("Rec.")
        recipe = OperatorRecipe("black and white", lambda full: Grayscale(full, chosen))
        return io.NodeOutput(recipe.after(operator), ui=shown(cls, example(recipe)))


class NoiseOnly(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PosteriorIdentity",
            display_name="Noise Only",
            category=f"{CATEGORY}/operators",
            description="Nothing happened to the photo but noise; set its sigma in the Measurement node.",
            search_aliases=["denoise", "identity", "grain", "restore"],
            inputs=[],
            outputs=[RESULT],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        recipe = OperatorRecipe("noise only", Identity)
        return io.NodeOutput(recipe, ui=shown(cls, example(recipe)))
