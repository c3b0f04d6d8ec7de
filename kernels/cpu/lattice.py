"""Labels and probabilities of pixels that mix four lattice points, in plain PyTorch.

Labels of one lattice: pixels that mix the same four points are a cell, whose classes are pruned as in
``upsample_argmax``. Otherwise the logits exist tile by tile: the rows of a tile mix a few lattice rows, and each of
these is resized along x once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..registry import widest
from .groups import used_groups
from .resize import kernel, pointer
from .upsample_argmax import TILE, Cells, cell_labels, prunable

_TILE = 1 << 20  # logits of a tile: 4 MB of float32, two cores' second-level caches
_TILE_ROWS = 16  # fewer where there are too many classes


def lattice_argmax(
    scores: Tensor, rows: Tensor, row_weights: Tensor, cols: Tensor, col_weights: Tensor, index: Tensor | None = None
) -> Tensor:
    """``(H, W)`` labels, uint8 where K <= 256 and int32 otherwise."""
    dtype = torch.uint8 if scores.shape[1] <= 256 else torch.int32
    labels = scores.new_empty((rows.shape[2], cols.shape[2]), dtype=dtype)
    if len(rows) == 1:
        ys, xs = _Runs.grouped(rows[0], row_weights[0]), _Runs.grouped(cols[0], col_weights[0])
        cells = sum(len(y.lower) for y in ys) * sum(len(x.lower) for x in xs)
        used = scores if index is None else scores[: used_groups(index, len(scores))]
        if prunable(used, labels.numel() / cells):
            for y in ys:
                for x in xs:
                    _prune(scores, index, y, x, labels)
            return labels
    lattices = _Lattices(scores, rows, row_weights, cols, col_weights, index)
    for tile in lattices.tiles():
        votes = lattices.logits(0, tile) if len(rows) == 1 else lattices.probabilities(tile)
        labels[tile] = votes.max(1).indices  # faster than argmax
    return labels


def lattice_softmax(
    scores: Tensor, rows: Tensor, row_weights: Tensor, cols: Tensor, col_weights: Tensor, index: Tensor | None = None
) -> Tensor:
    """``(K, H, W)``: the mean softmax over the lattices."""
    lattices = _Lattices(scores, rows, row_weights, cols, col_weights, index)
    out, run = scores.new_empty((scores.shape[1], rows.shape[2], cols.shape[2])), kernel(scores, "lattice_softmax")
    if run is not None:
        tensors = (scores, rows, row_weights, cols, col_weights, index, out)
        run(*map(pointer, tensors), len(rows), *out.shape, torch.get_num_threads())
        return out
    for tile in lattices.tiles():
        out[(slice(None), *tile)] = lattices.probabilities(tile).transpose(0, 1)
    return out


@dataclass(frozen=True)
class _Lattices:
    scores: Tensor  # (N, K), or (groups, K)
    rows: Tensor  # (S, 2, H)
    row_weights: Tensor  # (S, H)
    cols: Tensor  # (S, 2, W)
    col_weights: Tensor  # (S, W)
    index: Tensor | None  # (N,) groups of the points

    def __post_init__(self) -> None:
        if self.index is not None:
            used_groups(self.index, len(self.scores))

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """Yield the rows and columns of each tile."""
        height, width, classes = self.rows.shape[2], self.cols.shape[2], self.scores.shape[1]
        across = max(min(_TILE // (classes * _TILE_ROWS), width), 1)
        down = max(_TILE // (classes * across), 1)
        for top in range(0, height, down):
            for left in range(0, width, across):
                yield slice(top, min(top + down, height)), slice(left, min(left + across, width))

    def probabilities(self, tile: tuple[slice, slice]) -> Tensor:
        """Mean softmax over the lattices, ``(rows, K, columns)``."""
        total = self.logits(0, tile).softmax(1)
        for index in range(1, len(self.rows)):
            total += self.logits(index, tile).softmax(1)
        return total.div_(len(self.rows)) if len(self.rows) > 1 else total

    def logits(self, index: int, tile: tuple[slice, slice]) -> Tensor:
        """Logits of one lattice, ``(rows, K, columns)``."""
        ys, xs = tile
        used_rows, row_of = self.rows[index, :, ys].unique(return_inverse=True)
        used_cols, col_of = self.cols[index, :, xs].unique(return_inverse=True)
        weight = self.col_weights[index, xs]
        points = used_rows[:, None] + used_cols
        points = self.scores[points if self.index is None else self.index[points]]
        points = points.transpose(1, 2).contiguous()  # (rows, K, columns)
        wide = points[..., col_of[0]].mul_(1 - weight).addcmul_(points[..., col_of[1]], weight)
        logits = wide.new_empty((row_of.shape[1], *wide.shape[1:]))
        weights = self.row_weights[index, ys].tolist()
        for out, upper, lower, weight in zip(logits, *row_of.tolist(), weights, strict=True):
            torch.mul(wide[upper], 1 - weight, out=out).add_(wide[lower], alpha=weight)
        return logits


@dataclass(frozen=True)
class _Runs:
    """Runs of outputs of one axis that mix the same two points, padded to one length by their last output."""

    lower: Tensor  # (runs,) points
    upper: Tensor  # (runs,)
    weights: Tensor  # (runs, length) of the upper points
    outputs: Tensor  # (runs, length)

    @classmethod
    def grouped(cls, pairs: Tensor, weights: Tensor) -> list[_Runs]:
        """Group ``(2, n)`` points and ``(n,)`` weights into runs whose lengths differ by less than a factor of 2."""
        changes = (pairs[:, 1:] != pairs[:, :-1]).any(0).nonzero()[:, 0] + 1
        first = torch.cat([changes.new_zeros(1), changes])
        length = torch.cat([changes, changes.new_tensor([pairs.shape[1]])]) - first
        kind = length.to(widest(length.device)).log2().floor()
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
    most = max(TILE // max(rows * cols, classes), 1)
    for x in xs.split(most):
        for y in ys.split(max(most // len(x.lower), 1)):
            pairs = [row[:, None] + column for row in (y.lower, y.upper) for column in (x.lower, x.upper)]
            points = torch.stack(pairs).flatten(1)
            corners = scores[points if index is None else index[points]]  # (4, cells, K)
            across, right = len(x.lower), corners[0].numel()
            cells = Cells(corners.view(-1), across * classes, right, 2 * right, y.weights, x.weights)
            found = cell_labels(corners.amin(0), corners.amax(0), cells, labels.dtype)
            image = found.view(-1, across, rows, cols).transpose(1, 2).reshape(-1, across * cols)
            labels[y.outputs.flatten()[:, None], x.outputs.flatten()] = image
