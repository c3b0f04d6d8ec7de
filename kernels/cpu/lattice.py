"""Labels and probabilities of pixels that mix four lattice points, in plain PyTorch, tile by tile.

The rows of a tile mix a few lattice rows only, each of which is resized along x once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Logits of a tile: 4 MB of float32, two cores' second-level caches.
_TILE = 1 << 20
# Rows of a tile where the classes leave room for them.
_TILE_ROWS = 16


def lattice_argmax(scores: Tensor, rows: Tensor, row_weights: Tensor, cols: Tensor, col_weights: Tensor) -> Tensor:
    """``(H, W)`` labels, uint8 where K <= 256 and int32 otherwise."""
    lattices = _Lattices(scores, rows, row_weights, cols, col_weights)
    labels = scores.new_empty(lattices.size, dtype=torch.uint8 if scores.shape[1] <= 256 else torch.int32)
    for tile in lattices.tiles():
        votes = lattices.logits(0, tile) if len(rows) == 1 else lattices.probabilities(tile)
        labels[tile] = votes.max(1).indices  # faster than argmax
    return labels


def lattice_softmax(scores: Tensor, rows: Tensor, row_weights: Tensor, cols: Tensor, col_weights: Tensor) -> Tensor:
    """``(K, H, W)``: the mean over S of the softmaxes."""
    lattices = _Lattices(scores, rows, row_weights, cols, col_weights)
    out = scores.new_empty((scores.shape[1], *lattices.size))
    for tile in lattices.tiles():
        out[(slice(None), *tile)] = lattices.probabilities(tile).transpose(0, 1)
    return out


@dataclass(frozen=True)
class _Lattices:
    scores: Tensor  # (N, K)
    rows: Tensor  # (S, 2, H)
    row_weights: Tensor  # (S, H)
    cols: Tensor  # (S, 2, W)
    col_weights: Tensor  # (S, W)

    @property
    def size(self) -> tuple[int, int]:
        return self.rows.shape[2], self.cols.shape[2]

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of each tile."""
        (height, width), classes = self.size, self.scores.shape[1]
        across = max(min(_TILE // (classes * _TILE_ROWS), width), 1)
        down = max(_TILE // (classes * across), 1)
        for top in range(0, height, down):
            for left in range(0, width, across):
                yield slice(top, min(top + down, height)), slice(left, min(left + across, width))

    def probabilities(self, tile: tuple[slice, slice]) -> Tensor:
        """``(rows, K, columns)``: the mean over the lattices."""
        total = self.logits(0, tile).softmax(1)
        for index in range(1, len(self.rows)):
            total += self.logits(index, tile).softmax(1)
        return total.div_(len(self.rows)) if len(self.rows) > 1 else total

    def logits(self, index: int, tile: tuple[slice, slice]) -> Tensor:
        """``(rows, K, columns)`` of one lattice."""
        ys, xs = tile
        used_rows, row_of = self.rows[index, :, ys].unique(return_inverse=True)
        used_cols, col_of = self.cols[index, :, xs].unique(return_inverse=True)
        weight = self.col_weights[index, xs]
        points = self.scores[used_rows[:, None] + used_cols].transpose(1, 2).contiguous()  # (rows, K, columns)
        wide = points[..., col_of[0]].mul_(1 - weight).addcmul_(points[..., col_of[1]], weight)
        logits = wide.new_empty((row_of.shape[1], *wide.shape[1:]))
        weights = self.row_weights[index, ys].tolist()
        for out, upper, lower, weight in zip(logits, *row_of.tolist(), weights, strict=True):
            torch.mul(wide[upper], 1 - weight, out=out).add_(wide[lower], alpha=weight)
        return logits
