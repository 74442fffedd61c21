"""Linear degradation operators with exact adjoints, pseudo-inverses and spectral functions. Imports torch only."""

from .base import LinearOperator
from .downscale import AreaDownscale
from .measurement import Measurement
from .pixelwise import Identity, Mask

OPERATORS = (Identity, Mask, AreaDownscale)

__all__ = ["OPERATORS", "AreaDownscale", "Identity", "LinearOperator", "Mask", "Measurement"]
