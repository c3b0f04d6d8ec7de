"""Labels of bilinearly upsampled masks in Triton, by exact pruning.

    label(y, x) = argmax_k  sum over the corners c of the cell of (y, x):  weight_c(y, x) masks[k, c]

All outputs of a tile inside one cell are convex combinations of the four interpolated values at the tile's own
corners. So lower_k <= logit_k <= upper_k there, with the smallest and the largest of these four, and a class with
upper_k < max_j lower_j cannot win anywhere in the tile. One program owns a tile of a cell, or of CELLS cells side by
side. A first pass over the classes computes the bound; a second compares the logits (BLOCK_Y, CELLS, BLOCK_X) of the
classes that reach it, in rising order. On smooth maps few tiles have more than one. Only the labels are written. Where
a corner is NaN or infinite, nothing is pruned: a NaN wins, as in torch.argmax. Not differentiable, nothing is saved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bilinear import Axis
from .cells import GEOMETRY, cell_start, geometry, upper_weights
from .common import launch_arguments

TILING = ["cells_y", "parts_y", "groups_x", "parts_x"]


@triton.jit
def class_range(ptrs, offsets, mask, wy, wx, dtype: tl.constexpr):
    """Smallest and largest logit of ``(CELLS, BLOCK_K)`` classes in the tiles; and 0, or NaN if any is not finite.

    ``wy`` and ``wx`` are pairs: the upper weights of the tiles' first and last outputs.
    """
    c00 = tl.load(ptrs[0] + offsets, mask=mask, other=0.0).to(dtype)
    c01 = tl.load(ptrs[1] + offsets, mask=mask, other=0.0).to(dtype)
    c10 = tl.load(ptrs[2] + offsets, mask=mask, other=0.0).to(dtype)
    c11 = tl.load(ptrs[3] + offsets, mask=mask, other=0.0).to(dtype)
    lower = tl.full(c00.shape, float("inf"), dtype)
    upper = tl.full(c00.shape, -float("inf"), dtype)
    for last_y in tl.static_range(2):
        left = c00 * (1 - wy[last_y]) + c10 * wy[last_y]
        right = c01 * (1 - wy[last_y]) + c11 * wy[last_y]
        for last_x in tl.static_range(2):
            value = left * (1 - wx[last_x]) + right * wx[last_x]
            lower = tl.minimum(lower, value)
            upper = tl.maximum(upper, value)
    return tl.where(mask, lower, -float("inf")), upper, ((c00 + c01) + (c10 + c11)) * 0.0


@triton.jit(do_not_specialize=["num_classes", *TILING, *GEOMETRY])
def upsample_argmax_kernel(
    masks_ptr,  # (B, K, h, w)
    labels_ptr,  # (B, H', W'), contiguous
    masks_strides,
    num_classes,
    size_in_y, size_out_y, kept_y, step_y, offset_y, denominator_y,
    size_in_x, size_out_x, kept_x, step_x, offset_x, denominator_x,
    cells_y, parts_y, groups_x, parts_x,  # parts: tiles of a cell; groups: of CELLS cells
    CELLS: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of each of CELLS neighbouring cells; the first cell of a row or column is -1."""
    dtype: tl.constexpr = tl.float64 if masks_ptr.dtype.element_ty == tl.float64 else tl.float32
    ys = Axis(size_in_y, size_out_y, kept_y, step_y, offset_y, denominator_y)
    xs = Axis(size_in_x, size_out_x, kept_x, step_x, offset_x, denominator_x)
    stride_mb, stride_mk, stride_mh, stride_mw = masks_strides
    pid = tl.program_id(0)
    part_x = pid % parts_x
    group_x = pid // parts_x % groups_x
    part_y = pid // parts_x // groups_x % parts_y
    cell_y = (pid // parts_x // groups_x // parts_y % cells_y).to(tl.int64) - 1
    b = (pid // parts_x // groups_x // parts_y // cells_y).to(tl.int64)
    cells_x = (group_x * CELLS + tl.arange(0, CELLS)).to(tl.int64) - 1  # (CELLS,)

    begin_y = cell_start(cell_y, ys) + part_y * BLOCK_Y
    begin_x = cell_start(cells_x, xs) + part_x * BLOCK_X
    end_y = cell_start(cell_y + 1, ys)
    end_x = cell_start(cells_x + 1, xs)
    filled = (begin_x < end_x) & (begin_y < end_y)
    if tl.max(filled.to(tl.int32), 0) == 0:
        return

    # Outputs before the first centre take their weights from cell 0, as in PyTorch: clamped to 0.
    top = tl.maximum(cell_y, 0)
    left = tl.minimum(tl.maximum(cells_x, 0), xs.size_in - 1)
    offs_y = begin_y + tl.arange(0, BLOCK_Y)
    offs_x = begin_x[:, None] + tl.arange(0, BLOCK_X)[None, :]  # (CELLS, BLOCK_X)
    wy = upper_weights(offs_y, end_y, top, ys, dtype)
    wx = upper_weights(offs_x, end_x[:, None], left[:, None], xs, dtype)
    last_y, last_x = begin_y + BLOCK_Y - 1, begin_x + BLOCK_X - 1
    wy_range = (
        upper_weights(begin_y, end_y, top, ys, dtype),
        upper_weights(last_y, end_y, top, ys, dtype),
    )
    wx_range = (
        upper_weights(begin_x, end_x, left, xs, dtype)[:, None],
        upper_weights(last_x, end_x, left, xs, dtype)[:, None],
    )

    # Without a change of size there is no second input, as in PyTorch: 0 * inf would be NaN.
    bottom = tl.minimum(top + tl.cast(ys.step != ys.denominator, tl.int64), ys.size_in - 1)
    right = tl.minimum(left + tl.cast(xs.step != xs.denominator, tl.int64), xs.size_in - 1)
    upper_row = masks_ptr + b * stride_mb + top * stride_mh
    lower_row = masks_ptr + b * stride_mb + bottom * stride_mh
    p00, p01 = upper_row + left * stride_mw, upper_row + right * stride_mw  # (CELLS,)
    p10, p11 = lower_row + left * stride_mw, lower_row + right * stride_mw
    ptrs = (p00[:, None], p01[:, None], p10[:, None], p11[:, None])

    bound = tl.full((CELLS, BLOCK_K), -float("inf"), dtype)
    poison = tl.zeros((CELLS, BLOCK_K), dtype)
    for start in range(0, num_classes, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)[None, :]
        mask = (offs_k < num_classes) & filled[:, None]
        lower, _, not_finite = class_range(ptrs, offs_k.to(tl.int64) * stride_mk, mask, wy_range, wx_range, dtype)
        bound = tl.maximum(bound, lower)
        poison += not_finite
    bound = tl.where(tl.sum(poison, 1) == 0, tl.max(bound, 1), -float("inf"))  # (CELLS,)

    best = tl.full((BLOCK_Y, CELLS, BLOCK_X), -float("inf"), dtype)
    label = tl.zeros((BLOCK_Y, CELLS, BLOCK_X), tl.int32)
    for start in range(0, num_classes, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)[None, :]
        mask = (offs_k < num_classes) & filled[:, None]
        _, upper, _ = class_range(ptrs, offs_k.to(tl.int64) * stride_mk, mask, wy_range, wx_range, dtype)
        # A NaN must pass, so not upper >= bound. Other classes become num_classes.
        candidates = tl.where(mask & ~(upper < bound[:, None]), offs_k, num_classes)
        k = tl.min(candidates, 1)  # (CELLS,)
        while tl.min(k, 0) < num_classes:
            candidate = k < num_classes
            offsets = k.to(tl.int64) * stride_mk
            c00 = tl.load(p00 + offsets, mask=candidate, other=0.0).to(dtype)[None, :]
            c01 = tl.load(p01 + offsets, mask=candidate, other=0.0).to(dtype)[None, :]
            c10 = tl.load(p10 + offsets, mask=candidate, other=0.0).to(dtype)[None, :]
            c11 = tl.load(p11 + offsets, mask=candidate, other=0.0).to(dtype)[None, :]
            left_edge = c00 * (1 - wy[:, None]) + c10 * wy[:, None]  # (BLOCK_Y, CELLS)
            right_edge = c01 * (1 - wy[:, None]) + c11 * wy[:, None]
            value = left_edge[:, :, None] * (1 - wx[None]) + right_edge[:, :, None] * wx[None]
            # A NaN wins against every number, and nothing against a NaN.
            wins = ~(value <= best) & (best == best) & candidate[None, :, None]
            best = tl.where(wins, value, best)
            label = tl.where(wins, k[None, :, None], label)
            k = tl.min(tl.where(candidates > k[:, None], candidates, num_classes), 1)

    ptrs_out = labels_ptr + (b * ys.kept + offs_y[:, None, None]) * xs.kept + offs_x[None]
    mask_out = (offs_y < end_y)[:, None, None] & (offs_x < end_x[:, None])[None]
    tl.store(ptrs_out, label.to(labels_ptr.dtype.element_ty), mask=mask_out)


class Tiles(NamedTuple):
    """Cells of a program, outputs of each, classes of a step, warps."""

    cells: int
    block_y: int
    block_x: int
    block_k: int
    num_warps: int


def launch_config(rows: int, cols: int, num_classes: int) -> Tiles:
    """Tiles for cells of at most ``rows x cols`` outputs: one warp, up to 256 outputs, 256 corners at a time.

    Small cells go in pairs: four cells of 4x4 outputs to a warp spill on sm_80 and sm_90.
    """
    block_y, block_x = (min(triton.next_power_of_2(size), 16) for size in (rows, cols))
    cells = 2 if block_y * block_x <= 16 else 1
    return Tiles(cells, block_y, block_x, min(triton.next_power_of_2(num_classes), 256 // cells), num_warps=1)


def upsample_argmax(masks: Tensor, size: Sequence[int], crop: Sequence[int], align_corners: bool) -> Tensor:
    """``(B, K, h, w)`` -> ``(B, H', W')``, uint8 where K <= 256 and int32 otherwise."""
    batch, num_classes, h, w = masks.shape
    labels = masks.new_empty((batch, *crop), dtype=torch.uint8 if num_classes <= 256 else torch.int32)
    if num_classes == 1 or batch == 0:
        return labels.zero_()
    ys, xs = (Axis.make(*axis, align_corners) for axis in zip((h, w), size, crop, strict=True))
    tiles = launch_config(ys.longest_cell, xs.longest_cell, num_classes)
    parts_y, parts_x = -(-ys.longest_cell // tiles.block_y), -(-xs.longest_cell // tiles.block_x)
    tiling = ys.cells, parts_y, -(-xs.cells // tiles.cells), parts_x
    upsample_argmax_kernel[(batch * math.prod(tiling),)](
        masks_ptr=masks,
        labels_ptr=labels,
        masks_strides=masks.stride(),
        num_classes=num_classes,
        **geometry(ys, xs),
        **dict(zip(TILING, tiling, strict=True)),
        **launch_arguments(tiles),
    )
    return labels
