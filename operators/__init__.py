"""Linear degradation operators with exact adjoints, pseudo-inverses and spectral functions. Imports torch only."""

from .adapters import from_deepinv
from .base import LinearOperator
from .blur import Blur
from .compose import Product
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
    Grayscale,
    AreaDownscale,
    BicubicDownscale,
    LanczosDownscale,
    Blur,
    Dense,
    Stack,
    Product,
)

__all__ = [
    "OPERATORS",
    "AreaDownscale",
    "BicubicDownscale",
    "Blur",
    "ConvergenceError",
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
    "from_deepinv",
    "gaussian_kernel",
    "image_kernel",
    "motion_kernel",
    "random_mask",
    "stripe_mask",
]
