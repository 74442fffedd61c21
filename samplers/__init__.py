"""Posterior samplers as k-diffusion functions. Imports torch only; an operator is used through its public methods."""

from .psld import sample_psld

__all__ = ["sample_psld"]
