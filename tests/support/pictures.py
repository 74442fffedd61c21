"""Seeded pictures for the tests of nodes."""

import torch
from torch import Tensor


def noise_like(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def picture(*size: int, seed: int = 0, batch: int = 1) -> Tensor:
    """Smooth waves, IMAGE (batch, h, w, 3) in [0.2, 0.8]."""
    coarse = noise_like(batch, 3, 4, 4, seed=seed).float() * 0.6 + 0.2
    fine = torch.nn.functional.interpolate(coarse, size or (48, 64), mode="bilinear", align_corners=True)
    return fine.movedim(1, -1)
