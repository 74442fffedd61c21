"""Measure the degradation on the photo itself: noise level, lost lines, and blur.

Every function takes images (B, C, H, W) in [-1, 1] units and returns its estimate with its uncertainty, or raises ValueError
saying why this photo does not tell.
"""

from .blur import BlurEstimate, estimate_blur_from_edge, estimate_gaussian_blur
from .noise import NoiseEstimate, estimate_noise_sigma
from .point import PointEstimate, estimate_blur_from_point
from .stripes import StripeEstimate, estimate_stripe_mask

__all__ = [
    "BlurEstimate",
    "NoiseEstimate",
    "PointEstimate",
    "StripeEstimate",
    "estimate_blur_from_edge",
    "estimate_blur_from_point",
    "estimate_gaussian_blur",
    "estimate_noise_sigma",
    "estimate_stripe_mask",
]
