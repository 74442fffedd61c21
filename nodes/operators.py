"""Operator nodes: what happened to the photo. Each can follow another through its optional `operator` input."""

import math
from collections.abc import Callable

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..operators import (
    AreaDownscale,
    BicubicDownscale,
    Blur,
    Grayscale,
    Identity,
    LanczosDownscale,
    Mask,
    box_mask,
    disk_kernel,
    gaussian_kernel,
    image_kernel,
    motion_kernel,
    random_mask,
    stripe_mask,
)
from ..operators.base import Shape
from .types import CATEGORY, LinearOperatorType, OperatorRecipe

PREVIEW = 256  # pixels; a pattern is shown on a picture of this size when its own is not known yet
FIRST = LinearOperatorType.Input(
    "operator", optional=True, tooltip="What happened to the picture before this. Leave it open when this was the first."
)
RESULT = LinearOperatorType.Output("operator", tooltip="What happened to the photo; connect it to a Measurement node.")


def seed_input(tooltip: str) -> io.Int.Input:
    return io.Int.Input("seed", default=0, min=0, max=2**63 - 1, tooltip=tooltip)


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
                                io.Int.Input("offset", default=0, min=-16384, max=16384, tooltip="First lost line."),
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
                                    tooltip="Share of all lines lost at random besides.",
                                ),
                                seed_input("Seed of the random lines."),
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
        label, keep, shape = cls._pattern(pattern)
        # Made once here too: wrong numbers are then this node's error, and the node shows the pattern.
        preview = keep(shape)
        recipe = OperatorRecipe(label, lambda full: Mask(keep(full), channels=full[0])).after(operator)
        return io.NodeOutput(
            recipe, ui=ui.PreviewImage(preview.mean(1, keepdim=True).movedim(1, -1).expand(-1, -1, -1, 3), cls=cls)
        )

    @classmethod
    def _pattern(cls, given: dict) -> tuple[str, Callable[[Shape], Tensor], Shape]:
        """In words, shape of the picture -> keep, and a shape to preview it on."""
        kind, nominal = given["pattern"], (3, PREVIEW, PREVIEW)
        if kind == "mask":
            return cls._from_mask(given["mask"], given["threshold"])
        if kind == "box":
            corner, size = (given["y"], given["x"]), (given["height"], given["width"])
            shape = (3, max(PREVIEW, corner[0] + size[0]), max(PREVIEW, corner[1] + size[1]))

            def box(full: Shape) -> Tensor:
                if corner[0] + size[0] > full[1] or corner[1] + size[1] > full[2]:
                    raise ValueError(
                        f"box: reaches to x = {corner[1] + size[1]}, y = {corner[0] + size[0]}, beyond the picture of {full[2]} x "
                        f"{full[1]}; lower x, y, width or height"
                    )
                return box_mask(full, size, corner)

            return f"a missing box of {size[1]} x {size[0]}", box, shape
        if kind == "random":
            lost, seed, each = given["fraction"], given["seed"], given["per_channel"]
            return f"{lost:.0%} of the pixels missing", lambda full: random_mask(full, lost, seed, each), nominal
        if 0 < given["period"] <= given["width"]:
            raise ValueError(
                f"pattern: stripes {given['width']} wide every {given['period']} lines leave nothing; raise period or lower width"
            )
        lines = {key: given[key] for key in ("width", "offset", "direction", "fraction", "seed")}
        return "missing lines", lambda full: stripe_mask(full, given["period"] or None, **lines), nominal

    @staticmethod
    def _from_mask(mask: Tensor, threshold: float) -> tuple[str, Callable[[Shape], Tensor], Shape]:
        mask = mask[None] if mask.ndim == 2 else mask
        keep = (mask < threshold)[:, None].float()
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

        return f"{1 - float(keep.double().mean()):.1%} of the pixels missing", bind, (3, height, width)


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
        return io.NodeOutput(recipe.after(operator))


class BlurOperator(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        degrees = {"min": -180.0, "max": 180.0, "step": 1.0}
        return io.Schema(
            node_id="PosteriorBlur",
            display_name="Blur",
            category=f"{CATEGORY}/operators",
            description="The photo is blurred: out of focus, shaken, or softened.",
            search_aliases=["deblur", "sharpen", "out of focus", "motion blur", "gaussian blur", "deconvolution", "restore"],
            inputs=[
                io.DynamicCombo.Input(
                    "kernel",
                    tooltip="Shape of the blur: what a single bright point becomes.",
                    options=[
                        io.DynamicCombo.Option(
                            "gaussian",
                            [
                                io.Float.Input(
                                    "sigma",
                                    default=3.0,
                                    min=0.05,
                                    max=100.0,
                                    step=0.1,
                                    tooltip="Width in pixels, standard deviation.",
                                ),
                                io.Float.Input(
                                    "sigma_across",
                                    default=0.0,
                                    min=0.0,
                                    max=100.0,
                                    step=0.1,
                                    tooltip="Width across the angle when it differs; 0 is the same in all directions.",
                                ),
                                io.Float.Input(
                                    "angle", default=0.0, **degrees, tooltip="Direction of sigma in degrees, anticlockwise."
                                ),
                            ],
                        ),
                        io.DynamicCombo.Option(
                            "motion",
                            [
                                io.Float.Input(
                                    "length",
                                    default=15.0,
                                    min=0.1,
                                    max=500.0,
                                    step=0.5,
                                    tooltip="Length of the path in pixels.",
                                ),
                                io.Float.Input("angle", default=0.0, **degrees, tooltip="Direction in degrees, anticlockwise."),
                                io.Float.Input(
                                    "intensity",
                                    default=0.0,
                                    min=0.0,
                                    max=4.0,
                                    step=0.1,
                                    tooltip="0 is a straight line; larger bends the path at random, like a shaking hand.",
                                ),
                                seed_input("Seed of the bent path."),
                            ],
                        ),
                        io.DynamicCombo.Option(
                            "disk",
                            [
                                io.Float.Input(
                                    "radius",
                                    default=4.0,
                                    min=0.3,
                                    max=200.0,
                                    step=0.1,
                                    tooltip="Radius in pixels (out of focus).",
                                )
                            ],
                        ),
                        io.DynamicCombo.Option(
                            "image",
                            [
                                io.Image.Input(
                                    "image", tooltip="A picture of the blur: white where light goes, black elsewhere."
                                )
                            ],
                        ),
                    ],
                ),
                io.Combo.Input(
                    "boundary",
                    options=["reflect", "replicate", "zero", "circular"],
                    default="reflect",
                    advanced=True,
                    tooltip="What lies beyond the picture's edge. reflect suits photos; circular is the quickest.",
                ),
                FIRST,
            ],
            outputs=[RESULT],
        )

    @classmethod
    def execute(cls, kernel: dict, boundary: str, operator: OperatorRecipe | None = None) -> io.NodeOutput:
        kind = kernel["kernel"]
        if kind == "gaussian":
            sigma, across = kernel["sigma"], kernel["sigma_across"]
            taps = gaussian_kernel((sigma, across) if across > 0 else sigma, angle=kernel["angle"])
        elif kind == "motion":
            taps = motion_kernel(kernel["length"], kernel["angle"], intensity=kernel["intensity"], seed=kernel["seed"])
        elif kind == "disk":
            taps = disk_kernel(kernel["radius"])
        else:
            if len(kernel["image"]) != 1:
                raise ValueError(f"image: got a batch of {len(kernel['image'])}, expected one picture of the blur")
            taps = image_kernel(kernel["image"][0].movedim(-1, 0))

        def bind(full: Shape) -> Blur:
            if taps.shape[0] > full[1] or taps.shape[1] > full[2]:
                raise ValueError(
                    f"kernel: the blur is {taps.shape[1]} x {taps.shape[0]} pixels, more than the picture of {full[2]} x {full[1]}; "
                    "make it smaller (sigma, length, radius or the kernel's picture)"
                )
            return Blur(taps, full, boundary)

        recipe = OperatorRecipe(f"{kind} blur", bind).after(operator)
        return io.NodeOutput(recipe, ui=ui.PreviewImage(kernel_picture(taps), cls=cls))


def kernel_picture(taps: Tensor) -> Tensor:
    """A kernel as an IMAGE, its peak white, enlarged so that single taps can be seen."""
    scale = max(1, 128 // max(taps.shape))
    picture = (taps / taps.max()).clamp(0, 1).float()
    picture = picture.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    return picture[None, :, :, None].expand(-1, -1, -1, 3)


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
        return io.NodeOutput(OperatorRecipe("black and white", lambda full: Grayscale(full, chosen)).after(operator))


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
        return io.NodeOutput(OperatorRecipe("noise only", Identity))


NODES = [MissingPixels, Downscale, BlurOperator, GrayscaleOperator, NoiseOnly]
