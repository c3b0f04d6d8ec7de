"""Softmax over the classes of bilinearly upsampled masks in Triton; the logits are never written.

With logits l (B, K, H', W'), the resize R of the masks (B, K, h, w) to a size, of which a crop is kept:
    p = softmax_k(l), l = R masks            grad_masks = R^T (p (g - sum_k p g)) for a gradient g of p
One program owns the outputs of one cell, which mix the same four corners (cells.py). A first pass over the classes
sums the exponentials, a second computes them again and writes the probabilities. The backward also takes two passes
over p and g: for sum_k p g, and for the cell's share of the gradients of its corners (corners.py). Outputs past the
end of a cell and classes past the last one repeat the last: they are read or written again, without a mask.

Saved for the backward: p, the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bilinear import Axis
from ..registry import statistics_dtype
from .cells import (
    GEOMETRY,
    MOST_OFFSET,
    Tiles,
    exponentials,
    fit_tile,
    open_cell,
    open_corners,
    open_tile,
    plan,
    reach,
    sum_exponentials,
)
from .corners import gather, store_corners, sum_corners, to_corners


@triton.jit(do_not_specialize=["num_classes", "splits", *GEOMETRY])
def softmax_kernel(
    masks_ptr,  # (B, K, h, w)
    out_ptr,  # (B, K, H', W'), contiguous
    masks_strides,
    num_classes, splits,
    size_in_y, size_out_y, kept_y, step_y, offset_y, denominator_y,
    size_in_x, size_out_x, kept_x, step_x, offset_x, denominator_x,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if masks_ptr.dtype.element_ty == tl.float64 else tl.float32
    integer: tl.constexpr = tl.int64 if WIDE else tl.int32
    ys = Axis(size_in_y, size_out_y, kept_y, step_y, offset_y, denominator_y)
    xs = Axis(size_in_x, size_out_x, kept_x, step_x, offset_x, denominator_x)
    _index, b, rows, cols, split, tiles = open_cell(ys, xs, splits, BLOCK_Y, BLOCK_X, WIDE)
    offs_k, offs_c = tl.arange(0, BLOCK_K).to(integer), tl.arange(0, BLOCK_C).to(integer)
    cell, far = open_corners(masks_ptr, masks_strides, num_classes, b, rows[0], cols[0], ys, xs, offs_c, dtype)
    plane = kept_y.to(integer) * kept_x
    out_ptr += b * num_classes * plane
    for tile in range(split, tiles, splits):
        offs_y, offs_x, _mask, weights = open_tile(tile, rows, cols, ys, xs, dtype, BLOCK_Y, BLOCK_X)
        offs_y, offs_x = tl.minimum(offs_y, rows[2] - 1) * kept_x, tl.minimum(offs_x, cols[2] - 1)
        if far:
            store_probabilities(out_ptr, plane, offs_y, offs_x, offs_k, cell, weights, True, dtype)
        else:
            store_probabilities(out_ptr, plane, offs_y, offs_x, offs_k, cell, weights, False, dtype)


@triton.jit
def store_probabilities(
    out_ptr, stride_k, offs_y, offs_x, offs_k, cell, weights, FAR: tl.constexpr, dtype: tl.constexpr
):
    """Softmax of one tile. ``offs_y`` and ``offs_x`` are offsets of its rows and columns in a plane."""
    shift, total = sum_exponentials(cell, offs_k, weights, FAR, dtype)
    inverse = 1.0 / total
    for start in range(0, cell[2], offs_k.shape[0]):
        k = tl.minimum(start + offs_k, cell[2] - 1)
        p = exponentials(cell, k, shift, weights, FAR, dtype) * inverse[:, None, :]
        ptrs = (out_ptr + k * stride_k)[None, :, None] + offs_x[None, None, :] + offs_y[:, None, None]
        tl.store(ptrs, p.to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["num_classes", "splits", *GEOMETRY])
def softmax_backward_kernel(
    grad_ptr,  # (B, K, H', W')
    probabilities_ptr,  # (B, K, H', W')
    scratch_ptr,  # (splits, B, h, w, 4, K)
    grad_strides, probabilities_strides,
    num_classes, splits,
    size_in_y, size_out_y, kept_y, step_y, offset_y, denominator_y,
    size_in_x, size_out_x, kept_x, step_x, offset_x, denominator_x,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = scratch_ptr.dtype.element_ty
    ys = Axis(size_in_y, size_out_y, kept_y, step_y, offset_y, denominator_y)
    xs = Axis(size_in_x, size_out_x, kept_x, step_x, offset_x, denominator_x)
    cell, b, rows, cols, split, tiles = open_cell(ys, xs, splits, BLOCK_Y, BLOCK_X, WIDE)
    grad_ptr += b * grad_strides[0]
    probabilities_ptr += b * probabilities_strides[0]
    scratch_ptr += (split * (tl.num_programs(0) // splits) + cell) * 4 * num_classes
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64 if WIDE else tl.int32)
    ragged = ((rows[2] - rows[1]) % BLOCK_Y != 0) | ((cols[2] - cols[1]) % BLOCK_X != 0)
    for tile in range(split, tiles, splits):
        offs_y, offs_x, mask, weights = open_tile(tile, rows, cols, ys, xs, dtype, BLOCK_Y, BLOCK_X)
        offs_y, offs_x = tl.minimum(offs_y, rows[2] - 1), tl.minimum(offs_x, cols[2] - 1)
        product = tl.zeros((BLOCK_Y, BLOCK_K, BLOCK_X), dtype)
        for start in range(0, num_classes, BLOCK_K):
            k = tl.minimum(start + offs_k, num_classes - 1)
            p = load_classes(probabilities_ptr, probabilities_strides, k, offs_y, offs_x)
            g = load_classes(grad_ptr, grad_strides, k, offs_y, offs_x)
            if start + BLOCK_K > num_classes:
                g = tl.where((start + offs_k < num_classes)[None, :, None], g, 0.0)
            product += p.to(dtype) * g.to(dtype)
        mean = tl.sum(product, 1)[:, None, :]  # sum_k p g
        GROUP: tl.constexpr = BLOCK_X * BLOCK_K  # classes whose corners lanes keep
        for group in range(0, num_classes, GROUP):
            zero = tl.zeros((BLOCK_K, BLOCK_X), dtype)
            gathered = zero, zero, zero, zero
            for start in range(group, tl.minimum(group + GROUP, num_classes), BLOCK_K):
                k = tl.minimum(start + offs_k, num_classes - 1)
                p = load_classes(probabilities_ptr, probabilities_strides, k, offs_y, offs_x).to(dtype)
                grad = p * (load_classes(grad_ptr, grad_strides, k, offs_y, offs_x).to(dtype) - mean)
                if ragged:
                    grad = tl.where(mask[:, None, :], grad, 0.0)
                top = tl.sum(grad * (1 - weights[0])[:, None, None], 0)
                bottom = tl.sum(grad * weights[0][:, None, None], 0)
                gathered = gather(gathered, to_corners(top, bottom, weights[1]), (start - group) // BLOCK_K)
            store_corners(scratch_ptr, gathered, group, num_classes, ys, xs, tile > split)
        tl.debug_barrier()  # the next tile adds to what other threads stored
    if split >= tiles:
        zero = tl.zeros((BLOCK_K, BLOCK_X), dtype)
        for group in range(0, num_classes, BLOCK_X * BLOCK_K):
            store_corners(scratch_ptr, (zero, zero, zero, zero), group, num_classes, ys, xs, False)


@triton.jit
def load_classes(ptr, strides, k, offs_y, offs_x):
    """``(BLOCK_Y, BLOCK_K, BLOCK_X)`` values of an image; the batch stride is not used.

    The compiler keeps 32-bit offsets of the rows in one register each where it knows them to be below 2^30.
    """
    _, stride_k, stride_y, stride_x = strides
    ptrs = (ptr + k * stride_k)[None, :, None] + (offs_x * stride_x)[None, None, :]
    rows = offs_y * stride_y
    if rows.dtype == tl.int32:
        rows = (rows & (MOST_OFFSET - 1)).to(tl.uint32).to(tl.int64)
    return tl.load(ptrs + rows[:, None, None])


def launch_config(num_classes: int, longest_y: int, longest_x: int, dtype: torch.dtype) -> Tiles:
    """Tiles of both passes. A thread's registers hold fewer rows of float64."""
    tiles = fit_tile(num_classes, longest_y, longest_x)
    return tiles._replace(block_y=min(tiles.block_y, 4)) if dtype == torch.float64 else tiles


def upsample_softmax(masks: Tensor, size: Sequence[int], crop: Sequence[int], align_corners: bool) -> Tensor:
    """``(B, K, h, w)`` -> ``(B, K, H', W')``."""
    batch, num_classes, *grid = masks.shape
    out = masks.new_empty((batch, num_classes, *crop))
    if not batch:
        return out
    ys, xs = (Axis.make(*axis, align_corners) for axis in zip(grid, size, crop, strict=True))
    tiles = launch_config(num_classes, ys.longest_cell, xs.longest_cell, masks.dtype)
    cells = plan(tiles, batch, num_classes, ys, xs, reach(masks, out))
    softmax_kernel[cells.grid](masks_ptr=masks, out_ptr=out, masks_strides=masks.stride(), **cells.arguments)
    return out


def upsample_softmax_backward(
    grad: Tensor, probabilities: Tensor, grid: Sequence[int], size: Sequence[int], align_corners: bool
) -> Tensor:
    """Gradient of the masks, ``(B, K, h, w)``."""
    batch, num_classes, *crop = probabilities.shape
    grad_masks = probabilities.new_empty((batch, num_classes, *grid))
    if not batch:
        return grad_masks
    ys, xs = (Axis.make(*axis, align_corners) for axis in zip(grid, size, crop, strict=True))
    tiles = launch_config(num_classes, ys.longest_cell, xs.longest_cell, grad.dtype)
    cells = plan(tiles, batch, num_classes, ys, xs, reach(grad, probabilities))
    scratch = probabilities.new_empty(
        (cells.splits, batch, *grid, 4, num_classes), dtype=statistics_dtype(probabilities.dtype)
    )
    softmax_backward_kernel[cells.grid](
        grad_ptr=grad,
        probabilities_ptr=probabilities,
        scratch_ptr=scratch,
        grad_strides=grad.stride(),
        probabilities_strides=probabilities.stride(),
        **cells.arguments,
    )
    return sum_corners(scratch, grad_masks)
