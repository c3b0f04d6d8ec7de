"""Sliding windows along one axis, and the lattice of points that output pixels mix; both axes are separable.

Canvas pixel y is the mean of the windows that cover it, each a bilinear tap of that window's patches; the canvas is
resized bilinearly to the output. So output y is a weighted sum of a few patch rows, a sparse row A[y], and between two
bends A is linear in y. Evaluating it at the first and the last output of each run is enough: these are the points of a
lattice. Every output between them is a bilinear mix of four lattice points, whatever the windows and scales are.

Source: the official program's inference; weights in exact integer arithmetic and float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.bilinear import Axis

# Smallest second difference of weights that counts as a bend. Weights are at most 1; rounding leaves 1e-15.
_BEND = 1e-9
# Sparse tensors are valid by construction. PyTorch 2.11 warns unless it is told so around all that is done with them.
_unchecked = torch.sparse.check_sparse_tensor_invariants(False)


@dataclass(frozen=True)
class Windows:
    """Windows along one axis of an image of ``side`` pixels, cut to it where it is shorter.

    Each is a ``grid`` of patches, upsampled to ``upsampled`` pixels, of which the first ``window`` are kept.
    """

    side: int
    window: int
    grid: int
    upsampled: int
    anchors: tuple[int, ...]

    @classmethod
    def make(cls, side: int, window: int, stride: int, patch: int, padded: bool) -> Windows:
        """Put windows at every stride, and a last one at the border. ``padded``: masks cover whole patches."""
        window = min(window, side)
        grid = -(-window // patch)
        last = side - window
        return cls(side, window, grid, grid * patch if padded else window, (*range(0, last, stride), last))

    def taps(self, size: int) -> tuple[Tensor, Tensor]:
        """Patches (int64) and weights (float64), ``(size, taps)``, of the outputs of an axis resized to ``size``.

        Patch g of window w is w * grid + g. Some weights are 0, and a patch may occur twice.
        """
        anchors, pixels = torch.tensor(self.anchors), torch.arange(self.side)
        first = torch.searchsorted(anchors + self.window, pixels, right=True)
        cover = torch.searchsorted(anchors, pixels, right=True) - first
        window = first[:, None] + torch.arange(int(cover.max()))  # (side, windows over a pixel)
        covers = window < (first + cover)[:, None]
        window = window.where(covers, first[:, None])
        inside = pixels[:, None] - anchors[window]
        lower, upper, weight = Axis.make(self.grid, self.upsampled, self.window).taps()
        share = covers.double() / cover[:, None]
        weight = weight[inside]
        patches = torch.cat([window * self.grid + end[inside] for end in (lower, upper)], 1)
        weights = torch.cat([share * (1 - weight), share * weight], 1)
        if size == self.side:
            return patches, weights
        lower, upper, weight = Axis.make(self.side, size).taps()
        weight = weight[:, None]
        weights = torch.cat([weights[lower] * (1 - weight), weights[upper] * weight], 1)
        return torch.cat([patches[lower], patches[upper]], 1), weights


@dataclass(frozen=True)
class Lattice:
    """Points along one axis, and for each of ``size`` outputs the two points that it mixes.

    Point p is the sum of ``weights[start[p]:start[p + 1]]`` times the patches of the same places.
    """

    windows: Windows
    lower: Tensor  # (size,) int64, a point
    upper: Tensor  # (size,) int64, a point
    weight: Tensor  # (size,) float64, of the upper point
    start: Tensor  # (points + 1,) int64
    patches: Tensor  # int64
    weights: Tensor  # float64

    @classmethod
    @lru_cache(maxsize=64)  # views of one image, and images of one size, share lattices
    @_unchecked
    def make(cls, windows: Windows, size: int, mirrored: bool = False) -> Lattice:
        """The lattice of ``windows`` resized to ``size`` outputs, in reversed order where ``mirrored``."""
        patches, weights = windows.taps(size)
        if mirrored:
            patches, weights = patches.flip(0), weights.flip(0)
        outputs = torch.arange(size)[:, None].expand_as(patches)
        there = weights != 0
        table = torch.stack([outputs[there], patches[there]]), weights[there]
        first, last = _runs(*table, size)
        # A point for each end of a run; a run of one output has one, and mixes it with itself.
        single = first == last
        count = 2 - single.long()
        begin = count.cumsum(0) - count
        length = last - first + 1
        position = torch.arange(size) - first.repeat_interleave(length)
        weight = position.double() / (length - 1).clamp(min=1).repeat_interleave(length)
        weight[single.repeat_interleave(length)] = 0.5
        points = torch.stack([first, last], 1)[torch.stack([torch.ones_like(single), ~single], 1)]
        rows = torch.sparse_coo_tensor(*table, (size, int(patches.max()) + 1)).coalesce()
        begins = torch.searchsorted(rows.indices()[0].contiguous(), torch.arange(size + 1))
        taken = begins.diff()[points]
        start = F.pad(taken.cumsum(0), (1, 0))
        entries = torch.arange(int(start[-1])) + (begins[points] - start[:-1]).repeat_interleave(taken)
        return cls(
            windows,
            begin.repeat_interleave(length),
            (begin + count - 1).repeat_interleave(length),
            weight,
            start,
            rows.indices()[1, entries],
            rows.values()[entries],
        )

    def needed(self, first: int, last: int) -> tuple[range, range]:
        """Return the points that outputs ``[first, last)`` mix, and the windows whose patches these points take."""
        points = range(int(self.lower[first]), int(self.upper[last - 1]) + 1)
        patches = self.patches[int(self.start[points.start]) : int(self.start[points.stop])]
        grid = self.windows.grid
        return points, range(int(patches.min()) // grid, int(patches.max()) // grid + 1)

    def evaluate(self, table: Tensor, points: range, offset: int = 0) -> Tensor:
        """``(patches, n)`` values, the first one that of patch ``offset`` -> ``(len(points), n)``."""
        begin, end = int(self.start[points.start]), int(self.start[points.stop])
        return F.embedding_bag(
            (self.patches[begin:end] - offset).to(table.device),
            table,
            (self.start[points.start : points.stop] - begin).to(table.device),
            mode="sum",
            per_sample_weights=self.weights[begin:end].to(table),
        )


@_unchecked
def _runs(places: Tensor, weights: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return first and last outputs of the linear runs of a table ``(2, n)``, ``(n,)``; no run has two outputs."""
    shifts, factors = torch.tensor([-1, 0, 1]), torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)
    outputs = (places[0] + shifts[:, None]).flatten()
    values = (weights * factors[:, None]).flatten()
    inner = (outputs > 0) & (outputs < size - 1)
    differences = torch.sparse_coo_tensor(
        torch.stack([outputs[inner], places[1].repeat(3)[inner]]),
        values[inner],
        (size, int(places[1].max()) + 1),
    ).coalesce()
    bends = differences.indices()[0, differences.values().abs() > _BEND].unique()
    ends, begin = [], 0
    for bend in [*bends.tolist(), size - 1]:
        if bend == begin + 1:  # two outputs become a run each, so that no point of weight 0 is mixed in
            ends.append(begin)
        if bend >= begin + 1 or bend == size - 1:
            ends.append(bend)
            begin = bend + 1
    last = torch.tensor(sorted(set(ends)))
    return F.pad(last[:-1] + 1, (1, 0)), last
