"""Labels and probabilities of pixels that mix four lattice points.

``labels`` has the labels of one lattice; ``src/upsample_softmax.cpp`` makes the probabilities. Elsewhere, in PyTorch,
and where pruning does not pay, the logits exist tile by tile: the rows of a tile mix a few lattice rows, and
each of these is resized along x once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .groups import used_groups
from .labels import run_native, write_pruned
from .native import pointer
from .resize import kernel

_TILE = 1 << 20  # logits of a tile: 4 MB of float32, two cores' second-level caches
_TILE_ROWS = 16  # fewer where there are too many classes


def lattice_argmax(
    scores: Tensor, rows: Tensor, row_weights: Tensor, cols: Tensor, col_weights: Tensor, index: Tensor | None = None
) -> Tensor:
    """``(H, W)`` labels, uint8 where K <= 256 and int32 otherwise."""
    dtype = torch.uint8 if scores.shape[1] <= 256 else torch.int32
    labels = scores.new_empty((rows.shape[2], cols.shape[2]), dtype=dtype)
    if len(rows) == 1:
        run = kernel(scores, "upsample_argmax")
        if run is not None:
            if index is not None:
                used_groups(index, len(scores))
            points = None if index is None else index[None]
            columns = (*cols[0].unique(return_inverse=True), col_weights)
            strides = (0, 1, scores.shape[1])
            run_native(run, scores, strides, points, (rows, row_weights), columns, labels[None])
            return labels
        if write_pruned(scores, rows[0], row_weights[0], cols[0], col_weights[0], index, labels):
            return labels
    elif kernel(scores, "lattice_softmax") is not None:
        for top in range(0, len(labels), step := max(_TILE // (scores.shape[1] * labels.shape[1]), 1)):
            part = rows[..., top : top + step].contiguous(), row_weights[:, top : top + step].contiguous()
            labels[top : top + step] = lattice_softmax(scores, *part, cols, col_weights, index).max(0).indices
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
