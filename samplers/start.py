"""From which noise level a run may start, given that it starts from the filled photo and not from noise alone."""

from typing import Any

import torch

# On the demo prior's tuning split (benchmarks/results/latent_tuning.md). The paper of C-PiGDM starts at 2.03.
LOWEST = 2.4  # for data of unit variance, sigma from which every fault of the filled photo but a hole drowns in the noise
HOLE = 6.0  # side of the hole, in pixels of the state, that drowns there, too


def largest_hole(measurement: Any) -> int:
    """Side, in pixels, of the largest square window of the picture that no measured value depends on; 0 if there is none.

    Weights below 1e-5 of the largest count as none: the tails of a blur.

    Args:
        measurement: `y` (1 or B, c, h, w), `operator`. Of a batch the largest hole of all counts.
    """
    operator, y = measurement.operator, measurement.y
    draws = torch.randn(2, *y.shape[1:], generator=torch.Generator().manual_seed(0)).to(y)
    # Random values, as those of ones cancel in operators with negative weights. A lost value of y is not read from.
    reached = sum(operator.A_adjoint(draw.expand_as(y).contiguous()).abs() for draw in draws).amax(1)
    seen = (reached > 1e-5 * reached.amax((1, 2), keepdim=True)).long()
    # Sums over all rectangles from the top left corner give those over every window.
    sums = torch.nn.functional.pad(seen.cumsum(1).cumsum(2), (1, 0, 1, 0))

    def fits(s: int) -> bool:
        return bool((sums[:, s:, s:] - sums[:, :-s, s:] - sums[:, s:, :-s] + sums[:, :-s, :-s] == 0).any())

    low, high = 0, min(seen.shape[1:])
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def start_level(measurement: Any, ratio: int) -> float:
    """sigma, for data of unit variance, from which the noise hides what is wrong with `fill_unseen(measurement)`.

    Starting higher spends network calls on what the photo says already. What is wrong with a filled hole is as large as the hole,
    and noise of sigma leaves of a mean over n x n values sigma / n: the level is in proportion to the hole's side.

    Args:
        measurement: as for `largest_hole`.
        ratio: side of a pixel of the state, in pixels of the picture: 8 for most latents.
    """
    return LOWEST * max(1.0, largest_hole(measurement) / ratio / HOLE)
