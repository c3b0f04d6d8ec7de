"""Labels of bilinearly upsampled masks in plain PyTorch, by exact pruning.

All pixels of a cell lie between the smallest and the largest of its four corners. A class whose largest corner is
below another class's smallest cannot win in the cell. If one class is left, the cell is filled with it. If few are
left, only they are compared. If many are left, all classes are compared, a few cells at a time, so that their logits
stay in the cache. Where a sample of the cells shows that this costs more than it saves (noise, cells of few pixels),
all pixels are compared row by row. ``prunable``, ``Cells`` and ``cell_labels`` serve ``lattice_argmax``, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bilinear import Axis, shape_on_grid
from ..registry import statistics_dtype, widest
from .groups import used_groups

# Corners, and pixels, of the cells that are treated at once; they fit the caches.
TILE = 1 << 19
# Logits that are held at once where all classes of a cell are compared.
_CHUNK = 1 << 20
# Logits that are held at once where the image is not divided into cells.
_DENSE_CHUNK = 1 << 19
# Finding a pair of cell and class costs as much as comparing this many pixels of a class.
_PAIR = 200
# As do the bounds of a cell, those of a class in a cell, and a pixel (measured on two cores of an EPYC with AVX512,
# float32, 2 to 150 classes, scales 2 to 16).
_CELL, _BOUND, _PIXEL = 600, 9, 12
# One row and column of cells in so many is looked at.
_SAMPLE = 4


def upsample_argmax(
    masks: Tensor, size: Sequence[int], crop: Sequence[int], align_corners: bool, index: Tensor | None = None
) -> Tensor:
    """``(B, K, h, w)``, or ``(B, K, groups)`` with an index -> ``(B, H, W)``, uint8 if K <= 256 and else int32."""
    _, num_classes, h, w = shape_on_grid(masks, index)
    labels = masks.new_empty((masks.shape[0], *crop), dtype=torch.uint8 if num_classes <= 256 else torch.int32)
    if num_classes == 1:
        return labels.zero_()
    ys, xs = (Axis.make(*axis, align_corners) for axis in zip((h, w), size, crop, strict=True))
    for image, groups, out in zip(masks, [None] * len(masks) if index is None else index, labels, strict=True):
        if groups is not None:
            image = image[:, : used_groups(groups, image.shape[1])]
        grid = image.to(statistics_dtype(image.dtype)).movedim(0, -1)
        finite = is_bounded(grid)
        if finite and _pruning_pays(grid, groups, ys, xs):
            _pruned(grid, groups, ys, xs, out)
        else:
            _dense(grid, groups, ys, xs, align_corners if finite else None, out)
    return labels


def prunable(scores: Tensor, pixels: float) -> bool:
    """Return whether cells of so many pixels are worth their bounds, and no difference of scores is NaN or infinite."""
    return pixels >= 4 and is_bounded(scores)


def is_bounded(scores: Tensor) -> bool:
    """Return whether no difference of scores is NaN or infinite."""
    smallest, largest = scores.aminmax()
    return bool(torch.maximum(-smallest, largest) < 1e38)  # False for NaN


def _rows(grid: Tensor, groups: Tensor | None, at: Tensor | slice) -> Tensor:
    """Rows ``(n, w, K)`` of ``(h, w, K)`` scores, or of ``(M, K)`` ones of groups."""
    return grid[at if groups is None else groups[at]]


def _pruning_pays(grid: Tensor, groups: Tensor | None, ys: Axis, xs: Axis) -> bool:
    """Return whether ``_pruned`` is faster than ``_dense``, by the classes that are left in a sample of the cells."""
    num_classes, pixels = grid.shape[-1], ys.longest_cell * xs.longest_cell
    cost, dense = _CELL + _BOUND * num_classes, pixels * (num_classes + _PIXEL)
    if cost >= dense:
        return False
    rows = [_rows(grid, groups, slice(i, ys.size_in - 1 + i, _SAMPLE)) for i in (0, 1)]
    corners = [row[:, i : xs.size_in - 1 + i : _SAMPLE] for row in rows for i in (0, 1)]
    upper, lower = reduce(torch.maximum, corners), reduce(torch.minimum, corners)
    counts = (upper >= lower.amax(2, keepdim=True)).sum(2)
    compared = (counts * (pixels + _PAIR)).clamp(max=dense)
    return cost + float((compared * (counts > 1)).double().mean()) < dense  # False without a cell


def _dense(grid: Tensor, groups: Tensor | None, ys: Axis, xs: Axis, align_corners: bool | None, out: Tensor) -> None:
    """Write the labels of ``(h, w, K)`` scores, or of ``(M, K)`` ones of groups, a few rows at a time.

    All classes are compared at every pixel. PyTorch resizes the mixed rows along x; without ``align_corners``, for NaN
    and infinities, products do, because its resize would multiply each row by 0 once more.
    """
    grid, width = grid.contiguous(), xs.size_out
    (top, bottom, v), (left, right, u) = ys.taps(grid.device), xs.taps(grid.device)
    v, u = v.to(grid.dtype)[:, None, None], u.to(grid.dtype)[:, None]
    step = max(_DENSE_CHUNK // (width * grid.shape[-1]), 1)
    for upper, lower, weight, part in zip(*(x.split(step) for x in (top, bottom, v, out)), strict=True):
        rows = (_rows(grid, groups, upper) * (1 - weight)).addcmul_(_rows(grid, groups, lower), weight)
        if align_corners is None:
            logits = rows[:, left] * (1 - u) + rows[:, right] * u
        else:
            image = rows[None].permute(0, 3, 1, 2)  # channels-last
            image = F.interpolate(image, (len(rows), width), mode="bilinear", align_corners=align_corners)
            logits = image.permute(0, 2, 3, 1)[0, :, : xs.kept]
        part.copy_(logits.max(2).indices)  # faster than argmax


def _pruned(grid: Tensor, groups: Tensor | None, ys: Axis, xs: Axis, out: Tensor) -> None:
    """Write the labels of ``(h, w, K)`` corners, or of ``(M, K)`` ones of groups, tile by tile."""
    num_classes = grid.shape[-1]
    tile_cells = max(TILE // max(ys.longest_cell * xs.longest_cell, num_classes), 1)
    tile_x = min(tile_cells, xs.cells)
    tile_y = max(tile_cells // tile_x, 1)
    across = [_AxisCells.make(xs, first, tile_x, grid) for first in range(-1, xs.cells - 1, tile_x)]
    for first in range(-1, ys.cells - 1, tile_y):
        y = _AxisCells.make(ys, first, tile_y, grid)
        for x in across:
            if not (y.outputs and x.outputs):
                continue
            if groups is None:
                corners = grid.index_select(0, y.corners).index_select(1, x.corners)
            else:
                corners = grid[groups[y.corners[:, None], x.corners]]
            upper = torch.maximum(corners[1:], corners[:-1])
            upper = torch.maximum(upper[:, 1:], upper[:, :-1]).view(-1, num_classes)  # (cells, K)
            lower = torch.minimum(corners[1:], corners[:-1])
            lower = torch.minimum(lower[:, 1:], lower[:, :-1]).view(-1, num_classes)
            below = len(x.corners) * num_classes
            cells = Cells(corners.view(-1), below, num_classes, below, y.weights, x.weights)
            labels = cell_labels(lower, upper, cells, out.dtype)
            labels = labels.view(len(y.weights), len(x.weights), -1, x.weights.shape[1])
            image = labels.transpose(1, 2).reshape(y.weights.numel(), x.weights.numel())
            first_y, first_x = y.first_output, x.first_output
            out[first_y : first_y + y.outputs, first_x : first_x + x.outputs] = image[y.slots][:, x.slots]


@dataclass(frozen=True)
class _AxisCells:
    """Consecutive cells of one axis. Each has ``longest_cell`` slots, some of which its outputs fill."""

    corners: Tensor  # (cells + 1,) indices of inputs
    weights: Tensor  # (cells, longest_cell) of the upper corner
    slots: Tensor | slice  # (outputs,) positions of the outputs among the slots of all cells
    first_output: int
    outputs: int

    @classmethod
    def make(cls, axis: Axis, first: int, length: int, like: Tensor) -> _AxisCells:
        cells = torch.arange(first, min(first + length, axis.cells - 1) + 1, device=like.device)
        starts = torch.tensor(axis.cell_starts[first + 1 : first + 1 + len(cells)], device=like.device)
        slot = torch.arange(axis.longest_cell, device=like.device)
        # The first cell, often half a one, fills its last slots: the outputs of whole ratios then leave no gap.
        begins = torch.cat([starts[1:2] - axis.longest_cell, starts[1:-1]])
        outputs = begins[:, None] + slot  # (cells, longest_cell)
        numerators = outputs * axis.step + axis.offset - cells[:-1, None] * axis.denominator
        weights = (numerators.to(widest(like.device)) / axis.denominator).to(like.dtype)
        filled = (outputs >= starts[:-1, None]) & (outputs < starts[1:, None])
        slots = filled.flatten().nonzero()[:, 0]
        count = len(slots)
        whole = count > 0 and int(slots[-1] - slots[0]) == count - 1
        where = slice(int(slots[0]), int(slots[0]) + count) if whole else slots
        return cls(cells.clamp(0, axis.size_in - 1), weights, where, int(starts[0]), count)


def cell_labels(lower: Tensor, upper: Tensor, cells: Cells, dtype: torch.dtype) -> Tensor:
    """Labels ``(cells, rows * cols)``; ``lower`` and ``upper`` ``(cells, K)`` are the least and largest corners."""
    num_classes, pixels = lower.shape[1], cells.wy.shape[1] * cells.wx.shape[1]
    bound, winner = lower.max(1, keepdim=True)
    labels = winner.to(dtype).expand(-1, pixels).contiguous()
    alive = upper >= bound
    ties = upper == bound
    if ties.any():  # the lowest class wins: a class above the winner must exceed the bound
        alive &= ~(ties & (torch.arange(num_classes, device=lower.device) > winner))
    counts, order = alive.sum(1, dtype=torch.int32).sort(descending=True, stable=True)
    unsettled = int((counts > 1).sum())
    few = num_classes * pixels // (pixels + _PAIR)
    many = min(int((counts > few).sum()), unsettled)
    if many:
        for index in order[:many].split(max(_CHUNK // (num_classes * pixels), 1)):
            labels.index_copy_(0, index, _compare_all(cells, index, num_classes).to(dtype))
    if many < unsettled:
        index = order[many:unsettled]
        labels.index_copy_(0, index, _compare(cells, index, alive[index], counts[many:unsettled], dtype))
    return labels


@dataclass(frozen=True)
class Cells:
    """A rectangle of ``(down, across)`` cells, counted row by row, among flat scores."""

    scores: Tensor  # (corners * K,)
    stride: int  # scores from a row of cells to the next one; from a cell to the next one of its row there are K
    right: int  # scores from a cell's first corner to its right one
    below: int  # and to the one below
    wy: Tensor  # (down, rows) weights of the lower corners
    wx: Tensor  # (across, cols) weights of the right corners

    def select(self, index: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
        """Positions ``(n,)`` of the first class of these cells, weights ``(rows, n)`` and ``(cols, n)``."""
        row, column = index.div(len(self.wx), rounding_mode="floor"), index % len(self.wx)
        return row * self.stride + column * num_classes, self.wy[row].T, self.wx[column].T

    def edges(self, at: Tensor, wy: Tensor) -> tuple[Tensor, Tensor]:
        """Scores on the left edge of cells with a corner at these positions, and differences to the right edge."""
        left, right = self.scores[at], self.scores[at + self.right]
        left = left + (self.scores[at + self.below] - left) * wy
        right = right + (self.scores[at + self.below + self.right] - right) * wy
        return left, right - left


def _compare_all(cells: Cells, index: Tensor, num_classes: int) -> Tensor:
    """Labels ``(n, rows * cols)`` of the cells ``index`` ``(n,)`` by comparing all classes."""
    corner, wy, wx = cells.select(index, num_classes)
    at = corner[:, None] + torch.arange(num_classes, device=corner.device)
    left, slope = cells.edges(at, wy[:, :, None])  # (rows, n, K)
    logits = slope[:, None] * wx[:, :, None]
    logits += left[:, None]
    return logits.max(3).indices.flatten(0, 1).T.contiguous()  # twice as fast as argmax


def _compare(cells: Cells, index: Tensor, alive: Tensor, counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Labels ``(n, rows * cols)`` of the cells ``index`` ``(n,)`` by comparing the classes ``alive`` ``(n, K)``.

    ``counts`` ``(n,)`` are their numbers, which fall from cell to cell.
    """
    corner, wy, wx = cells.select(index, alive.shape[1])
    position, classes = alive.nonzero(as_tuple=True)  # one entry for each pair of cell and class
    # Order the pairs by their rank in the cell: those of one rank are contiguous and belong to the first cells.
    ranks = torch.arange(int(counts[0]), device=counts.device)[:, None]
    pairs = (ranks + (counts.cumsum(0) - counts))[ranks < counts]
    position, classes = position[pairs], classes[pairs]
    left, slope = cells.edges(corner[position] + classes, wy.index_select(1, position))
    # Labels are floats, too: comparisons into booleans, torch.where and arithmetic of bytes are slower on a CPU.
    left, slope, classes = left[:, None], slope[:, None], classes.to(left.dtype)  # (rows, 1, pairs)
    best = labels = left.new_empty(0)
    end = 0
    for alike in (ranks < counts).sum(1).tolist():
        begin, end = end, end + alike
        value = slope[..., begin:end] * wx[:, :alike]
        value += left[..., begin:end]
        if begin == 0:
            best, labels = value, classes[:end].expand(value.shape).contiguous()
            continue
        leader, label = best[..., :alike], labels[..., :alike]
        best = torch.maximum(leader, value, out=value)
        # Classes rise, so the last one to exceed its predecessors is the largest one.
        won = leader.ne_(best).mul_(classes[begin:end])
        torch.maximum(label, won, out=label)
    return labels.flatten(0, 1).to(dtype).T.contiguous()
