"""Missing Pixels: a mask, a box, random pixels or stripes."""

from collections.abc import Callable

import torch
from comfy_api.latest import io
from torch import Tensor

from ...operators import Mask, box_mask, random_mask, stripe_mask
from ...operators.checks import Shape
from ..pictures import shown
from ..types import CATEGORY, OperatorRecipe
from .sockets import FIRST, RESULT, seed_input

PREVIEW = 256  # pixels; a pattern is shown on a picture of this size when its own is not known yet


def pixels(name: str, default: int, minimum: int, tooltip: str) -> io.Int.Input:
    return io.Int.Input(name, default=default, min=minimum, max=16384, tooltip=tooltip)


class MissingPixels(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        fraction = "Share of them that is lost, 0 to 1."
        return io.Schema(
            node_id="PosteriorMask",
            display_name="Missing Pixels",
            category=f"{CATEGORY}/operators",
            description="The photo lost pixels: objects to remove, scratches, dead lines, a box. The others are kept exactly.",
            search_aliases=["inpaint", "mask", "hole", "remove object", "scratch", "destripe", "missing pixels", "restore"],
            inputs=[
                io.DynamicCombo.Input(
                    "pattern",
                    tooltip="Which pixels are lost.",
                    options=[
                        io.DynamicCombo.Option(
                            "mask",
                            [
                                io.Mask.Input("mask", tooltip="1 where the picture is lost. The same size as the picture."),
                                io.Float.Input(
                                    "threshold",
                                    default=0.5,
                                    min=0.01,
                                    max=1.0,
                                    step=0.01,
                                    tooltip="A pixel is lost when its mask value is at least this; there is nothing between.",
                                ),
                            ],
                        ),
                        io.DynamicCombo.Option(
                            "box",
                            [
                                pixels("x", 0, 0, "Left edge of the lost box, in pixels of the picture."),
                                pixels("y", 0, 0, "Top edge of the lost box, in pixels of the picture."),
                                pixels("width", 64, 1, "Width of the lost box in pixels."),
                                pixels("height", 64, 1, "Height of the lost box in pixels."),
                            ],
                        ),
                        io.DynamicCombo.Option(
                            "random",
                            [
                                io.Float.Input("fraction", default=0.8, min=0.0, max=0.99, step=0.01, tooltip=fraction),
                                io.Boolean.Input(
                                    "per_channel",
                                    default=False,
                                    tooltip="Lose red, green and blue samples apart from one another.",
                                ),
                                seed_input("Seed of the random pixels."),
                            ],
                        ),
                        io.DynamicCombo.Option(
                            "stripes",
                            [
                                pixels("period", 16, 0, "Lines from one stripe to the next; 0 for no regular stripes."),
                                pixels("width", 2, 1, "Lines lost in each stripe."),
                                io.Int.Input(
                                    "offset", default=0, min=-16384, max=16384, advanced=True, tooltip="First lost line."
                                ),
                                io.Combo.Input(
                                    "direction",
                                    options=["horizontal", "vertical", "both"],
                                    default="horizontal",
                                    tooltip="horizontal loses rows, vertical columns.",
                                ),
                                io.Float.Input(
                                    "fraction",
                                    default=0.0,
                                    min=0.0,
                                    max=0.99,
                                    step=0.01,
                                    advanced=True,
                                    tooltip="Share of all lines lost at random besides.",
                                ),
                                seed_input("Seed of the random lines.", advanced=True),
                            ],
                        ),
                    ],
                ),
                FIRST,
            ],
            outputs=[RESULT],
        )

    @classmethod
    def execute(cls, pattern: dict, operator: OperatorRecipe | None = None) -> io.NodeOutput:
        # The preview is made here: wrong numbers are then this node's error, and the node shows the pattern.
        label, keep, preview = cls._pattern(pattern)
        recipe = OperatorRecipe(label, lambda full: Mask(keep(full), channels=full[0])).after(operator)
        return io.NodeOutput(recipe, ui=shown(cls, preview.mean(1, keepdim=True).movedim(1, -1).expand(-1, -1, -1, 3)))

    @classmethod
    def _pattern(cls, given: dict) -> tuple[str, Callable[[Shape], Tensor], Tensor]:
        """In words, shape of the picture -> keep, and what it keeps of some picture."""
        kind, nominal = given["pattern"], (3, PREVIEW, PREVIEW)
        if kind == "mask":
            return cls._from_mask(given["mask"], given["threshold"])
        if kind == "box":
            corner, size = (given["y"], given["x"]), (given["height"], given["width"])
            # A large box, or one far out, needs a larger picture around it, which is shown smaller.
            extent = [max(PREVIEW, at + side + side // 4 + 1) for at, side in zip(corner, size, strict=True)]
            shrink = -(-max(extent) // (4 * PREVIEW))
            whole = [n // shrink for n in extent]
            shown_size = [max(1, n // shrink) for n in size]
            shown_corner = [min(at // shrink, n - side) for at, n, side in zip(corner, whole, shown_size, strict=True)]
            preview = box_mask((3, *whole), tuple(shown_size), tuple(shown_corner))

            def box(full: Shape) -> Tensor:
                if corner[0] + size[0] > full[1] or corner[1] + size[1] > full[2]:
                    raise ValueError(
                        f"box: reaches to x = {corner[1] + size[1]}, y = {corner[0] + size[0]}, beyond the picture of {full[2]} x "
                        f"{full[1]}; lower x, y, width or height"
                    )
                return box_mask(full, size, corner)

            return f"a missing box of {size[1]} x {size[0]}", box, preview
        if kind == "random":
            lost, seed, each = given["fraction"], given["seed"], given["per_channel"]
            return (
                f"{lost:.0%} of the pixels missing",
                lambda full: random_mask(full, lost, seed, each),
                random_mask(nominal, lost, seed, each),
            )
        if 0 < given["period"] <= given["width"]:
            raise ValueError(
                f"pattern: stripes {given['width']} wide every {given['period']} lines leave nothing; raise period or lower width"
            )
        lines = {key: given[key] for key in ("width", "offset", "direction", "fraction", "seed")}
        period = given["period"] or None
        return "missing lines", lambda full: stripe_mask(full, period, **lines), stripe_mask(nominal, period, **lines)

    @staticmethod
    def _from_mask(mask: Tensor, threshold: float) -> tuple[str, Callable[[Shape], Tensor], Tensor]:
        mask = mask[None] if mask.ndim == 2 else mask
        if mask.ndim != 3 or mask.numel() == 0:
            raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected (batch, height, width), with at least one pixel")
        if not bool(torch.isfinite(mask).all()):
            raise ValueError("mask: has NaN or infinite values; the node before it went wrong")
        keep = (mask < threshold)[:, None].float()
        if bool(keep.all()) and (largest := float(mask.max())) > 0:
            raise ValueError(
                f"mask: marks no pixel, as its largest value, {largest:.4g}, is below the threshold, {threshold:.4g}; lower that"
            )
        if bool(keep.all()):
            raise ValueError(
                "mask: marks no pixel. Paint the hole: right-click the picture in Load Image, Open in Mask Editor (an unpainted picture "
                "gives an empty mask)"
            )
        if not bool(keep.flatten(1).any(1).all()):
            raise ValueError("mask: covers the whole picture, so that nothing is known; invert it if it marks what to keep")
        height, width = keep.shape[-2:]

        def bind(full: Shape) -> Tensor:
            if full[1:] != (height, width):
                raise ValueError(
                    f"mask: is {width} x {height} but the picture is {full[2]} x {full[1]}; make the mask on this picture, or bring "
                    "both to one size"
                )
            return keep

        return f"{1 - float(keep.double().mean()):.1%} of the pixels missing", bind, keep
