"""Socket types, units, and the recipe that stands for an operator before a picture gives it a size."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from comfy_api.latest import io
from torch import Tensor

from ..operators import LinearOperator
from ..operators.checks import Shape
from ..operators.io import check_full_size

LinearOperatorType = io.Custom("LINEAR_OPERATOR")
MeasurementType = io.Custom("MEASUREMENT")
CATEGORY = "posterior"
BRIGHTEST = 40.0  # of a picture whose white is 1; bytes that nobody divided by 255 are brighter


@dataclass(frozen=True)
class OperatorRecipe:
    """What travels on a LINEAR_OPERATOR link: how to make the operator once the size of a picture is known.

    The user then never types a size, and the same node serves a full-size picture to degrade and a small photo to restore.

    Attributes:
        label: in plain words, for errors and read-outs.
        bind: shape (C, H, W) of the full picture -> operator.
        full_shape: shape of a photo that is y -> shape of the full picture.
    """

    label: str
    bind: Callable[[Shape], LinearOperator]
    full_shape: Callable[[Shape], Shape] = lambda shape: shape

    def on(self, full: Shape, remedy: str) -> LinearOperator:
        """The operator for full pictures of shape (C, H, W). Whoever binds a recipe to pictures of the user does it here.

        Args:
            remedy: what to change where they are too large.

        Raises:
            ValueError: a huge full picture, or one that the operator does not fit.
        """
        try:
            check_full_size("operator", full)
        except ValueError as error:
            raise ValueError(f"{error}; {remedy}") from error
        try:
            return self.bind(full)
        except ValueError as error:  # which names an input of the operator's node
            raise ValueError(f"operator: {error}") from error

    def after(self, first: "OperatorRecipe | None") -> "OperatorRecipe":
        """The recipe for: `first` happened to the picture, and then this."""
        if first is None:
            return self

        def bind(shape: Shape) -> LinearOperator:
            inner = first.bind(shape)
            return self.bind(inner.out_shape) @ inner

        return OperatorRecipe(f"{first.label}, then {self.label}", bind, lambda shape: first.full_shape(self.full_shape(shape)))


def to_signal(name: str, image: Tensor) -> Tensor:
    """IMAGE (B, H, W, C) in [0, 1] -> (B, 3, H, W) in [-1, 1].

    In float64, where 2 x - 1 loses nothing of values above 1e-8: a kept pixel comes back bit-exact. On the CPU, as measurements are; with
    --gpu-only pictures come from elsewhere. An alpha channel is dropped where it says nothing, being 1 throughout.
    """
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4) or image.numel() == 0:
        raise ValueError(
            f"{name}: got shape {tuple(image.shape)}, expected at least one picture, (batch, height, width, 1, 3 or 4 channels)"
        )
    if not bool(torch.isfinite(image).all()):
        raise ValueError(f"{name}: has NaN or infinite values; the node before it went wrong")
    largest = float(image.abs().max())
    if largest > BRIGHTEST:
        raise ValueError(
            f"{name}: has values of up to {largest:.3g}, but pictures are 0 to 1 in ComfyUI; divide it by its white first, 255 for bytes"
        )
    if image.shape[-1] == 4 and bool((image[..., 3] != 1).any()):
        raise ValueError(
            f"{name}: is transparent in places. Load it with Load Image, which gives picture and mask apart, or drop alpha with "
            "Split Image with Alpha"
        )
    image = image.expand(*image.shape[:-1], 3) if image.shape[-1] == 1 else image[..., :3]
    return image.cpu().movedim(-1, 1).double() * 2 - 1


def to_image(signal: Tensor) -> Tensor:
    """(B, 1 or 3, H, W) in [-1, 1] -> IMAGE (B, H, W, 3), float32; not clamped."""
    image = ((signal + 1) / 2).movedim(1, -1).float()
    return image.expand(*image.shape[:-1], 3) if image.shape[-1] == 1 else image
