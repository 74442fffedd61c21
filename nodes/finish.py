"""The last step: make the picture agree with the photo, and say by how much it did."""

import torch
from comfy_api.latest import io
from torch import Tensor

from ..operators import ConvergenceError, Mask, Measurement
from ..samplers import enforce_consistency, feather_holes
from . import host
from .measurement import ROUNDED, check_result, single, which
from .pictures import shown
from .readouts import compared
from .types import BRIGHTEST, CATEGORY, MeasurementType, to_image, to_signal

FEATHER = 4.0  # pixels


class Finish(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PosteriorFinish",
            display_name="Finish",
            category=f"{CATEGORY}/measurement",
            description="Correct the decoded picture as little as possible so that it agrees with the photo: exactly when the photo is "
            "noise-free (kept pixels come back bit-exact), as far as the noise allows otherwise. Shows |A x - y| before and after.",
            search_aliases=["consistency", "data consistency", "composite", "exact pixels"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Image.Input("image", tooltip="The decoded result."),
                MeasurementType.Input("measurement", tooltip="The measurement it was restored from."),
                io.Float.Input(
                    "error",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    advanced=True,
                    tooltip="With noise only: expected error of the picture before this node, on the 0 to 1 scale. Larger follows the "
                    "noisy photo more closely, its grain too; much above the noise is mostly the noisy photo. 0 is automatic: what the picture's own "
                    "distance to the photo says.",
                ),
                io.Float.Input(
                    "feather",
                    default=FEATHER,
                    min=0.0,
                    max=64.0,
                    step=0.5,
                    optional=True,
                    advanced=True,
                    tooltip="Soft edge of holes, in pixels, inside the hole only: what the correction changed next to the hole fades out "
                    "into it, so that no seam shows. Kept pixels stay exact. 0 is a hard edge.",
                ),
            ],
            outputs=[
                io.Image.Output("image", tooltip="The picture that agrees with the photo."),
                io.Float.Output(
                    "residual",
                    tooltip="|A x - y| after, root mean square on the 0 to 1 scale, worst of the batch and of combined photos.",
                ),
            ],
        )

    @classmethod
    def execute(cls, image: Tensor, measurement: Measurement, error: float, feather: float = FEATHER) -> io.NodeOutput:
        x = check_result("image", image, measurement)
        finished, rms, text = finish(x, measurement, error, feather)
        return io.NodeOutput(finished, rms, ui=shown(cls, finished, text=text))


def finish(x: Tensor, measurement: Measurement, error: float = 0.0, feather: float = FEATHER) -> tuple[Tensor, float, str]:
    """Make pictures agree with their measurement.

    Args:
        x: (B, 3, H, W) in [-1, 1], float64.
        measurement: on any device, in any precision.
        error: of x around the truth, on the 0 to 1 scale; used with noise only, 0 is what its residual says.
        feather: width of the soft edge inside holes, in pixels.

    Returns:
        IMAGE (B, H, W, 3); |A x - y| after, root mean square on the 0 to 1 scale, worst of the batch and
        of combined photos; a read-out in words.

    Raises:
        ValueError: the measurement cannot be met exactly and claims no noise, or only by a picture beyond all bounds.
    """
    measurement = host.stoppable(measurement, torch.float64)
    photos = single(measurement)
    try:
        agreed = enforce_consistency(x, measurement, 2 * error or None, photos=photos)
    except ConvergenceError as fault:
        raise ValueError(
            f"measurement: this operator cannot be met exactly ({fault}). Give its Measurement node a sigma above 0; {ROUNDED} stands "
            "for the rounding of an 8-bit photo"
        ) from fault
    if feather > 0 and isinstance(measurement.operator, Mask):
        agreed = feather_holes(x, agreed, measurement.operator.keep.to(x), feather)
    finished = to_image(agreed)
    largest = float(finished.abs().max())
    if largest > BRIGHTEST:
        raise ValueError(
            f"measurement: to agree with this photo as far as its sigma says, {measurement.sigma / 2:.2g}, the picture would need values of up to "
            f"{largest:.2g}. Give its Measurement node a larger sigma: {ROUNDED} stands for the rounding of an 8-bit photo, 0.01 for a JPEG"
        )
    lines, worst = [], 0.0
    found = [[compared(photo.operator.A(v), photo) for v in (x, to_signal("image", finished))] for photo in photos]
    for i in range(len(x)):
        for k, (before, after) in enumerate(found):
            name = which(picture=(i, len(x)), photo=(k, len(photos)))
            noise = f" (noise {after[i].sigma:.3g})" if after[i].sigma else ""
            lines.append(f"{name}|A x - y| {before[i].rms:.1e} -> {after[i].rms:.1e}{noise}")
            worst = max(worst, after[i].rms)
    farthest = max((one.sigmas for _, after in found for one in after if not one.agrees), default=0.0)
    if farthest:
        times = f"{farthest:.3g} times the noise" if measurement.sigma else "not met"
        lines.append(
            f"does not agree with the photo, {times}: the operator or its sigma is wrong, or the samples are; see the Consistency node"
        )
    if all(one.rms < 0.3 * one.sigma for before, _ in found for one in before):
        lines.append("far below the noise: sigma is probably too high")
    return finished, worst, "\n".join(lines)


NODES = [Finish]
