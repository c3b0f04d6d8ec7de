"""Labels of bilinearly upsampled masks in Triton, by exact pruning.

    label(y, x) = argmax_k  sum over the corners c of the cell of (y, x):  weight_c(y, x) masks[k, c]

All outputs of a cell are convex combinations of its corners. So lower_k <= logit_k <= upper_k there, with the smallest
and the largest corner, and a class with upper_k < max_j lower_j cannot win. One program, a warp, owns a tile of a cell.
Where few classes are left, as on smooth maps, only they are compared, in rising order. Where more are left, or there
are more than one block, each quarter of the tile is bounded by the values at its own corners, which leaves less than
half of them on noise; the columns of a quarter are lanes, and each walks through its own quarter's classes. Where a
corner is NaN or infinite, nothing is pruned: a NaN wins, as in torch.argmax. Logits are mixed along x first, with the
roundings of PyTorch's kernel, so that near ties fall as they do there. Only the labels are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..bilinear import Axis, shape_on_grid
from ..registry import label_dtype
from .cells import GEOMETRY, cell_start, corner_ptrs, geometry, tile_weights
from .common import cdiv, launch_arguments, next_power_of_2, programs
from .groups import contiguous, strides_on_grid

FEW = tl.constexpr(8)  # classes of a tile that cost less than the bounds of its quarters
LANES = tl.constexpr(32)  # classes of a step, one to each bit of a word


@triton.jit
def load_corners(ptrs, k, mask, stride_mk, dtype: tl.constexpr):
    """The four corners of classes ``k``, and the sum of their magnitudes.

    The sum is infinite or NaN where a corner is, and where a difference of corners could be.
    """
    offsets = (k * stride_mk).to(tl.int64)
    c00 = tl.load(ptrs[0] + offsets, mask=mask).to(dtype)
    c01 = tl.load(ptrs[1] + offsets, mask=mask).to(dtype)
    c10 = tl.load(ptrs[2] + offsets, mask=mask).to(dtype)
    c11 = tl.load(ptrs[3] + offsets, mask=mask).to(dtype)
    return (c00, c01, c10, c11), (tl.abs(c00) + tl.abs(c01)) + (tl.abs(c10) + tl.abs(c11))


@triton.jit
def part_range(corners, wy, wx):
    """Smallest, largest logits ``(PARTS, BLOCK_K)`` of classes with these corners, by first and last weights."""
    c00, c01, c10, c11 = corners
    lower = tl.full((wy[0].shape[0], c00.shape[0]), float("inf"), c00.dtype)
    upper = -lower
    for last_y in tl.static_range(2):
        left = c00 + wy[last_y] * (c10 - c00)
        right = c01 + wy[last_y] * (c11 - c01)
        for last_x in tl.static_range(2):
            value = left + wx[last_x] * (right - left)
            lower = tl.minimum(lower, value)
            upper = tl.maximum(upper, value)
    return lower, upper


@triton.jit
def lowest_class(word):
    """Position of the lowest bit of a uint32, -127 if there is none, and the other bits."""
    others = word & (word - 1)
    exponent = (word ^ others).to(tl.float32).to(tl.int32, bitcast=True) >> 23
    return exponent - 127, others


@triton.jit
def take_better(best, label, value, k, NAN: tl.constexpr):
    """Best logits and labels after class ``k``, which is higher than those before. NAN: logits may be NaN."""
    # A NaN wins against every number, and nothing against a NaN.
    wins = ~(value <= best) & (best == best) if NAN else value > best
    return tl.where(wins, value, best), tl.where(wins, k, label)


@triton.jit
def compare(best, label, k, cell, NAN: tl.constexpr):
    """``take_better`` for the logits ``(ROWS, COLUMNS)`` of class ``k``, one for all or for each column."""
    ptrs, stride_mk, wy, wx = cell
    c00, c01, c10, c11 = load_corners(ptrs, k, None, stride_mk, best.dtype)[0]
    top = (1 - wx) * c00 + wx * c01
    bottom = (1 - wx) * c10 + wx * c11
    return take_better(best, label, (1 - wy) * top + wy * bottom, k, NAN)


@triton.jit
def compare_parts(best, label, parts, part, wy_range, wx_range, num_classes, cell):
    """``compare`` for the classes that can win in each of ``parts`` ``(PARTS, 1)``; all, where a corner is not finite.

    ``part`` ``(1, COLUMNS)`` is that of each column; ranges are the first and last weights of the parts.
    """
    ptrs, stride_mk = cell[0], cell[1]
    lanes = tl.arange(0, LANES)
    bounds = tl.full((parts.shape[0], LANES), -float("inf"), best.dtype)
    sizes = tl.zeros((LANES,), best.dtype)
    for start in range(0, num_classes, LANES):
        corners, size = load_corners(ptrs, tl.minimum(start + lanes, num_classes - 1), None, stride_mk, best.dtype)
        bounds = tl.maximum(bounds, part_range(corners, wy_range, wx_range)[0])
        sizes += size
    bound = tl.max(bounds, 1, keep_dims=True)
    if tl.sum(sizes, 0) < float("inf"):
        for start in range(0, num_classes, LANES):
            corners, size = load_corners(ptrs, tl.minimum(start + lanes, num_classes - 1), None, stride_mk, best.dtype)
            upper = part_range(corners, wy_range, wx_range)[1]
            candidate = (upper >= bound) & (start + lanes < num_classes)[None, :]
            count = tl.max(tl.sum(candidate.to(tl.int32), 1), 0)
            bits = tl.where(candidate, tl.full((LANES,), 1, tl.uint32) << lanes, 0)
            words = tl.sum(bits, 1, keep_dims=True)
            word = tl.sum(tl.where(part == parts, words, 0), 0, keep_dims=True)  # (1, COLUMNS)
            for _ in range(count):
                # A part that is done compares an earlier class again, which changes nothing.
                position, word = lowest_class(word)
                best, label = compare(best, label, tl.maximum(start + position, 0), cell, False)
    else:
        for k in range(num_classes):
            best, label = compare(best, label, tl.zeros(part.shape, tl.int32) + k, cell, True)
    return best, label


@triton.jit(do_not_specialize=["num_classes", "cells_y", "cells_x", *GEOMETRY])
def upsample_argmax_kernel(
    masks_ptr,  # (B, K, h, w), or with an index (B, K, groups)
    index_ptr,  # (B, h, w) groups of the inputs, contiguous, or None
    labels_ptr,  # (B, H', W'), contiguous
    masks_strides,
    num_classes,
    size_in_y, size_out_y, kept_y, step_y, offset_y, denominator_y,
    size_in_x, size_out_x, kept_x, step_x, offset_x, denominator_x,
    cells_y, parts_y, cells_x, parts_x,  # parts: tiles of a cell
    ONE_BLOCK: tl.constexpr,  # all classes fit one block
    WIDE: tl.constexpr,  # positions pass 32 bits
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of a cell; the first cell of a row or column is -1."""
    dtype: tl.constexpr = tl.float64 if masks_ptr.dtype.element_ty == tl.float64 else tl.float32
    ys = Axis(size_in_y, size_out_y, kept_y, step_y, offset_y, denominator_y)
    xs = Axis(size_in_x, size_out_x, kept_x, step_x, offset_x, denominator_x)
    stride_mk = masks_strides[1]
    pid = tl.program_id(0)
    part_x = pid % parts_x
    cell_x = pid // parts_x % cells_x - 1
    row = pid // parts_x // cells_x
    part_y = row % parts_y
    cell_y = row // parts_y % cells_y - 1
    b = (row // parts_y // cells_y).to(tl.int64)
    if WIDE:
        cell_y, cell_x, stride_mk = cell_y.to(tl.int64), cell_x.to(tl.int64), stride_mk * tl.full((), 1, tl.int64)
    begin_y = cell_start(cell_y, ys) + part_y * BLOCK_Y
    begin_x = cell_start(cell_x, xs) + part_x * BLOCK_X
    end_y, end_x = cell_start(cell_y + 1, ys), cell_start(cell_x + 1, xs)
    if (begin_y >= end_y) | (begin_x >= end_x):
        return

    top, left = tl.maximum(cell_y, 0), tl.maximum(cell_x, 0)
    ptrs = corner_ptrs(masks_ptr, masks_strides, index_ptr, b, top, left, ys, xs)

    # Columns are lanes: those of the tile, side by side for each of its bands of ROWS rows.
    COLUMNS: tl.constexpr = BLOCK_Y * BLOCK_X if BLOCK_Y * BLOCK_X < 32 else 32
    ROWS: tl.constexpr = BLOCK_Y * BLOCK_X // COLUMNS
    columns = tl.arange(0, COLUMNS)[None, :]
    first_row, offs_x = columns // BLOCK_X * ROWS, columns % BLOCK_X
    offs_y = first_row + tl.arange(0, ROWS)[:, None]  # (ROWS, COLUMNS)
    wy = tile_weights(offs_y, begin_y, end_y, top, ys, dtype)
    wx = tile_weights(offs_x, begin_x, end_x, left, xs, dtype)
    cell = ptrs, stride_mk, wy, wx
    best = tl.full((ROWS, COLUMNS), -float("inf"), dtype)
    label = tl.zeros((ROWS, COLUMNS), tl.int32)

    few = False
    if ONE_BLOCK:
        offs_k = tl.arange(0, BLOCK_K)
        mask = offs_k < num_classes
        tl.assume(num_classes > BLOCK_K // 2)  # half the mask is true
        corners, size = load_corners(ptrs, offs_k, mask, stride_mk, dtype)
        c00, c01, c10, c11 = corners
        bound = tl.max(tl.where(mask, tl.minimum(tl.minimum(c00, c01), tl.minimum(c10, c11)), -float("inf")), 0)
        upper = tl.maximum(tl.maximum(c00, c01), tl.maximum(c10, c11))
        candidates = tl.where(mask & (upper >= bound), offs_k, num_classes)
        count = tl.sum((candidates < num_classes).to(tl.int32), 0)
        few = (tl.sum(tl.where(mask, size, 0.0), 0) < float("inf")) & (count <= FEW)
        if few:
            k = tl.min(candidates, 0)
            while k < num_classes:
                best, label = compare(best, label, k, cell, False)
                k = tl.min(tl.where(candidates > k, candidates, num_classes), 0)
    if not few:
        # Quarters share the weights in the middle, so that the values there are computed once.
        quarters = tl.arange(0, 4)[:, None]
        half_y, half_x = quarters // 2, quarters % 2
        wy_range = (
            tile_weights(half_y * (BLOCK_Y // 2), begin_y, end_y, top, ys, dtype),
            tile_weights(tl.where(half_y == 0, BLOCK_Y // 2, BLOCK_Y - 1), begin_y, end_y, top, ys, dtype),
        )
        wx_range = (
            tile_weights(half_x * (BLOCK_X // 2), begin_x, end_x, left, xs, dtype),
            tile_weights(tl.where(half_x == 0, BLOCK_X // 2, BLOCK_X - 1), begin_x, end_x, left, xs, dtype),
        )
        quarter = (first_row >= BLOCK_Y // 2).to(tl.int32) * 2 + (offs_x >= BLOCK_X // 2).to(tl.int32)
        best, label = compare_parts(best, label, quarters, quarter, wy_range, wx_range, num_classes, cell)
    first = (b * ys.kept + begin_y) * xs.kept + begin_x
    mask = (begin_y + offs_y < end_y) & (begin_x + offs_x < end_x)
    tl.store(labels_ptr + (first + (offs_y * xs.kept + offs_x)), label.to(labels_ptr.dtype.element_ty), mask=mask)


class Tiles(NamedTuple):
    """Outputs of a tile, classes of a step, warps."""

    block_y: int
    block_x: int
    block_k: int
    num_warps: int


def launch_config(rows: int, cols: int, num_classes: int) -> Tiles:
    """Tiles for cells of at most ``rows x cols`` outputs: one warp, up to 256 outputs, 256 classes at once."""
    block_y, block_x = (min(next_power_of_2(size), 16) for size in (rows, cols))
    return Tiles(block_y, block_x, min(next_power_of_2(num_classes), 256), num_warps=1)


@lru_cache(maxsize=256)
def _launch_sizes(
    num_classes: int, grid: Sequence[int], size: Sequence[int], crop: Sequence[int], align_corners: bool, wide: bool
) -> tuple[int, dict[str, int]]:
    """Programs of an image, and the arguments of a launch that its sizes determine, or ``wide`` classes."""
    ys, xs = (Axis.make(*axis, align_corners) for axis in zip(grid, size, crop, strict=True))
    tiles = launch_config(ys.longest_cell, xs.longest_cell, num_classes)
    parts_y, parts_x = cdiv(ys.longest_cell, tiles.block_y), cdiv(xs.longest_cell, tiles.block_x)
    farthest = max((axis.cells + 1) * axis.denominator + abs(axis.offset) + axis.step for axis in (ys, xs))
    sizes = dict(cells_y=ys.cells, parts_y=parts_y, cells_x=xs.cells, parts_x=parts_x, **geometry(ys, xs))
    sizes |= dict(ONE_BLOCK=num_classes <= tiles.block_k, WIDE=wide or max(farthest, 16 * xs.kept) >= 2**31)
    return ys.cells * parts_y * xs.cells * parts_x, sizes | launch_arguments(tiles)


def upsample_argmax(
    masks: Tensor, size: Sequence[int], crop: Sequence[int], align_corners: bool, index: Tensor | None = None
) -> Tensor:
    """``(B, K, h, w)``, or ``(B, K, groups)`` with an index -> ``(B, H', W')``, uint8 if K <= 256 and else int32."""
    batch, num_classes, *grid = shape_on_grid(masks, index)
    labels = masks.new_empty((batch, *crop), dtype=label_dtype(num_classes))
    if num_classes == 1 or batch == 0:
        return labels.zero_()
    wide = num_classes * masks.stride(1) >= 2**31
    count, sizes = _launch_sizes(num_classes, tuple(grid), tuple(size), tuple(crop), align_corners, wide)
    upsample_argmax_kernel[programs(batch * count, masks=masks.shape, labels=labels.shape)](
        masks_ptr=masks,
        index_ptr=contiguous(index),
        labels_ptr=labels,
        masks_strides=strides_on_grid(masks, index),
        num_classes=num_classes,
        **sizes,
    )
    return labels
