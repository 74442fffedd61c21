"""What the estimators share."""

import torch
from torch import Tensor

CLIPPED = 1 - 1 / 255  # at least this far from grey, a pixel of an 8-bit photo is black or white
LEVEL = 0.006  # under one 8-bit level: differences below it say nothing
MAD = 0.6744897501960817  # median |n| of a standard normal


def as_images(name: str, image: Tensor, one: bool = False) -> Tensor:
    """Check a batch of images and return it in float64 on the CPU, detached."""
    if not isinstance(image, Tensor) or not image.is_floating_point():
        kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"{name}: got {kind}, expected a floating-point tensor")
    if image.ndim != 4 or 0 in image.shape or (one and len(image) != 1):
        raise ValueError(f"{name}: got shape {tuple(image.shape)}, expected ({1 if one else 'batch'}, channels, height, width)")
    image = image.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(image).all()):
        raise ValueError(f"{name}: has NaN or infinite values")
    return image
