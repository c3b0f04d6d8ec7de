"""Labels of pixels that mix four lattice points, in Triton: by votes (lattice.py), or of one lattice by pruning.

With one lattice, a tile whose rows mix at most two pairs of points, as do its columns, has at most 16 points, and all
its logits are convex combinations of theirs: a class whose largest score there is below another class's smallest
cannot win. Other tiles, and those with a NaN or infinite score, compare all classes. Not differentiable, nothing is
saved.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..registry import label_dtype
from .common import TRITON_3_6, device_arch
from .lattice import (
    SIZES,
    Tiles,
    axis_points,
    lattice_logits,
    lattice_votes,
    launch,
    launch_config,
    log_sum,
    of_groups,
    open_tile,
    point_stride,
    step_classes,
    tile_points,
)
from .upsample_argmax import LANES, lowest_class, take_better

PRUNED = Tiles(16, 16, LANES.value, num_warps=1)


@triton.jit
def tile_corners(index_ptr, weights_ptr, offs, points, size, stride):
    """Points of the first and last output of one axis of a tile, and whether all its outputs mix one of these pairs."""
    a0, a1, _ = axis_points(index_ptr, weights_ptr, 0, tl.min(offs, 0), size, stride)
    b0, b1, _ = axis_points(index_ptr, weights_ptr, 0, tl.max(offs, 0), size, stride)
    known = ((points[0] == a0) & (points[1] == a1)) | ((points[0] == b0) & (points[1] == b1))
    return (a0, a1, b0, b1), tl.min(known.to(tl.int32), 0) == 1


@triton.jit
def corner_range(scores_ptr, groups_ptr, corners_y, corners_x, k, num_classes):
    """Smallest and largest score of classes ``k`` at 16 points, and the sum of the absolute ones."""
    lower = tl.load(scores_ptr + of_groups(groups_ptr, corners_y[0] + corners_x[0], num_classes) + k)
    upper, total = lower, tl.abs(lower)
    for point in tl.static_range(1, 16):
        offset = of_groups(groups_ptr, corners_y[point // 4] + corners_x[point % 4], num_classes)
        score = tl.load(scores_ptr + offset + k)
        lower, upper, total = tl.minimum(lower, score), tl.maximum(upper, score), total + tl.abs(score)
    return lower, upper, total


@triton.jit(do_not_specialize=SIZES)
def lattice_argmax_kernel(
    lattice_ptrs,  # those of one lattice
    labels_ptr,  # (H, W)
    num_classes, lattices, height, width,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Labels of one tile."""
    scores_ptr, rows_ptr, row_weights_ptr, cols_ptr, col_weights_ptr, groups_ptr = lattice_ptrs
    tile = open_tile((height, width), BLOCK_Y, BLOCK_X, WIDE)
    rows, cols = tile_points(lattice_ptrs, 0, tile, num_classes, (height, width))
    stride = point_stride(groups_ptr, num_classes)
    corners_y, few_y = tile_corners(rows_ptr, row_weights_ptr, tile[0], rows, height, stride)
    corners_x, few_x = tile_corners(cols_ptr, col_weights_ptr, tile[1], cols, width, stride)
    best = tl.full((BLOCK_Y, 1, BLOCK_X), -float("inf"), scores_ptr.dtype.element_ty)
    label = tl.zeros((BLOCK_Y, 1, BLOCK_X), tl.int32)
    one = tl.zeros((1,), tl.int32)
    lanes = tl.arange(0, BLOCK_K)
    bound = tl.cast(-float("inf"), best.dtype)
    prunable = few_y & few_x
    if prunable:
        bounds = tl.full((BLOCK_K,), -float("inf"), best.dtype)
        total = tl.zeros((BLOCK_K,), best.dtype)
        for start in range(0, num_classes, BLOCK_K):
            k = tl.minimum(start + lanes, num_classes - 1)
            lower, _, magnitude = corner_range(scores_ptr, groups_ptr, corners_y, corners_x, k, num_classes)
            bounds = tl.maximum(bounds, lower)
            total += magnitude
        bound = tl.max(bounds, 0)
        prunable = tl.sum(total, 0) < float("inf")
    if prunable:
        for start in range(0, num_classes, BLOCK_K):
            k = tl.minimum(start + lanes, num_classes - 1)
            _, upper, _ = corner_range(scores_ptr, groups_ptr, corners_y, corners_x, k, num_classes)
            candidate = (upper >= bound) & (start + lanes < num_classes)
            word = tl.sum(tl.where(candidate, tl.full((BLOCK_K,), 1, tl.uint32) << lanes, 0), 0)
            while word != 0:
                position, word = lowest_class(word)
                value = lattice_logits(scores_ptr + (start + position), groups_ptr, (rows, cols), one, num_classes)
                best, label = take_better(best, label, value, start + position, False)
    else:
        for k in range(num_classes):
            value = lattice_logits(scores_ptr + k, groups_ptr, (rows, cols), one, num_classes)
            best, label = take_better(best, label, value, k, True)
    ptrs = labels_ptr + (tile[0][:, None, None] * width + tile[1][None, None, :])
    tl.store(ptrs, label.to(labels_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=SIZES)
def lattice_votes_kernel(
    lattice_ptrs,
    log_sum_ptr,  # (S, 2, H, W)
    labels_ptr,  # (H, W)
    num_classes, lattices, height, width,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Labels of one tile by the votes of all lattices. A pixel's votes are all NaN or none is: class 0 wins then."""
    size = height, width
    tile = open_tile(size, BLOCK_Y, BLOCK_X, WIDE)
    offs_k = step_classes(BLOCK_K)
    best = tl.full((BLOCK_Y, BLOCK_K, BLOCK_X), -1.0, log_sum_ptr.dtype.element_ty)
    # Each lane holds the best of its classes; the first one, until another exceeds it.
    label = tl.zeros((BLOCK_Y, BLOCK_K, BLOCK_X), tl.int32) + offs_k[None, :, None]
    for begin in range(0, num_classes, BLOCK_K):
        start = tl.minimum(begin, num_classes - BLOCK_K)
        votes = lattice_votes(lattice_ptrs, log_sum_ptr, start, offs_k, tile, num_classes, lattices, size)
        best, label = take_better(best, label, votes, (start + offs_k)[None, :, None], False)
    label = tl.min(tl.where(best == tl.max(best, 1, keep_dims=True), label, num_classes), 1)
    ptrs = labels_ptr + (tile[0][:, None] * width + tile[1][None, :])
    tl.store(ptrs, label.to(labels_ptr.dtype.element_ty))


def lattice_argmax(
    scores: Tensor, rows: Tensor, row_weights: Tensor, cols: Tensor, col_weights: Tensor, index: Tensor | None = None
) -> Tensor:
    """``(H, W)`` labels, uint8 where K <= 256 and int32 otherwise."""
    lattice = scores, rows, row_weights, cols, col_weights, index
    num_classes = scores.shape[1]
    labels = scores.new_empty((rows.shape[2], cols.shape[2]), dtype=label_dtype(num_classes))
    if len(rows) == 1:
        if index is not None and scores.dtype == torch.float64:  # too many registers
            lattice = scores[index], *lattice[1:5], None
        launch(lattice_argmax_kernel, lattice, PRUNED, labels_ptr=labels)
    else:
        sums = log_sum(lattice)
        few = TRITON_3_6 and scores.dtype == torch.float32 and device_arch(scores).startswith("sm_")
        limit = {"maxnreg": 176} if few else {}
        tiles = launch_config(num_classes, scores.dtype)
        launch(lattice_votes_kernel, lattice, tiles, log_sum_ptr=sums, labels_ptr=labels, **limit)
    return labels
