"""Linear degradation operators with exact adjoints, pseudo-inverses and spectral functions. Imports torch only."""

from .adapters import from_deepinv
from .base import LinearOperator
from .blur import Blur
from .calibration import (
    estimate_blur_from_edge,
    estimate_blur_from_point,
    estimate_gaussian_blur,
    estimate_noise_sigma,
    estimate_stripe_mask,
)
from .compose import Product
from .crop import Crop
from .dense import Dense
from .downscale import AreaDownscale, BicubicDownscale, LanczosDownscale
from .iterative import ConvergenceError
from .kernels import disk_kernel, gaussian_kernel, image_kernel, motion_kernel
from .masks import box_mask, random_mask, stripe_mask
from .measurement import Measurement
from .pixelwise import Grayscale, Identity, Mask, Scale
from .stack import Stack

OPERATORS = (
    Identity,
    Scale,
    Mask,
    Crop,
    Grayscale,
    AreaDownscale,
    BicubicDownscale,
    LanczosDownscale,
    Blur,
    Dense,
    Stack,
    Product,
)

_IO = ("load_measurement", "load_operator", "save_measurement", "save_operator")


def __getattr__(name: str) -> object:
    """Saving and loading needs safetensors; everything else only torch."""
    if name in _IO:
        from . import io

        return getattr(io, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "OPERATORS",
    "AreaDownscale",
    "BicubicDownscale",
    "Blur",
    "ConvergenceError",
    "Crop",
    "Dense",
    "Grayscale",
    "Identity",
    "LanczosDownscale",
    "LinearOperator",
    "Mask",
    "Measurement",
    "Product",
    "Scale",
    "Stack",
    "box_mask",
    "disk_kernel",
    "estimate_blur_from_edge",
    "estimate_blur_from_point",
    "estimate_gaussian_blur",
    "estimate_noise_sigma",
    "estimate_stripe_mask",
    "from_deepinv",
    "gaussian_kernel",
    "image_kernel",
    "load_measurement",
    "load_operator",
    "motion_kernel",
    "random_mask",
    "save_measurement",
    "save_operator",
    "stripe_mask",
]
