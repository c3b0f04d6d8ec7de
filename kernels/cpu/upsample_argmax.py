"""Labels of bilinearly upsampled masks in plain PyTorch, by exact pruning.

All pixels of a cell lie between the smallest and the largest of its four corners. A class whose largest corner is
below another class's smallest cannot win in the cell. One class left: the cell is filled. Few left: only they are
compared. Many left (noise): all classes are, a few cells at a time, so that their logits never leave the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bilinear import Axis
from ..registry import statistics_dtype

# Corners, and pixels, of the cells that are treated at once: about what the caches take.
TILE = 1 << 19
# Logits of the cells without pruning that are held at once.
_CHUNK = 1 << 20
# The same for the path that knows no cells.
_UNPRUNED_CHUNK = 32 << 20
# Cells smaller than this, in pixels, are not worth their bounds.
SMALLEST = 4
# Beyond it, differences of corners may overflow.
LARGEST = 1e38
# A pair of cell and class costs as much to find as this many pixels to compare.
_PAIR = 200


def upsample_argmax(masks: Tensor, size: Sequence[int], crop: Sequence[int], align_corners: bool) -> Tensor:
    """``(B, K, h, w)`` -> ``(B, H, W)``, uint8 where K <= 256 and int32 otherwise."""
    _, num_classes, h, w = masks.shape
    labels = masks.new_empty((masks.shape[0], *crop), dtype=torch.uint8 if num_classes <= 256 else torch.int32)
    if num_classes == 1:
        return labels.zero_()
    ys, xs = (Axis.make(*axis, align_corners) for axis in zip((h, w), size, crop, strict=True))
    for image, out in zip(masks, labels, strict=True):
        image = image.to(statistics_dtype(image.dtype))
        smallest, largest = image.aminmax()
        # NaN fails the comparison, too.
        if ys.longest_cell * xs.longest_cell >= SMALLEST and torch.maximum(-smallest, largest) < LARGEST:
            _pruned(image.permute(1, 2, 0), ys, xs, out)
        else:
            _unpruned(image, size, align_corners, out)
    return labels


def _unpruned(image: Tensor, size: Sequence[int], align_corners: bool, out: Tensor) -> None:
    """PyTorch's own arithmetic, a few classes at a time; for NaN, infinities and cells of hardly a pixel."""
    height, width = out.shape
    best = image.new_full((height, width), -torch.inf)
    out.zero_()
    step = max(_UNPRUNED_CHUNK // (size[0] * size[1]), 1)
    for first in range(0, len(image), step):
        part = image[None, first : first + step].contiguous()
        logits = F.interpolate(part, size=tuple(size), mode="bilinear", align_corners=align_corners)
        value, index = logits[0, :, :height, :width].max(0)
        wins = (value > best) | (value.isnan() & ~best.isnan())
        best = torch.where(wins, value, best)
        out.copy_(torch.where(wins, index + first, out))


def _pruned(grid: Tensor, ys: Axis, xs: Axis, out: Tensor) -> None:
    """Labels of ``(h, w, K)`` corners, tile by tile."""
    rows, cols = ys.longest_cell, xs.longest_cell
    tile_cells = max(TILE // max(rows * cols, grid.shape[2]), 1)
    tile_x = min(tile_cells, xs.cells)
    tile_y = max(tile_cells // tile_x, 1)
    across = [_Strip.make(xs, first, tile_x, grid) for first in range(-1, xs.cells - 1, tile_x)]
    for first in range(-1, ys.cells - 1, tile_y):
        y = _Strip.make(ys, first, tile_y, grid)
        for x in across:
            if y.outputs and x.outputs:
                corners = grid.index_select(0, y.corners).index_select(1, x.corners)
                labels = _labels(corners, y.weights, x.weights, out.dtype)
                image = labels.transpose(1, 2).reshape(y.weights.numel(), x.weights.numel())
                first_y, first_x = y.first_output, x.first_output
                out[first_y : first_y + y.outputs, first_x : first_x + x.outputs] = image[y.slots][:, x.slots]


@dataclass(frozen=True)
class _Strip:
    """Consecutive cells of an axis. Each has ``longest_cell`` slots, and its outputs fill some of them."""

    corners: Tensor  # (cells + 1,) indices of inputs
    weights: Tensor  # (cells, longest_cell) of the upper corner
    slots: Tensor | slice  # (outputs,) where they lie among the slots of all cells
    first_output: int
    outputs: int

    @classmethod
    def make(cls, axis: Axis, first: int, length: int, like: Tensor) -> _Strip:
        cells = torch.arange(first, min(first + length, axis.cells - 1) + 1, device=like.device)
        starts = torch.tensor([axis.start(cell) for cell in cells.tolist()], device=like.device)
        slot = torch.arange(axis.longest_cell, device=like.device)
        # The first cell, often half a one, fills its last slots: in whole ratios the outputs then leave no gap.
        begins = torch.cat([starts[1:2] - axis.longest_cell, starts[1:-1]])
        outputs = begins[:, None] + slot  # (cells, longest_cell)
        numerators = outputs * axis.step + axis.offset - cells[:-1, None] * axis.denominator
        weights = (numerators.double() / axis.denominator).to(like.dtype)
        filled = (outputs >= starts[:-1, None]) & (outputs < starts[1:, None])
        slots = filled.flatten().nonzero()[:, 0]
        count = len(slots)
        whole = count > 0 and int(slots[-1] - slots[0]) == count - 1
        where = slice(int(slots[0]), int(slots[0]) + count) if whole else slots
        return cls(cells.clamp(0, axis.size_in - 1), weights, where, int(starts[0]), count)


def _labels(grid: Tensor, wy: Tensor, wx: Tensor, dtype: torch.dtype) -> Tensor:
    """Labels ``(h - 1, w - 1, rows, cols)`` of the cells between ``(h, w, K)`` corners.

    ``wy`` ``(h - 1, rows)`` and ``wx`` ``(w - 1, cols)`` are the weights of the lower and of the right corners.
    """
    (h, rows), (w, cols), num_classes = wy.shape, wx.shape, grid.shape[2]
    upper = torch.maximum(grid[1:], grid[:-1])
    upper = torch.maximum(upper[:, 1:], upper[:, :-1]).view(-1, num_classes)  # (cells, K)
    lower = torch.minimum(grid[1:], grid[:-1])
    lower = torch.minimum(lower[:, 1:], lower[:, :-1]).view(-1, num_classes)

    def gather(cells: Tensor) -> Cells:
        row, column = cells.div(w, rounding_mode="floor"), cells % w
        corner = (row * (w + 1) + column) * num_classes
        right, below = num_classes, (w + 1) * num_classes
        return Cells(grid.view(-1), corner, right, below, wy[row].T, wx[column].T)

    return settle(lower, upper, gather, rows * cols, dtype).view(h, w, rows, cols)


def settle(lower: Tensor, upper: Tensor, gather: Callable[[Tensor], Cells], pixels: int, dtype: torch.dtype) -> Tensor:
    """Labels ``(cells, pixels)`` where the smallest and the largest corners of the classes are ``(cells, K)``."""
    num_classes = lower.shape[1]
    bound, winner = lower.max(1, keepdim=True)
    labels = winner.to(dtype).expand(-1, pixels).contiguous()
    alive = upper >= bound
    ties = upper == bound
    if ties.any():  # the lowest class wins: one above the winner has to exceed the bound
        alive &= ~(ties & (torch.arange(num_classes, device=lower.device) > winner))
    counts, order = alive.sum(1, dtype=torch.int32).sort(descending=True, stable=True)
    unsettled = int((counts > 1).sum())
    few = num_classes * pixels // (pixels + _PAIR)
    many = min(int((counts > few).sum()), unsettled)
    if many:
        for cells in order[:many].split(max(_CHUNK // (num_classes * pixels), 1)):
            labels.index_copy_(0, cells, _compare_all(gather(cells), num_classes).to(dtype))
    if many < unsettled:
        cells = order[many:unsettled]
        labels.index_copy_(0, cells, _compare(gather(cells), alive[cells], counts[many:unsettled], dtype))
    return labels


@dataclass(frozen=True)
class Cells:
    """Cells to compare classes in: where their corners lie among the flat scores, and the weights of their pixels."""

    scores: Tensor  # (corners * K,)
    corner: Tensor  # (cells,) of the first class
    right: int  # from there to the right corner
    below: int  # and to the lower one
    wy: Tensor  # (rows, cells)
    wx: Tensor  # (cols, cells)

    def edges(self, at: Tensor, wy: Tensor) -> tuple[Tensor, Tensor]:
        """Scores on the left edge of the cells, and their differences to the right edge."""
        left, right = self.scores[at], self.scores[at + self.right]
        left = left + (self.scores[at + self.below] - left) * wy
        right = right + (self.scores[at + self.below + self.right] - right) * wy
        return left, right - left


def _compare_all(cells: Cells, num_classes: int) -> Tensor:
    """Labels ``(cells, slots)`` by comparing all classes."""
    at = cells.corner[:, None] + torch.arange(num_classes, device=cells.corner.device)
    left, slope = cells.edges(at, cells.wy[:, :, None])  # (rows, cells, K)
    logits = slope[:, None] * cells.wx[:, :, None]
    logits += left[:, None]
    return logits.max(3).indices.flatten(0, 1).T.contiguous()  # twice as fast as argmax


def _compare(cells: Cells, alive: Tensor, counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Labels ``(cells, slots)`` by comparing the classes that are ``alive`` ``(cells, K)``.

    ``counts`` ``(cells,)`` of them are, and fall from cell to cell.
    """
    position, classes = alive.nonzero(as_tuple=True)  # one entry for each pair of cell and class
    # Pairs in the order of their rank in the cell: those of one rank lie side by side, and belong to the first cells.
    ranks = torch.arange(int(counts[0]), device=counts.device)[:, None]
    pairs = (ranks + (counts.cumsum(0) - counts))[ranks < counts]
    position, classes = position[pairs], classes[pairs]
    left, slope = cells.edges(cells.corner[position] + classes, cells.wy.index_select(1, position))
    # Labels as floats, too: comparisons into booleans, torch.where and arithmetic of bytes are slower on a CPU.
    left, slope, classes = left[:, None], slope[:, None], classes.to(left.dtype)  # (rows, 1, pairs)
    best = labels = left.new_empty(0)
    end = 0
    for alike in (ranks < counts).sum(1).tolist():
        begin, end = end, end + alike
        value = slope[..., begin:end] * cells.wx[:, :alike]
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
