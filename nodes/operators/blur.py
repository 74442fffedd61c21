"""Blur: a Gaussian, a movement, a disk, or any picture of a point."""

from comfy_api.latest import io
from torch import Tensor

from ...operators import Blur, disk_kernel, gaussian_kernel, image_kernel, motion_kernel
from ...operators.checks import Shape
from ..pictures import shown
from ..types import CATEGORY, OperatorRecipe, to_signal
from .sockets import FIRST, RESULT, seed_input


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
            picture = (to_signal("image", kernel["image"]) + 1) / 2
            if len(picture) != 1:
                raise ValueError(f"image: got a batch of {len(picture)}, expected one picture of the blur")
            taps = image_kernel(picture[0]).float()  # all that is known of it: Blur looks for its factors to that

        def bind(full: Shape) -> Blur:
            if taps.shape[0] > full[1] or taps.shape[1] > full[2]:
                raise ValueError(
                    f"kernel: the blur is {taps.shape[1]} x {taps.shape[0]} pixels, more than the picture of {full[2]} x {full[1]}; "
                    "make it smaller (sigma, length, radius or the kernel's picture)"
                )
            return Blur(taps, full, boundary)

        recipe = OperatorRecipe(f"{kind} blur", bind).after(operator)
        return io.NodeOutput(recipe, ui=shown(cls, kernel_picture(taps)))


def kernel_picture(taps: Tensor) -> Tensor:
    """A kernel as an IMAGE, its peak white."""
    return (taps / taps.max()).clamp(0, 1).float()[None, :, :, None].expand(-1, -1, -1, 3)
