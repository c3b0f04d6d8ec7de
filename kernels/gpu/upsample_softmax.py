"""Softmax over the classes of bilinearly upsampled masks in Triton; the logits are never written.

    p = softmax_k(l),  l = R masks: the resize R of the masks (B, K, h, w) to a size, of which a crop is kept

One program owns some rows of a row of cells (cells.py), across cells: lanes hold PIXELS neighbours, a thread holds all
rows, so that every class leaves in full lines of memory and no loop waits for another thread. A first pass over the
classes finds the largest corner of each column's cell, a second sums the exponentials, a third computes them again and
writes the probabilities. The logits of a column are linear in its rows. So for half-precision results, exponentials
are products: exp(a + n b) = exp(a) exp(b)^n, by binary powers, with two exponentials a column. Where logits of a
program are so far apart that exponentials could underflow, or not finite, it takes PyTorch's arithmetic row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bilinear import Axis, shape_on_grid
from .cells import DEEP, GEOMETRY, SAFE_SPREAD, aligned, geometry, mix, tile_of, tiles_of, upper_weight, wide
from .common import LOG2_E, cdiv, device_arch, launch_arguments, next_power_of_2, programs
from .groups import contiguous, strides_on_grid

STRIDES = [f"stride_m{axis}" for axis in "bkhw"]
SAFE_POWERS = tl.constexpr(80.0)  # spread of the corners at which no power of the exponentials leaves float32


@triton.jit(do_not_specialize=["num_classes", "blocks_y", "tiles_y", *STRIDES, *GEOMETRY])
def softmax_kernel(
    masks_ptr,  # (B, K, h, w), or with an index (B, K, groups)
    index_ptr,  # (B, h, w) groups of the inputs, contiguous, or None
    out_ptr,  # (B, K, H', W'), contiguous
    stride_mb, stride_mk, stride_mh, stride_mw, num_classes, blocks_y, tiles_y,
    size_in_y, size_out_y, kept_y, step_y, offset_y, denominator_y,
    size_in_x, size_out_x, kept_x, step_x, offset_x, denominator_x,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, PIXELS: tl.constexpr, CELLS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """CELLS is 1 if the PIXELS of a lane are always of one cell, and else PIXELS."""
    dtype: tl.constexpr = tl.float64 if masks_ptr.dtype.element_ty == tl.float64 else tl.float32
    POWERS: tl.constexpr = masks_ptr.dtype.element_ty.primitive_bitwidth == 16
    LANES: tl.constexpr = BLOCK_X // PIXELS
    integer: tl.constexpr = tl.int64 if WIDE else tl.int32
    ys = Axis(size_in_y, size_out_y, kept_y, step_y, offset_y, denominator_y)
    xs = Axis(size_in_x, size_out_x, kept_x, step_x, offset_x, denominator_x)
    pid = tl.program_id(0)
    blocks_x = tl.cdiv(kept_x, BLOCK_X)
    b = (pid // blocks_x // tiles_y).to(tl.int64)
    cell_y, begin_y, end_y = tile_of((pid // blocks_x % tiles_y).to(integer), blocks_y, ys, BLOCK_Y)
    if begin_y < end_y:
        begin_x = (pid % blocks_x * BLOCK_X).to(integer)
        # Lanes past the end repeat the last one.
        first = tl.minimum(begin_x + tl.arange(0, LANES)[None, :] * PIXELS, kept_x - PIXELS)
        cell_x = tl.maximum((first + tl.arange(0, CELLS)[:, None]) * step_x + offset_x, 0) // denominator_x
        weight_x = upper_weight(first + tl.arange(0, PIXELS)[:, None], cell_x, xs, dtype)
        # Without a change of size there is no second input, as in PyTorch: 0 * inf would be NaN.
        left, right = tl.minimum(cell_x, size_in_x - 1), cell_x + tl.cast(step_x != denominator_x, tl.int32)
        lower = tl.minimum(cell_y + tl.cast(step_y != denominator_y, tl.int32), size_in_y - 1)
        masks_ptr += b * stride_mb
        if index_ptr is not None:
            right = tl.minimum(right, size_in_x - 1)
            upper_row = index_ptr + (b * size_in_y + cell_y) * size_in_x
            lower_row = index_ptr + (b * size_in_y + lower) * size_in_x
            above = tl.load(upper_row + left) * stride_mw, tl.load(upper_row + right) * stride_mw
            below = tl.load(lower_row + left) * stride_mw, tl.load(lower_row + right) * stride_mw
            corners = masks_ptr, masks_ptr, above, below, stride_mk.to(tl.int64)
        else:
            sides = left * stride_mw, tl.minimum(right, size_in_x - 1) * stride_mw
            corners = (
                masks_ptr + cell_y.to(tl.int64) * stride_mh, masks_ptr + lower.to(tl.int64) * stride_mh,
                sides, sides, stride_mk.to(tl.int64),
            )  # fmt: skip

        highest = tl.full((CELLS, LANES), -float("inf"), dtype)
        lowest = tl.full((CELLS, LANES), -float("inf"), dtype)
        depth = tl.full((CELLS, LANES), -float("inf"), dtype)
        for k in range(num_classes):
            c00, c01, c10, c11 = load_corners(corners, k, dtype)
            smallest = tl.minimum(tl.minimum(c00, c01), tl.minimum(c10, c11))
            highest = tl.maximum(highest, tl.maximum(tl.maximum(c00, c01), tl.maximum(c10, c11)))
            lowest = tl.maximum(lowest, smallest)
            depth = tl.maximum(depth, -smallest)
        apart = highest + depth > SAFE_POWERS if POWERS else (highest - lowest > SAFE_SPREAD) | (depth > DEEP)
        far = (tl.max(tl.max(apart.to(tl.int32), 1), 0) > 0) | (num_classes == 1)

        stride_y = kept_x // PIXELS * PIXELS  # kept_x, which the compiler now knows to be a multiple of PIXELS
        plane = stride_y.to(tl.int64) * kept_y
        out_ptr += b * num_classes * plane + begin_y.to(tl.int64) * stride_y
        index_x = tl.arange(0, BLOCK_X)
        offs_x = tl.minimum(begin_x + index_x // PIXELS * PIXELS, kept_x - PIXELS) + index_x % PIXELS
        offs_x = tl.max_contiguous(tl.multiple_of(offs_x, PIXELS), PIXELS)
        if far:
            for y in range(begin_y, tl.minimum(begin_y + BLOCK_Y, end_y)):
                weights = upper_weight(y, cell_y, ys, dtype), weight_x
                shift = tl.full((PIXELS, LANES), -float("inf"), dtype)
                for k in range(num_classes):
                    shift = tl.maximum(shift, far_logits(corners, k, weights, dtype))
                total = tl.zeros((PIXELS, LANES), dtype)  # a maximum drops NaN on a GPU, the sum does not
                for k in range(num_classes):
                    total += tl.exp2((far_logits(corners, k, weights, dtype) - shift) * LOG2_E)
                for k in range(num_classes):
                    p = tl.exp2((far_logits(corners, k, weights, dtype) - shift) * LOG2_E) / total
                    tl.store((out_ptr + k * plane) + offs_x[None, :], to_rows(p[None, :, :], out_ptr))
                out_ptr += stride_y
        else:
            index_y = tl.arange(0, BLOCK_Y)
            weight_y = upper_weight(begin_y, cell_y, ys, dtype), upper_weight(begin_y + index_y, cell_y, ys, dtype)
            step = tl.where(begin_y * step_y + offset_y < 0, 0, step_y).to(dtype) / denominator_y.to(dtype)
            near = weight_y[0], step, weight_y[1], weight_x
            total = tl.zeros((BLOCK_Y, PIXELS, LANES), dtype)
            for k in range(num_classes):
                total += exponentials(corners, k, highest, near, POWERS, dtype)
            inverse = 1.0 / total
            mask = (index_y < end_y - begin_y)[:, None]
            rows = index_y.to(integer)[:, None] * stride_y
            for k in range(num_classes):
                p = exponentials(corners, k, highest, near, POWERS, dtype) * inverse
                tl.store((out_ptr + k * plane) + rows + offs_x[None, :], to_rows(p, out_ptr), mask=mask)


@triton.jit
def load_corners(corners, k, dtype: tl.constexpr):
    """``(CELLS, LANES)`` for each corner of class ``k``."""
    upper_ptr, lower_ptr, above, below, stride_k = corners
    upper_ptr, lower_ptr = upper_ptr + k * stride_k, lower_ptr + k * stride_k
    return (
        tl.load(upper_ptr + above[0]).to(dtype),
        tl.load(upper_ptr + above[1]).to(dtype),
        tl.load(lower_ptr + below[0]).to(dtype),
        tl.load(lower_ptr + below[1]).to(dtype),
    )


@triton.jit
def far_logits(corners, k, weights, dtype: tl.constexpr):
    """``(PIXELS, LANES)`` logits of a row."""
    c00, c01, c10, c11 = load_corners(corners, k, dtype)
    return mix(mix(c00, c01, weights[1]), mix(c10, c11, weights[1]), weights[0])


@triton.jit
def exponentials(corners, k, base, near, POWERS: tl.constexpr, dtype: tl.constexpr):
    """``(BLOCK_Y, PIXELS, LANES)`` exp(logit - base), where no column is far."""
    first_y, step_y, weight_y, weight_x = near
    BLOCK_Y: tl.constexpr = weight_y.shape[0]
    c00, c01, c10, c11 = load_corners(corners, k, dtype)
    top = (c00 - base) * LOG2_E + weight_x * ((c01 - c00) * LOG2_E)
    rise = (c10 - c00) * LOG2_E + weight_x * (((c11 - c01) - (c10 - c00)) * LOG2_E)
    if POWERS:
        row = tl.arange(0, BLOCK_Y)[:, None, None]
        e = tl.exp2(top + first_y * rise)[None, :, :]
        power = tl.exp2(step_y * rise)[None, :, :]
        for bit in tl.static_range(5):
            if (1 << bit) < BLOCK_Y:
                e = tl.where((row >> bit) % 2 == 1, e * power, e)
                power *= power
        e = tl.broadcast_to(e, (BLOCK_Y, weight_x.shape[0], weight_x.shape[1]))
    else:
        e = tl.exp2(top[None, :, :] + weight_y[:, None, None] * rise[None, :, :])
    return e


@triton.jit
def to_rows(p, out_ptr):
    """``(rows, PIXELS, LANES)`` -> ``(rows, PIXELS * LANES)``, as they lie in memory."""
    p = tl.permute(p.to(out_ptr.dtype.element_ty), 0, 2, 1)
    return tl.reshape(p, (p.shape[0], p.shape[1] * p.shape[2]))


class Tiles(NamedTuple):
    """Outputs of a program, neighbours of a lane, and warps."""

    block_y: int
    block_x: int
    pixels: int
    num_warps: int = 1
    num_stages: int = 1


def launch_config(longest_y: int, kept_x: int, pixels: int, lanes: int, dtype: torch.dtype, rows: int) -> Tiles:
    """One warp with up to 32 outputs to a thread, 16 where the ``rows`` of all cells are too few to fill a device."""
    pixels = min(pixels, 16 // dtype.itemsize, 4)
    block_y = min(next_power_of_2(longest_y), 8 if dtype.itemsize < 8 else 4)
    if rows // block_y * cdiv(kept_x, pixels * lanes) < 512:
        block_y = min(block_y, 4)
    return Tiles(block_y, pixels * lanes, pixels)


class Plan(NamedTuple):
    """The grid of a launch and the arguments that depend on sizes alone."""

    grid: tuple[int, ...]
    arguments: dict[str, Any]


@lru_cache(maxsize=256)
def plan(shape: Sequence[int], strides: Sequence[int], ys: Axis, xs: Axis, dtype: torch.dtype, arch: str) -> Plan:
    """Launch for masks of a shape and strides."""
    batch, num_classes, *_ = shape
    longest_y, lanes = min(ys.longest_cell, ys.kept), 32 if arch.startswith("sm_") else 64
    tiles = launch_config(longest_y, xs.kept, aligned(xs.kept), lanes, dtype, batch * ys.kept)
    blocks_y = cdiv(longest_y, tiles.block_y)
    _, tiles_y = tiles_of(ys, blocks_y, tiles.block_y)
    arguments: dict[str, Any] = geometry(ys, xs) | launch_arguments(tiles) | dict(zip(STRIDES, strides, strict=True))
    arguments |= {"num_classes": num_classes, "blocks_y": blocks_y, "tiles_y": tiles_y}
    arguments["CELLS"] = 1 if aligned(*xs.cell_starts) >= tiles.pixels else tiles.pixels
    arguments["WIDE"] = wide(ys, xs, tiles.block_y * xs.kept, xs.size_in * strides[3])
    if arch.startswith("sm_"):
        arguments["maxnreg"] = 128
    return Plan(programs(batch * tiles_y * cdiv(xs.kept, tiles.block_x), masks=shape), arguments)


def upsample_softmax(
    masks: Tensor, size: Sequence[int], crop: Sequence[int], align_corners: bool, index: Tensor | None = None
) -> Tensor:
    """``(B, K, h, w)``, or ``(B, K, groups)`` with an index ``(B, h, w)`` -> ``(B, K, H', W')``."""
    batch, num_classes, *grid = shape = shape_on_grid(masks, index)
    out = masks.new_empty((batch, num_classes, *crop))
    if batch:
        ys, xs = (Axis.make(*axis, align_corners) for axis in zip(grid, size, crop, strict=True))
        launch = plan(shape, strides_on_grid(masks, index), ys, xs, masks.dtype, device_arch(masks))
        tensors = {"masks_ptr": masks, "index_ptr": contiguous(index), "out_ptr": out}
        softmax_kernel[launch.grid](**tensors, **launch.arguments)
    return out
