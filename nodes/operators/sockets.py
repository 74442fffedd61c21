"""Inputs and outputs that the operator nodes share."""

from comfy_api.latest import io

from ..types import LinearOperatorType

FIRST = LinearOperatorType.Input(
    "operator", optional=True, tooltip="What happened to the picture before this. Leave it open when this was the first."
)
RESULT = LinearOperatorType.Output("operator", tooltip="What happened to the photo; connect it to a Measurement node.")


def seed_input(tooltip: str) -> io.Int.Input:
    return io.Int.Input("seed", default=0, min=0, max=2**63 - 1, tooltip=tooltip)
