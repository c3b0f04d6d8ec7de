"""Labels of pixels that mix four points: the C++ kernel of ``src/upsample_argmax.cpp``, or PyTorch with exact pruning.

In PyTorch, pixels that mix the same four points are a cell. They lie between the smallest and the largest of the four.
A class whose largest point is below another class's smallest cannot win in the cell. If one class is left, the cell is
filled with it; otherwise those that are left are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..registry import widest
from .groups import used_groups
from .native import pointer

# Points, and pixels, of the cells that are treated at once, and logits of those that are compared; they fit the caches.
_TILE, _CHUNK = 1 << 19, 1 << 18
# Cells of fewer pixels, and fewer classes, are compared in less time than pruned.
_PRUNE_PIXELS, _PRUNE_CLASSES = 16, 16


def run_native(
    run: Callable[..., None],
    scores: Tensor,
    strides: tuple[int, int, int],
    index: Tensor | None,
    rows: tuple[Tensor, Tensor],
    cols: tuple[Tensor, Tensor, Tensor],
    labels: Tensor,
) -> None:
    """Write ``(B, H, W)`` labels.

    ``strides`` are those of images, classes and points; with an ``index`` ``(B, points)``, those of groups. ``rows``
    are ``(2, H)`` points and ``(H,)`` weights of the second ones, ``cols`` points, ``(2, W)`` positions among them, and
    weights; the weights are float32.
    """
    pointers = [pointer(tensor) for tensor in (scores, index, *rows, *cols, labels)]
    sizes = (len(labels), scores.shape[1], *labels.shape[1:], len(cols[0]), *strides)
    points = 0 if index is None else index.shape[1]
    if labels.numel():
        is_wide = labels.dtype == torch.int32
        run(*pointers, *sizes, points, scores.dtype == torch.bfloat16, is_wide, torch.get_num_threads())


def write_pruned(
    scores: Tensor,
    rows: Tensor,
    row_weights: Tensor,
    cols: Tensor,
    col_weights: Tensor,
    index: Tensor | None,
    labels: Tensor,
) -> bool:
    """Write the ``(H, W)`` labels of one lattice, cell by cell; False if that does not pay, or differences overflow."""
    ys, xs = _Runs.grouped(rows, row_weights), _Runs.grouped(cols, col_weights)
    cells = sum(len(y.lower) for y in ys) * sum(len(x.lower) for x in xs)
    if labels.numel() < _PRUNE_PIXELS * cells or scores.shape[1] < _PRUNE_CLASSES:
        return False
    used = scores if index is None else scores[: used_groups(index, len(scores))]
    smallest, largest = used.aminmax()
    if not torch.maximum(-smallest, largest) < 1e38:  # or NaN
        return False
    for y in ys:
        for x in xs:
            _prune(scores, index, y, x, labels)
    return True


@dataclass(frozen=True)
class _Runs:
    """Runs of outputs of one axis that mix the same two points, padded to one length by their last output."""

    lower: Tensor  # (runs,) points
    upper: Tensor  # (runs,)
    weights: Tensor  # (runs, length) of the upper points
    outputs: Tensor  # (runs, length)

    @classmethod
    def grouped(cls, pairs: Tensor, weights: Tensor) -> list[_Runs]:
        """Group ``(2, n)`` points and ``(n,)`` weights into runs whose lengths differ by less than a fourth."""
        changes = (pairs[:, 1:] != pairs[:, :-1]).any(0).nonzero()[:, 0] + 1
        first = torch.cat([changes.new_zeros(1), changes])
        length = torch.cat([changes, changes.new_tensor([pairs.shape[1]])]) - first
        kind = (3 * length.to(widest(length.device)).log2()).floor()
        groups = []
        for one in kind.unique():
            begin, longest = first[kind == one], length[kind == one]
            slots = torch.arange(int(longest.max()), device=pairs.device)
            outputs = begin[:, None] + torch.minimum(slots, longest[:, None] - 1)
            groups.append(cls(pairs[0, begin], pairs[1, begin], weights[outputs], outputs))
        return groups

    def split(self, count: int) -> Iterator[_Runs]:
        """Yield at most ``count`` runs at a time."""
        parts = (tensor.split(count) for tensor in (self.lower, self.upper, self.weights, self.outputs))
        return (_Runs(*part) for part in zip(*parts, strict=True))


def _prune(scores: Tensor, index: Tensor | None, ys: _Runs, xs: _Runs, labels: Tensor) -> None:
    """Write the labels of all cells of these runs."""
    classes, rows, cols = scores.shape[1], ys.weights.shape[1], xs.weights.shape[1]
    most = max(_TILE // max(rows * cols, classes), 1)
    for x in xs.split(most):
        for y in ys.split(max(most // len(x.lower), 1)):
            down, across = len(y.lower), len(x.lower)
            pairs = [row[:, None] + column for row in (y.lower, y.upper) for column in (x.lower, x.upper)]
            points = torch.stack(pairs).flatten(1)
            corners = scores[points if index is None else index[points]]  # (4, cells, K)
            wy, wx = y.weights.repeat_interleave(across, 0), x.weights.repeat(down, 1)
            found = _cell_labels(corners, wy, wx, labels.dtype).view(down, across, rows, cols)
            image = found.transpose(1, 2).reshape(down * rows, across * cols)
            labels[y.outputs.flatten()[:, None], x.outputs.flatten()] = image


def _cell_labels(corners: Tensor, wy: Tensor, wx: Tensor, dtype: torch.dtype) -> Tensor:
    """Labels ``(n, rows * cols)`` of cells: corners ``(4, n, K)``, weights ``(n, rows)`` and ``(n, cols)``."""
    num_classes, pixels = corners.shape[2], wy.shape[1] * wx.shape[1]
    lower, upper = corners.amin(0), corners.amax(0)
    bound, winner = lower.max(1, keepdim=True)
    labels = winner.to(dtype).repeat(1, pixels)
    # The lowest class wins: a class above the winner must exceed the bound.
    alive = (upper > bound) | ((upper == bound) & (torch.arange(num_classes, device=upper.device) <= winner))
    counts, order = alive.sum(1).sort(descending=True)
    begin, end = 0, int((counts > 1).sum())
    while begin < end:
        count = int(counts[begin])
        few = 2 * count <= num_classes
        count = count if few else num_classes
        index = order[begin : min(begin + max(_CHUNK // (count * pixels), 1), end)]
        begin += len(index)
        chosen, classes = corners[:, index], index
        if few:
            classes = alive[index].byte().sort(dim=1, descending=True, stable=True).indices[:, :count]
            chosen = chosen.gather(2, classes.expand(4, -1, -1))
        top, bottom = chosen[:2, :, None], chosen[2:, :, None]  # (2, n, 1, classes)
        left, right = top + (bottom - top) * wy[index, :, None]  # (n, rows, classes)
        logits = (right - left)[:, :, None] * wx[index][:, None, :, None]
        logits += left[:, :, None]
        best = logits.max(3).indices.flatten(1)  # twice as fast as argmax
        labels[index] = (classes.gather(1, best) if few else best).to(dtype)
    return labels
