"""Windows and lattice along one axis against dense float64 matrices of the canvas method."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segmenter_fast.inference.windows import Lattice, Windows


def resize(size_in: int, size_out: int) -> Tensor:
    """``(size_out, size_in)``: PyTorch's linear resize as a matrix."""
    unit = torch.eye(size_in, dtype=torch.float64)[None]
    return F.interpolate(unit, size=size_out, mode="linear")[0].T if size_in != size_out else unit[0]


def canvas(windows: Windows, size: int) -> Tensor:
    """``(size, patches)``: mean over the windows on a canvas of ``side`` pixels, then the resize."""
    total = torch.zeros(windows.side, len(windows.anchors) * windows.grid, dtype=torch.float64)
    count = torch.zeros(windows.side, 1)
    for index, anchor in enumerate(windows.anchors):
        pixels = slice(anchor, anchor + windows.window)
        patches = slice(index * windows.grid, (index + 1) * windows.grid)
        total[pixels, patches] += resize(windows.grid, windows.upsampled)[: windows.window]
        count[pixels] += 1
    return resize(windows.side, size) @ (total / count)


def evaluated(lattice: Lattice, patches: int) -> Tensor:
    """``(size, patches)``: the mixes of the lattice points, each one the weights of its patches."""
    points = lattice.evaluate(torch.eye(patches, dtype=torch.float64), range(len(lattice.start) - 1))
    weight = lattice.weight[:, None]
    return points[lattice.lower] * (1 - weight) + points[lattice.upper] * weight


@settings(max_examples=80, deadline=None)
@given(
    side=st.integers(1, 90),
    window=st.integers(1, 60),
    stride=st.integers(1, 60),
    patch=st.sampled_from([1, 2, 4, 16]),
    padded=st.booleans(),
    size=st.none() | st.integers(1, 130),
    mirrored=st.booleans(),
)
def test_lattice_is_the_canvas(
    side: int, window: int, stride: int, patch: int, padded: bool, size: int | None, mirrored: bool
) -> None:
    windows = Windows.make(side, window, min(stride, window), patch, padded)
    size = side if size is None else size
    expected = canvas(windows, size)
    lattice = Lattice.make(windows, size, mirrored)
    ours = evaluated(lattice, expected.shape[1])
    torch.testing.assert_close(ours, expected.flip(0) if mirrored else expected, rtol=0, atol=1e-9)


def test_few_points_stand_for_many_outputs() -> None:
    aligned = Lattice.make(Windows.make(4096, 512, 480, 16, True), 4096)
    assert len(aligned.start) - 1 <= 2 * (4096 // 16 + 20)  # two for each cell, more where windows begin and end
    scaled = Lattice.make(Windows.make(4096, 512, 480, 16, True), 3000)
    assert len(scaled.start) - 1 <= 4 * (4096 // 16 + 20)


@pytest.mark.parametrize("flip", [False, True])
def test_a_part_is_that_of_the_whole(flip: bool) -> None:
    windows = Windows.make(200, 64, 48, 16, True)
    lattice = Lattice.make(windows, 150, flip)
    table = torch.randn(len(windows.anchors) * windows.grid, 3, dtype=torch.float64)
    whole = lattice.evaluate(table, range(len(lattice.start) - 1))
    points, needed = lattice.needed(40, 61)
    assert len(needed) < len(windows.anchors)
    lowest, highest = needed.start * windows.grid, needed.stop * windows.grid
    part = lattice.evaluate(table[lowest:highest], points, lowest)
    assert torch.equal(part, whole[points.start : points.stop])
    assert min(points) <= min(lattice.lower[40:61]) <= max(lattice.upper[40:61]) <= max(points)
