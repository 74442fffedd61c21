"""Operator nodes: what happened to the photo. Each can follow another through its optional `operator` input."""

from .blur import BlurOperator, kernel_picture
from .downscale import Downscale
from .missing import MissingPixels
from .pixelwise import GrayscaleOperator, NoiseOnly

__all__ = ["NODES", "kernel_picture"]

NODES = [MissingPixels, Downscale, BlurOperator, GrayscaleOperator, NoiseOnly]
