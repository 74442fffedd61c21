"""What the operator nodes share: inputs, outputs, and an example of what they do."""

import torch
from comfy_api.latest import io
from torch import Tensor

from ...prior.draw import VALIDATION_SEED, draw
from ..pictures import beside
from ..types import LinearOperatorType, OperatorRecipe, to_image, to_signal

FIRST = LinearOperatorType.Input(
    "operator", optional=True, tooltip="What happened to the picture before this. Leave it open when this was the first."
)
RESULT = LinearOperatorType.Output("operator", tooltip="What happened to the photo; connect it to a Measurement node.")


def seed_input(tooltip: str, advanced: bool = False) -> io.Int.Input:
    return io.Int.Input("seed", default=0, min=0, max=2**63 - 1, advanced=advanced, tooltip=tooltip)


def example(recipe: OperatorRecipe) -> Tensor:
    """A drawn portrait, and what the operator makes of it, as an IMAGE."""
    before = torch.from_numpy(draw(VALIDATION_SEED)).float()[None] / 255
    x = to_signal("example", before)
    return beside(before, to_image(recipe.bind(tuple(x.shape[1:])).A(x)))
