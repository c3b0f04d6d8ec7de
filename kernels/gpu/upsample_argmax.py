"""Labels of bilinearly upsampled masks in Triton, by exact pruning.

    label(y, x) = argmax_k  sum over the corners c of the cell of (y, x):  weight_c(y, x) masks[k, c]

All outputs of a tile inside one cell are convex combinations of the four interpolated values at the tile's own
corners. So lower_k <= logit_k <= upper_k there, with the smallest and the largest of these four, and a class with
upper_k < max_j lower_j cannot win anywhere in the tile. One program owns a tile of a cell, or of CELLS cells side by
side. A first walk over the classes finds the bound, a second one visits the classes that reach it in rising order and
compares their logits (BLOCK_Y, CELLS, BLOCK_X); a block of classes without any costs no more than its bounds. On smooth
maps hardly more than one class is left; nothing but the labels is written. Where a corner is NaN or infinite, nothing
is pruned: a NaN wins, as in torch.argmax. Not differentiable, nothing is saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bilinear import Axis
from .cells import GEOMETRY, geometry, strides, upper_weights
from .common import Specialization, cell_start


@triton.jit
def class_range(ptrs, offsets, mask, wy, wx, dtype: tl.constexpr):
    """Smallest and largest logit of ``(CELLS, BLOCK_K)`` classes in the tiles; and 0, or NaN where not all is finite.

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


@triton.jit(do_not_specialize=["num_classes", "cells_y", "groups_x", "parts_y", "parts_x", *GEOMETRY])
def upsample_argmax_kernel(
    masks_ptr,  # (B, K, h, w)
    labels_ptr,  # (B, H', W'), contiguous
    stride_mb,
    stride_mk,
    stride_mh,
    stride_mw,
    num_classes,
    height,
    width,
    step_y,
    offset_y,
    denominator_y,
    kept_y,
    step_x,
    offset_x,
    denominator_x,
    kept_x,
    cells_y,
    groups_x,  # of CELLS cells
    parts_y,  # tiles of a cell
    parts_x,
    CELLS: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of each of CELLS neighbouring cells; the first cell of a row or column is -1."""
    dtype: tl.constexpr = tl.float64 if masks_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    part_x = pid % parts_x
    group_x = pid // parts_x % groups_x
    part_y = pid // parts_x // groups_x % parts_y
    cell_y = (pid // parts_x // groups_x // parts_y % cells_y).to(tl.int64) - 1
    b = (pid // parts_x // groups_x // parts_y // cells_y).to(tl.int64)
    cells_x = (group_x * CELLS + tl.arange(0, CELLS)).to(tl.int64) - 1  # (CELLS,)

    begin_y = cell_start(cell_y, step_y, offset_y, denominator_y, kept_y) + part_y * BLOCK_Y
    begin_x = cell_start(cells_x, step_x, offset_x, denominator_x, kept_x) + part_x * BLOCK_X
    end_y = cell_start(cell_y + 1, step_y, offset_y, denominator_y, kept_y)
    end_x = cell_start(cells_x + 1, step_x, offset_x, denominator_x, kept_x)
    filled = (begin_x < end_x) & (begin_y < end_y)
    if tl.max(filled.to(tl.int32), 0) == 0:
        return

    # Outputs before the first centre take their weights from cell 0, as in PyTorch: clamped to 0.
    top = tl.maximum(cell_y, 0)
    left = tl.minimum(tl.maximum(cells_x, 0), width - 1)
    offs_y = begin_y + tl.arange(0, BLOCK_Y)
    offs_x = begin_x[:, None] + tl.arange(0, BLOCK_X)[None, :]  # (CELLS, BLOCK_X)
    wy = upper_weights(offs_y, end_y, top, step_y, offset_y, denominator_y, dtype)
    wx = upper_weights(offs_x, end_x[:, None], left[:, None], step_x, offset_x, denominator_x, dtype)
    last_y, last_x = begin_y + BLOCK_Y - 1, begin_x + BLOCK_X - 1
    wy_range = (
        upper_weights(begin_y, end_y, top, step_y, offset_y, denominator_y, dtype),
        upper_weights(last_y, end_y, top, step_y, offset_y, denominator_y, dtype),
    )
    wx_range = (
        upper_weights(begin_x, end_x, left, step_x, offset_x, denominator_x, dtype)[:, None],
        upper_weights(last_x, end_x, left, step_x, offset_x, denominator_x, dtype)[:, None],
    )

    # Without a change of size there is no second input, as in PyTorch: 0 * inf would be NaN.
    bottom = tl.minimum(top + (step_y != denominator_y).to(tl.int64), height - 1)
    right = tl.minimum(left + (step_x != denominator_x).to(tl.int64), width - 1)
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
        # Not upper >= bound, which a NaN would fail. Classes out of the race become num_classes.
        candidates = tl.where(mask & ~(upper < bound[:, None]), offs_k, num_classes)
        k = tl.min(candidates, 1)  # (CELLS,)
        while tl.min(k, 0) < num_classes:
            racing = k < num_classes
            offsets = k.to(tl.int64) * stride_mk
            c00 = tl.load(p00 + offsets, mask=racing, other=0.0).to(dtype)[None, :]
            c01 = tl.load(p01 + offsets, mask=racing, other=0.0).to(dtype)[None, :]
            c10 = tl.load(p10 + offsets, mask=racing, other=0.0).to(dtype)[None, :]
            c11 = tl.load(p11 + offsets, mask=racing, other=0.0).to(dtype)[None, :]
            left_edge = c00 * (1 - wy[:, None]) + c10 * wy[:, None]  # (BLOCK_Y, CELLS)
            right_edge = c01 * (1 - wy[:, None]) + c11 * wy[:, None]
            value = left_edge[:, :, None] * (1 - wx[None]) + right_edge[:, :, None] * wx[None]
            # A NaN wins against every number, and nothing against a NaN.
            wins = ~(value <= best) & (best == best) & racing[None, :, None]
            best = tl.where(wins, value, best)
            label = tl.where(wins, k[None, :, None], label)
            k = tl.min(tl.where(candidates > k[:, None], candidates, num_classes), 1)

    ptrs_out = labels_ptr + (b * kept_y + offs_y[:, None, None]) * kept_x + offs_x[None]
    mask_out = (offs_y < end_y)[:, None, None] & (offs_x < end_x[:, None])[None]
    tl.store(ptrs_out, label.to(labels_ptr.dtype.element_ty), mask=mask_out)


class Tiles(NamedTuple):
    """What one program works on: cells, their outputs, classes at a time."""

    cells: int
    block_y: int
    block_x: int
    block_k: int
    num_warps: int


def launch_config(rows: int, cols: int, num_classes: int) -> Tiles:
    """Tiles for cells of at most ``rows x cols`` outputs: one warp, up to 256 outputs, 256 corners at a time.

    Small cells go in pairs. More of them to a warp spill: four cells of 4x4 outputs do on sm_80 and sm_90.
    """
    block_y, block_x = (min(triton.next_power_of_2(size), 16) for size in (rows, cols))
    cells = 2 if block_y * block_x <= 16 else 1
    return Tiles(cells, block_y, block_x, min(triton.next_power_of_2(num_classes), 256 // cells), num_warps=1)


def _constants(tiles: Tiles) -> dict[str, int]:
    return {"CELLS": tiles.cells, "BLOCK_Y": tiles.block_y, "BLOCK_X": tiles.block_x, "BLOCK_K": tiles.block_k}


def upsample_argmax(masks: Tensor, size: Sequence[int], crop: Sequence[int], align_corners: bool) -> Tensor:
    """``(B, K, h, w)`` -> ``(B, H', W')``, uint8 where K <= 256 and int32 otherwise."""
    batch, num_classes, h, w = masks.shape
    labels = masks.new_empty((batch, *crop), dtype=torch.uint8 if num_classes <= 256 else torch.int32)
    if num_classes == 1 or batch == 0:
        return labels.zero_()
    ys, xs = (Axis.make(*axis, align_corners) for axis in zip((h, w), size, crop, strict=True))
    tiles = launch_config(ys.longest_cell, xs.longest_cell, num_classes)
    groups_x = -(-xs.cells // tiles.cells)
    parts_y, parts_x = -(-ys.longest_cell // tiles.block_y), -(-xs.longest_cell // tiles.block_x)
    upsample_argmax_kernel[(batch * ys.cells * parts_y * groups_x * parts_x,)](
        masks_ptr=masks,
        labels_ptr=labels,
        **strides("stride_m", "bkhw", masks),
        num_classes=num_classes,
        **geometry(ys, xs),
        cells_y=ys.cells,
        groups_x=groups_x,
        parts_y=parts_y,
        parts_x=parts_x,
        **_constants(tiles),
        num_warps=tiles.num_warps,
    )
    return labels


def specializations(arch: str) -> Iterator[Specialization]:
    """Cells of 1 to 16 outputs a side, channels-last as decoders leave them, and contiguous masks."""
    strides_of = dict.fromkeys(("stride_mb", "stride_mk", "stride_mh", "stride_mw"), "i32")
    sizes = dict.fromkeys(("num_classes", "cells_y", "groups_x", "parts_y", "parts_x", *GEOMETRY), "i32")
    for side in (1, 2, 4, 8, 16):
        for num_classes in (19, 150, 1000):
            for dtype in ("bf16", "fp32"):
                for unit in ("stride_mk", "stride_mw"):
                    tiles = launch_config(side, side, num_classes)
                    label_type = "*u8" if num_classes <= 256 else "*i32"
                    signature = {"masks_ptr": f"*{dtype}", "labels_ptr": label_type, **strides_of, **sizes}
                    del signature[unit]
                    layout = "channels-last" if unit == "stride_mk" else "contiguous"
                    yield Specialization(
                        f"upsample_argmax {side}x{side} K={num_classes} {dtype} {layout}",
                        upsample_argmax_kernel,
                        signature,
                        {unit: 1, **_constants(tiles)},
                        {"num_warps": tiles.num_warps},
                        frozenset({"stride_mw"} if unit == "stride_mk" else ()),
                    )
