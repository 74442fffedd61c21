"""Measurements as the nodes make them of pictures."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def recipe(nodes: ModuleType, bind: Any) -> Any:
    return nodes.types.OperatorRecipe("test", bind)


def simulate(nodes: ModuleType, image: Tensor, bind: Any, noise: dict[str, Any], seed: int = 0) -> Any:
    with torch.inference_mode():
        return nodes.measurement.MeasureSimulate.execute(image, recipe(nodes, bind), noise, seed)


def gaussian(sigma: float) -> dict[str, Any]:
    return {"noise": "Gaussian", "sigma": sigma}


def textured(size: int, seed: int = 0) -> Tensor:
    """A picture with slow waves, so that its flattest parts show the noise: (1, size, size, 3)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((1, 3, 5, 5), generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)
    return fine.clamp(0.1, 0.9).movedim(1, -1)


def three(nodes: ModuleType, pack: ModuleType, image: Tensor) -> list[Any]:
    ops = pack.operators
    kinds = (
        (lambda shape: ops.AreaDownscale(shape, 4), 0.02),
        (lambda shape: ops.Grayscale(shape, "709"), 0.05),
        (ops.Identity, 0.1),
    )
    return [simulate(nodes, image, bind, gaussian(sigma)).args[0] for bind, sigma in kinds]


def combine(nodes: ModuleType, *parts: Any) -> Any:
    together, *others = parts
    with torch.inference_mode():
        for part in others:
            together = nodes.measurement.CombineMeasurements.execute(together, part).args[0]
    return together
