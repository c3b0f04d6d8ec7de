"""Labels and probabilities of pixels that mix four lattice points.

``labels`` has the labels of one lattice; ``src/upsample_softmax.cpp`` makes the probabilities. Elsewhere, in PyTorch,
and where pruning does not pay, the logits exist tile by tile: the rows of a tile mix a few lattice rows, and
each of these is resized along x once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..registry import label_dtype
from .groups import used_groups
from .labels import run_native, write_pruned
from .native import kernel, pointer

_TILE = 1 << 20  # logits of a tile: 4 MB of float32, two cores' second-level caches
_TILE_ROWS = 16  # fewer where there are too many classes


def lattice_argmax(
    scores: Tensor, rows: Tensor, row_weights: Tensor, cols: Tensor, col_weights: Tensor, index: Tensor | None = None
) -> Tensor:
    """``(H, W)`` labels, uint8 where K <= 256 and int32 otherwise."""
    labels = scores.new_empty((rows.shape[2], cols.shape[2]), dtype=label_dtype(scores.shape[1]))
    if index is not None:
        used_groups(index, len(scores))
    if len(rows) == 1:
        run = kernel(scores, "upsample_argmax")
        if run is not None:
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
    for tile, logits in _tiles(scores, rows, row_weights, cols, col_weights, index):
        votes = logits[0] if len(rows) == 1 else _mean_softmax(logits)
        labels[tile] = votes.max(1).indices  # faster than argmax
    return labels


def lattice_softmax(
    scores: Tensor, rows: Tensor, row_weights: Tensor, cols: Tensor, col_weights: Tensor, index: Tensor | None = None
) -> Tensor:
    """``(K, H, W)``: the mean softmax over the lattices."""
    if index is not None:
        used_groups(index, len(scores))
    out, run = scores.new_empty((scores.shape[1], rows.shape[2], cols.shape[2])), kernel(scores, "lattice_softmax")
    if run is not None:
        tensors = (scores, rows, row_weights, cols, col_weights, index, out)
        run(*map(pointer, tensors), len(rows), *out.shape, torch.get_num_threads())
        return out
    for tile, logits in _tiles(scores, rows, row_weights, cols, col_weights, index):
        out[(slice(None), *tile)] = _mean_softmax(logits).transpose(0, 1)
    return out


def _mean_softmax(logits: list[Tensor]) -> Tensor:
    total = logits[0].softmax(1)
    for one in logits[1:]:
        total += one.softmax(1)
    # torch.mean would round otherwise in a vector than at the end of a row.
    return total.div_(len(logits)) if len(logits) > 1 else total


def _tiles(
    scores: Tensor, rows: Tensor, row_weights: Tensor, cols: Tensor, col_weights: Tensor, index: Tensor | None
) -> Iterator[tuple[tuple[slice, slice], list[Tensor]]]:
    """Yield the rows and columns of each tile, and its logits ``(rows, K, columns)`` in each lattice."""
    height, width, classes = rows.shape[2], cols.shape[2], scores.shape[1]
    across = max(min(_TILE // (classes * _TILE_ROWS), width), 1)
    down = max(_TILE // (classes * across), 1)
    for top in range(0, height, down):
        for left in range(0, width, across):
            ys, xs = tile = slice(top, top + down), slice(left, left + across)
            axes = zip(rows[..., ys], row_weights[:, ys], cols[..., xs], col_weights[:, xs], strict=True)
            yield tile, [_logits(scores, *axis, index) for axis in axes]


def _logits(
    scores: Tensor, rows: Tensor, row_weights: Tensor, cols: Tensor, col_weights: Tensor, index: Tensor | None
) -> Tensor:
    """Logits ``(rows, K, columns)`` of a tile of one lattice."""
    used_rows, row_of = rows.unique(return_inverse=True)
    used_cols, col_of = cols.unique(return_inverse=True)
    points = used_rows[:, None] + used_cols
    points = scores[points if index is None else index[points]].transpose(1, 2).contiguous()
    wide = points[..., col_of[0]].mul_(1 - col_weights).addcmul_(points[..., col_of[1]], col_weights)
    logits = wide.new_empty((row_of.shape[1], *wide.shape[1:]))
    # Row by row: a row has the same bits whichever rows are computed with it.
    for out, upper, lower, weight in zip(logits, *row_of.tolist(), row_weights.tolist(), strict=True):
        torch.mul(wide[upper], 1 - weight, out=out).add_(wide[lower], alpha=weight)
    return logits
