"""Gradient of upsample_softmax in Triton: grad_masks = R^T (p (g - sum_k p g)), with probabilities p, their gradient g.

One program owns tiles of some neighbouring cells (cells.py), each padded to WIDTH columns: lanes hold PIXELS
neighbours, a thread holds all rows. A first pass over the classes sums p g, and writes its share of the gradients of
each cell's corners to scratch memory; a second one reads p again and subtracts the share of p sum_k p g. For float32
and float64, whose results would show the rounding of that difference, the second pass reads g, too, and writes p (g -
sum_k p g) alone. ``sum_cells`` then adds the shares of an input, always in the same order and without atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bilinear import Axis
from ..registry import statistics_dtype
from .cells import GEOMETRY, aligned, geometry, tile_of, tiles_of, upper_weight, wide
from .common import cdiv, device_arch, launch_arguments, next_power_of_2, programs
from .merge_tokens import sum_groups

TILES = [f"{field}_{axis}" for axis in "yx" for field in ("first", "blocks", "tiles", "apart")]
STRIDES = [f"stride_{tensor}{axis}" for tensor in "gp" for axis in "bky"]


@triton.jit(do_not_specialize=["num_classes", "blocks_y", "blocks_x", "tiles_y", "tiles_x", *STRIDES, *GEOMETRY])
def softmax_backward_kernel(
    grad_ptr,  # (B, K, H', W')
    probabilities_ptr,  # (B, K, H', W')
    scratch_ptr,  # (B, tiles_y, K, tiles_x, 4)
    stride_gb, stride_gk, stride_gy, stride_gx, stride_pb, stride_pk, stride_py, stride_px,
    num_classes, blocks_y, blocks_x, tiles_y, tiles_x,
    size_in_y, size_out_y, kept_y, step_y, offset_y, denominator_y,
    size_in_x, size_out_x, kept_x, step_x, offset_x, denominator_x,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, WIDTH: tl.constexpr, PIXELS: tl.constexpr,
    ONCE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """ONCE: g is read once."""
    dtype: tl.constexpr = scratch_ptr.dtype.element_ty
    integer: tl.constexpr = tl.int64 if WIDE else tl.int32
    CELLS: tl.constexpr = BLOCK_X // WIDTH
    ys = Axis(size_in_y, size_out_y, kept_y, step_y, offset_y, denominator_y)
    xs = Axis(size_in_x, size_out_x, kept_x, step_x, offset_x, denominator_x)
    pid = tl.program_id(0)
    band = pid // tl.cdiv(tiles_x, CELLS)  # (B, tiles_y)
    first_x = pid % tl.cdiv(tiles_x, CELLS) * CELLS
    b = (band // tiles_y).to(tl.int64)
    cell_y, begin_y, end_y = tile_of((band % tiles_y).to(integer), blocks_y, ys, BLOCK_Y)

    offs_s = first_x * 4 + tl.arange(0, 4 * CELLS)
    mask_s = offs_s < 4 * tiles_x
    stride_s = tiles_x.to(tl.int64) * 4
    scratch_ptr += band * num_classes * stride_s
    _, begin_s, end_s = tile_of((offs_s // 4).to(integer), blocks_x, xs, WIDTH)
    full = (begin_s < end_s) & (begin_y < end_y)

    # Outputs past the end of a tile repeat the last ones, with weight 0.
    index_x = tl.arange(0, BLOCK_X)
    cell_x, begin_x, end_x = tile_of((first_x + index_x // WIDTH).to(integer), blocks_x, xs, WIDTH)
    index_x = index_x % WIDTH
    offs_x = tl.minimum(begin_x + index_x, tl.maximum(end_x - PIXELS, 0) + index_x % PIXELS)
    inside_x, right = (begin_x + index_x < end_x).to(dtype), upper_weight(offs_x, cell_x, xs, dtype)
    index_y = begin_y + tl.arange(0, BLOCK_Y)
    offs_y = tl.maximum(tl.minimum(index_y, end_y - 1), 0)
    inside_y, lower = (index_y < end_y).to(dtype), upper_weight(offs_y, cell_y, ys, dtype)
    weights = inside_y * (1 - lower), inside_y * lower, inside_x * (1 - right), inside_x * right

    # The compiler is told that lanes load PIXELS neighbours at once.
    offs_x = tl.max_contiguous(tl.multiple_of(offs_x, PIXELS), PIXELS)
    grad_ptr += b * (stride_gb // PIXELS * PIXELS)
    probabilities_ptr += b * (stride_pb // PIXELS * PIXELS)
    stride_gk, stride_pk = (stride_gk // PIXELS * PIXELS).to(tl.int64), (stride_pk // PIXELS * PIXELS).to(tl.int64)
    rows_g, rows_p = offs_y * (stride_gy // PIXELS * PIXELS), offs_y * (stride_py // PIXELS * PIXELS)
    offs_g, offs_p = offs_x * stride_gx, offs_x * stride_px

    mean = tl.zeros((BLOCK_Y, BLOCK_X), dtype)  # sum_k p g
    for k in range(num_classes):
        p = load_class(probabilities_ptr + k * stride_pk, rows_p, offs_p, dtype, "evict_last")
        g = load_class(grad_ptr + k * stride_gk, rows_g, offs_g, dtype, "evict_first" if ONCE else "evict_last")
        product = p * g
        mean += product
        if ONCE:
            found = to_corners(product, weights, CELLS)
            tl.store(scratch_ptr + k * stride_s + offs_s, tl.where(full, found, 0.0), mask=mask_s)
    if ONCE:
        tl.debug_barrier()  # other threads stored what the next pass loads
    for before in range(num_classes):
        k = num_classes - 1 - before  # the last ones may still be in the cache
        p = load_class(probabilities_ptr + k * stride_pk, rows_p, offs_p, dtype, "evict_first")
        ptrs = scratch_ptr + k * stride_s + offs_s
        if ONCE:
            share = to_corners(p * mean, weights, CELLS)
            found = tl.load(ptrs, mask=mask_s, other=0.0) - share
        else:
            g = load_class(grad_ptr + k * stride_gk, rows_g, offs_g, dtype, "evict_first")
            found = to_corners(p * (g - mean), weights, CELLS)
        tl.store(ptrs, tl.where(full, found, 0.0), mask=mask_s)


@triton.jit
def load_class(ptr, rows, cols, dtype: tl.constexpr, POLICY: tl.constexpr):
    """``(BLOCK_Y, BLOCK_X)`` values."""
    return tl.load((ptr + rows)[:, None] + cols[None, :], eviction_policy=POLICY).to(dtype)


@triton.jit
def to_corners(product, weights, CELLS: tl.constexpr):
    """``(BLOCK_Y, BLOCK_X)`` -> ``(4 * CELLS,)``: sums for the upper left, upper right, lower left and lower right."""
    upper, lower, left, right = weights
    top, bottom = tl.sum(product * upper[:, None], 0), tl.sum(product * lower[:, None], 0)
    tops = tl.join(sum_columns(top * left, CELLS), sum_columns(top * right, CELLS))
    bottoms = tl.join(sum_columns(bottom * left, CELLS), sum_columns(bottom * right, CELLS))
    return tl.reshape(tl.permute(tl.join(tops, bottoms), 0, 2, 1), (4 * CELLS,))


@triton.jit
def sum_columns(values, CELLS: tl.constexpr):
    return tl.sum(tl.reshape(values, (CELLS, values.shape[0] // CELLS)), 1)


@triton.jit(do_not_specialize=["num_classes", "height", "width", *TILES])
def sum_cells_kernel(
    scratch_ptr,  # (B, tiles_y, K, tiles_x, 4)
    grad_ptr,  # (B, K, h, w)
    num_classes, height, width, first_y, blocks_y, tiles_y, apart_y, first_x, blocks_x, tiles_x, apart_x,
    BLOCK_K: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_X inputs of one row, for BLOCK_K classes.

    ``apart`` is 0 where an axis keeps its size: then there is no second input, and 0 * NaN would reach a neighbour.
    """
    blocks_k = tl.cdiv(num_classes, BLOCK_K)
    pid = tl.program_id(0)
    offs_x = pid % tl.cdiv(width, BLOCK_X) * BLOCK_X + tl.arange(0, BLOCK_X)
    line = pid // tl.cdiv(width, BLOCK_X)  # (B, h, blocks_k)
    offs_k = (line % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)[:, None]
    row = line // blocks_k % height
    b = (line // blocks_k // height).to(tl.int64)
    mask = (offs_k < num_classes) & (offs_x < width)[None, :]
    stride_k = tiles_x.to(tl.int64) * 4
    stride_y = stride_k * num_classes
    base = scratch_ptr + b * tiles_y * stride_y + offs_k * stride_k
    columns = offs_x, width, first_x, blocks_x, apart_x
    grad = tl.zeros((BLOCK_K, BLOCK_X), scratch_ptr.dtype.element_ty)
    for tile in range(blocks_y):
        ptrs = base + (first_y + row * blocks_y + tile) * stride_y
        grad = add_row(grad, ptrs, columns, mask)
        if apart_y:
            if row > 0:
                grad = add_row(grad, ptrs - blocks_y * stride_y + 2, columns, mask)
            if row == height - 1:
                grad = add_row(grad, ptrs + 2, columns, mask)
    for tile in range(first_y):  # before the first centre
        if row == 0:
            grad = add_row(grad, base + tile * stride_y, columns, mask)
        if (apart_y != 0) & (row == tl.minimum(1, height - 1)):
            grad = add_row(grad, base + tile * stride_y + 2, columns, mask)
    ptrs = grad_ptr + ((b * num_classes + offs_k) * height + row) * width + offs_x[None, :]
    tl.store(ptrs, grad.to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_row(grad, ptrs, columns, mask):
    """Add what tiles of a row leave for its inputs. ``ptrs`` ``(BLOCK_K, 1)``: the first tile, left corners."""
    offs_x, width, first_x, blocks_x, apart_x = columns
    for tile in range(blocks_x):
        here = ptrs + ((first_x + offs_x * blocks_x + tile) * 4)[None, :]
        grad += tl.load(here, mask=mask, other=0.0)
        if apart_x:
            grad += tl.load(here - blocks_x * 4 + 1, mask=mask & (offs_x > 0)[None, :], other=0.0)
            grad += tl.load(here + 1, mask=mask & (offs_x == width - 1)[None, :], other=0.0)
    for tile in range(first_x):
        here = ptrs + (offs_x * 0 + tile * 4)[None, :]
        grad += tl.load(here, mask=mask & (offs_x == 0)[None, :], other=0.0)
        if apart_x:
            grad += tl.load(here + 1, mask=mask & (offs_x == tl.minimum(1, width - 1))[None, :], other=0.0)
    return grad


class Tiles(NamedTuple):
    """Outputs of a program, padded columns of a cell, neighbours of a lane, and warps."""

    block_y: int
    block_x: int
    width: int
    pixels: int
    num_warps: int = 1
    num_stages: int = 1


def launch_config(longest_y: int, longest_x: int, aligned_x: int, pixels: int, lanes: int) -> Tiles:
    """One warp, whose cells need no barriers, with up to 32 outputs to a thread.

    Cells of which all begin at multiples of half their length are cut there, so that lanes read full lines.
    """
    block_y, block_x = min(next_power_of_2(longest_y), 8), pixels * lanes
    width = aligned_x if 2 * aligned_x >= longest_x else next_power_of_2(longest_x)
    return Tiles(block_y, block_x, min(width, block_x), pixels)


class Plan(NamedTuple):
    """The grid of a launch, the arguments that depend on sizes alone, and those of the sum over tiles."""

    grid: tuple[int, ...]
    arguments: dict[str, Any]
    tiles: dict[str, int]


@lru_cache(maxsize=256)
def plan(
    shape: Sequence[int], strides: Sequence[Sequence[int]], ys: Axis, xs: Axis, dtype: torch.dtype, arch: str
) -> Plan:
    """Launch for a gradient of a shape; ``strides`` are the gradient's and the probabilities'."""
    pixels = aligned(*xs.cell_starts, *(step for one in strides for step in one[:3]))
    pixels = min(pixels, 16 // dtype.itemsize, 4) if strides[0][3] == strides[1][3] == 1 else 1
    longest_y, longest_x = (min(axis.longest_cell, axis.kept) for axis in (ys, xs))
    lanes, once = 32 if arch.startswith("sm_") else 64, dtype.itemsize == 2
    tiles = launch_config(longest_y, longest_x, aligned(*xs.cell_starts), pixels, lanes)
    blocks = cdiv(longest_y, tiles.block_y), cdiv(longest_x, tiles.width)
    first_y, tiles_y = tiles_of(ys, blocks[0], tiles.block_y)
    first_x, tiles_x = tiles_of(xs, blocks[1], tiles.width)
    apart = (int(axis.step != axis.denominator) for axis in (ys, xs))
    of_axes = zip((first_y, first_x), blocks, (tiles_y, tiles_x), apart, strict=True)
    sums = dict(zip(TILES, (value for axis in of_axes for value in axis), strict=True))
    arguments: dict[str, Any] = geometry(ys, xs) | launch_arguments(tiles)
    arguments |= {name: value for name, value in sums.items() if name.startswith(("blocks", "tiles"))}
    names = (f"stride_{tensor}{axis}" for tensor in "gp" for axis in "bkyx")
    arguments |= dict(zip(names, (step for one in strides for step in one), strict=True))
    offsets = (ys.kept * one[2] + xs.kept * one[3] for one in strides)
    arguments |= {"num_classes": shape[1], "ONCE": once, "WIDE": wide(ys, xs, 4 * tiles_x, *offsets)}
    if arch.startswith("sm_"):
        arguments["maxnreg"] = 128 if once else 255
    grid = programs(shape[0] * tiles_y * cdiv(tiles_x, tiles.block_x // tiles.width), grad=shape)
    return Plan(grid, arguments, sums)


def upsample_softmax_backward(
    grad: Tensor,
    probabilities: Tensor,
    grid: Sequence[int],
    size: Sequence[int],
    align_corners: bool,
    index: Tensor | None = None,
) -> Tensor:
    """Gradient of the masks, ``(B, K, *grid)``. Lanes read neighbours: a channels-last ``grad`` is copied first."""
    grad = grad.contiguous() if grad.stride(3) > 1 else grad
    batch, num_classes, *crop = probabilities.shape
    grad_masks = probabilities.new_empty((batch, num_classes, *grid))
    if not batch:
        return grad_masks
    if index is not None:
        grid = index.shape[1:]
    ys, xs = (Axis.make(*axis, align_corners) for axis in zip(grid, size, crop, strict=True))
    launch = plan(grad.shape, (grad.stride(), probabilities.stride()), ys, xs, grad.dtype, device_arch(grad))
    shape = batch, launch.tiles["tiles_y"], num_classes, launch.tiles["tiles_x"], 4
    scratch = probabilities.new_empty(shape, dtype=statistics_dtype(probabilities.dtype))
    tensors = {"grad_ptr": grad, "probabilities_ptr": probabilities, "scratch_ptr": scratch}
    softmax_backward_kernel[launch.grid](**tensors, **launch.arguments)
    if index is None:
        return sum_cells(scratch, grad_masks, launch.tiles)
    of_patches = sum_cells(scratch, scratch.new_empty((batch, num_classes, *grid)), launch.tiles)
    return sum_groups(of_patches, index, grad_masks)


def sum_cells(scratch: Tensor, grad: Tensor, tiles: dict[str, int]) -> Tensor:
    """Shares of the cells -> contiguous ``(B, K, h, w)`` ``grad``, which is written and returned."""
    batch, num_classes, height, width = grad.shape
    block_x = min(64, next_power_of_2(width))
    block_k = 256 // block_x
    count = batch * height * cdiv(num_classes, block_k) * cdiv(width, block_x)
    sum_cells_kernel[programs(count, masks=grad.shape)](
        scratch_ptr=scratch,
        grad_ptr=grad,
        num_classes=num_classes,
        height=height,
        width=width,
        **tiles,
        BLOCK_K=block_k,
        BLOCK_X=block_x,
        num_warps=8,
    )
    return grad
