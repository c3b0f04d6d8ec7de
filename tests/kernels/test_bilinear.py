"""Geometry of a resize against F.interpolate in float64, and its consistency."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segmenter_fast.kernels.bilinear import Axis

AXES = st.tuples(st.integers(1, 60), st.integers(1, 200), st.integers(1, 200), st.booleans())


def make(drawn: tuple[int, int, int, bool]) -> Axis:
    size_in, size_out, kept, align_corners = drawn
    return Axis.make(size_in, size_out, min(kept, size_out), align_corners)


def resized(values: Tensor, size_out: int, align_corners: bool) -> Tensor:
    """``(N, size_in)`` -> ``(N, size_out)`` by PyTorch."""
    return F.interpolate(values[None], size=size_out, mode="linear", align_corners=align_corners)[0]


def by_taps(axis: Axis, values: Tensor) -> Tensor:
    lower, upper, weight = axis.taps()
    return values[:, lower] * (1 - weight) + values[:, upper] * weight


@given(AXES)
@settings(max_examples=200, deadline=None)
def test_taps_equal_those_of_pytorch(drawn) -> None:
    axis, align_corners = make(drawn), drawn[3]
    for values in (torch.eye(axis.size_in).double(), torch.arange(axis.size_in).double()[None]):
        expected = resized(values, axis.size_out, align_corners)[:, : axis.kept]
        torch.testing.assert_close(by_taps(axis, values), expected, rtol=0, atol=1e-11 * axis.size_in)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("position", [0, 1, 4])
def test_infinity_reaches_the_outputs_it_reaches_in_pytorch(position, align_corners) -> None:
    values = torch.zeros(1, 5, dtype=torch.float64)
    values[0, position] = torch.inf
    for size_out in (3, 5, 9, 17, 40):
        ours = by_taps(Axis.make(5, size_out, None, align_corners), values)
        torch.testing.assert_close(ours, resized(values, size_out, align_corners), equal_nan=True)


@given(AXES)
@settings(max_examples=200, deadline=None)
def test_cells_partition_the_outputs(drawn) -> None:
    axis = make(drawn)
    starts = axis.cell_starts
    assert len(starts) == axis.cells + 1
    assert starts[0] == 0
    assert starts[-1] == axis.kept
    lengths = [after - before for before, after in itertools.pairwise(starts)]
    assert min(lengths) >= 0
    assert max(lengths) <= axis.longest_cell
    assert lengths[-1] > 0, "the last cell counted holds the last kept output"


@given(AXES)
@settings(max_examples=200, deadline=None)
def test_outputs_of_a_cell_share_their_taps(drawn) -> None:
    axis = make(drawn)
    lower, upper, weight = axis.taps()
    last = axis.size_in - 1
    for cell, (start, stop) in enumerate(itertools.pairwise(axis.cell_starts), -1):
        inside = slice(start, stop)
        # Outputs before the first centre mix the inputs of cell 0.
        tap = max(cell, 0)
        assert (lower[inside] == min(tap, last)).all()
        assert (upper[inside] == min(tap + (axis.size_in != axis.size_out), last)).all()
    assert weight.min() >= 0
    assert weight.max() < 1


def test_whole_ratios_stay_small() -> None:
    axis = Axis.make(1024, 16384)
    assert (axis.step, axis.offset, axis.denominator) == (2, -15, 32)
    assert axis.longest_cell == 16
