"""Posterior samplers as k-diffusion functions. Imports torch only; an operator is used through its public methods."""

from .cpigdm import sample_cpigdm
from .pixels import enforce_consistency, expected_error, feather_holes, measured
from .psld import sample_psld
from .start import fill_unseen, largest_hole, start_level
from .states import State

__all__ = [
    "State",
    "enforce_consistency",
    "expected_error",
    "feather_holes",
    "fill_unseen",
    "largest_hole",
    "measured",
    "sample_cpigdm",
    "sample_psld",
    "start_level",
]
