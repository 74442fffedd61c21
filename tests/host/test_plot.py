"""The plot of a run, by its pixels."""

from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor


def line(plot: Tensor) -> dict[int, float]:
    """Where the curve is, as column -> mean row."""
    pixels = (plot[0] * 255).round().numpy()
    rows, columns = np.nonzero((pixels == (31, 119, 180)).all(-1))
    return {int(c): float(rows[columns == c].mean()) for c in np.unique(columns)}


def test_plot_is_the_logarithm_of_the_residual(nodes: ModuleType) -> None:
    """A residual that falls tenfold with every step is a straight line over the whole frame."""
    plot = nodes.plot.residual_plot([[1.0, 0.1, 0.01, 0.001]], 0.0)
    assert plot.shape == (1, 270, 480, 3)
    curve = line(plot)
    left, right = min(curve), max(curve)
    slope = (curve[right - 4] - curve[left + 4]) / (right - left - 8)
    assert slope > 0.3
    for column, row in curve.items():
        if left + 4 <= column <= right - 4:
            assert abs(row - curve[left + 4] - slope * (column - left - 4)) < 3


def test_plot_has_the_noise_every_run_and_a_residual_of_nought(nodes: ModuleType) -> None:
    falling, flat = [0.5, 0.1, 0.0], [0.3, 0.3, 0.3]
    one, two = (nodes.plot.residual_plot(curves, 0.02) for curves in ([falling], [falling, flat]))
    assert not torch.equal(one, two)
    red = ((one[0] * 255).round() == torch.tensor([214.0, 39.0, 40.0])).all(-1)
    assert int(red.any(1).sum()) > 0
    assert int(red.sum(1).max()) > 150  # the broken line
    none = nodes.plot.residual_plot([falling], 0.0)
    assert not bool(((none[0] * 255).round() == torch.tensor([214.0, 39.0, 40.0])).all(-1).any())
    assert nodes.plot.residual_plot([[]], 0.02) is None
    assert nodes.plot.residual_plot([[0.1]], 0.0) is not None


def test_a_power_of_ten_does_not_lie_on_the_frame(nodes: ModuleType) -> None:
    plot = nodes.plot.residual_plot([[0.1, 0.03]], 0.01)
    red = ((plot[0] * 255).round() == torch.tensor([214.0, 39.0, 40.0])).all(-1)
    assert int(red.sum(1).max()) > 150  # the broken line; the frame would hide it


@pytest.mark.parametrize("width", [392, 3080])
def test_names_stand_above_their_pictures(width: int, nodes: ModuleType) -> None:
    pictures = torch.rand(2, 30, width, 3, generator=torch.Generator().manual_seed(0))
    shown = nodes.pictures.named(pictures, ("photo", "result, degraded", "difference x 10"))
    assert torch.equal(shown[:, -30:], pictures)
    strip = shown[0, :-30]
    assert width / 30 < len(strip) < width / 20  # as large as the whole is wide
    inked = (strip < 0.5).all(-1).any(0)  # columns
    for third in inked.tensor_split(3):
        assert bool(third.any())
        assert not bool(third[:8].any() or third[-8:].any())  # in the middle of its own picture


def test_names_that_have_no_room_are_left_out(nodes: ModuleType) -> None:
    pictures = torch.rand(1, 16, 56, 3)
    assert torch.equal(nodes.pictures.named(pictures, ("photo", "result, degraded", "difference x 10")), pictures)
    assert torch.equal(nodes.pictures.named(pictures, ()), pictures)
