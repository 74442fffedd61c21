"""What the samplers refuse: one place, so that all of them say the same."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def check_choices(choices: Mapping[str, tuple[str, tuple[str, ...]]]) -> None:
    """name -> (value, allowed values)."""
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, allowed))}")


def check_common(x: Tensor, sigmas: Tensor, measurement: Any, eta: float, inner_steps: int, last_steps: int) -> Any:
    """Arguments that all samplers have. Returns the measurement with a y for each image of x: one photo may have several samples."""
    if not 0 <= eta < float("inf"):
        raise ValueError(f"eta: got {eta}, expected a finite number >= 0: 0 is DDIM, 1 is DDPM")
    for name, value in (("inner_steps", inner_steps), ("last_steps", last_steps)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    if sigmas.ndim != 1 or not bool(((sigmas[:-1] >= sigmas[1:]) & (sigmas[:-1] > 0)).all()) or float(sigmas.min()) < 0:
        raise ValueError(f"sigmas: got {sigmas.tolist()}, expected a falling list of numbers > 0, the last one >= 0")
    if len(measurement.y) not in (1, len(x)):
        raise ValueError(f"x: got a batch of {len(x)} for a measurement of {len(measurement.y)}, expected equal batches")
    if len(measurement.y) < len(x):
        measurement = dataclasses.replace(measurement, y=measurement.y.expand(len(x), -1, -1, -1))
    return measurement
