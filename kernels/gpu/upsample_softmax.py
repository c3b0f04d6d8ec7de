"""Softmax over the classes of bilinearly upsampled masks in Triton; the logits are never written.

With logits l (B, K, H', W'), the resize R of the masks (B, K, h, w) to a size, of which a crop is kept:
    p = softmax_k(l), l = R masks            grad_masks = R^T (p (g - sum_k p g)) for a gradient g of p
One program owns the outputs of one cell, which mix the same four corners (cells.py). A first pass over the classes
sums the exponentials, a second computes them again and writes the probabilities. The backward also takes two passes
over p and g: for sum_k p g, and for the cell's share of the gradients of its corners.

Saved for the backward: p, the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..bilinear import Axis
from ..registry import statistics_dtype
from .cells import (
    GEOMETRY,
    Tiles,
    add_corners,
    cell_softmax,
    fit_tile,
    geometry,
    log_sum_exp,
    open_cell,
    open_tile,
    probabilities,
    splits_of,
    sum_corners,
    to_corners,
)
from .common import launch_arguments


@triton.jit(do_not_specialize=["num_classes", "splits", *GEOMETRY])
def softmax_kernel(
    masks_ptr,  # (B, K, h, w)
    out_ptr,  # (B, K, H', W'), contiguous
    masks_strides,
    num_classes, splits,
    size_in_y, size_out_y, kept_y, step_y, offset_y, denominator_y,
    size_in_x, size_out_x, kept_x, step_x, offset_x, denominator_x,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if masks_ptr.dtype.element_ty == tl.float64 else tl.float32
    ys = Axis(size_in_y, size_out_y, kept_y, step_y, offset_y, denominator_y)
    xs = Axis(size_in_x, size_out_x, kept_x, step_x, offset_x, denominator_x)
    _, b, rows, cols, split, tiles = open_cell(ys, xs, splits, BLOCK_Y, BLOCK_X)
    cell, far = cell_softmax(masks_ptr, masks_strides, num_classes, b, rows[0], cols[0], ys, xs, dtype, BLOCK_C)
    for tile in range(split, tiles, splits):
        offs_y, offs_x, mask, weights = open_tile(tile, rows, cols, ys, xs, dtype, BLOCK_Y, BLOCK_X)
        shift, log_sum = log_sum_exp(cell, far, weights, dtype, BLOCK_Y, BLOCK_X, BLOCK_K)
        for start in range(0, num_classes, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            p = probabilities(cell, k, far, shift, log_sum, weights, dtype).permute(2, 0, 1)
            offs_r = (b * num_classes + k[:, None]) * ys.kept + offs_y[None, :]
            ptrs = out_ptr + offs_r[:, :, None] * xs.kept + offs_x[None, None, :]
            mask_k = (k < num_classes)[:, None, None]
            tl.store(ptrs, p.to(out_ptr.dtype.element_ty), mask=mask_k & mask[None, :, :])


@triton.jit(do_not_specialize=["num_classes", "splits", *GEOMETRY])
def softmax_backward_kernel(
    grad_ptr,  # (B, K, H', W')
    probabilities_ptr,  # (B, K, H', W')
    scratch_ptr,  # (splits, B, h, w, 4, K)
    grad_strides, probabilities_strides,
    num_classes, splits,
    size_in_y, size_out_y, kept_y, step_y, offset_y, denominator_y,
    size_in_x, size_out_x, kept_x, step_x, offset_x, denominator_x,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = scratch_ptr.dtype.element_ty
    ys = Axis(size_in_y, size_out_y, kept_y, step_y, offset_y, denominator_y)
    xs = Axis(size_in_x, size_out_x, kept_x, step_x, offset_x, denominator_x)
    cell, b, rows, cols, split, tiles = open_cell(ys, xs, splits, BLOCK_Y, BLOCK_X)
    stride_gb, stride_gk, stride_gh, stride_gw = grad_strides
    stride_pb, stride_pk, stride_ph, stride_pw = probabilities_strides
    scratch_ptr += (split * (tl.num_programs(0) // splits) + cell) * 4 * num_classes
    offs_k = tl.arange(0, BLOCK_K)
    for tile in range(split, tiles, splits):
        offs_y, offs_x, mask, weights = open_tile(tile, rows, cols, ys, xs, dtype, BLOCK_Y, BLOCK_X)
        g_ptrs = grad_ptr + b * stride_gb + offs_y[:, None] * stride_gh + offs_x[None, :] * stride_gw
        p_ptrs = probabilities_ptr + b * stride_pb + offs_y[:, None] * stride_ph + offs_x[None, :] * stride_pw
        product = tl.zeros((BLOCK_K, BLOCK_Y, BLOCK_X), dtype)
        for start in range(0, num_classes, BLOCK_K):
            k = start + offs_k
            product += load_classes(p_ptrs, stride_pk, k, num_classes, mask, dtype) * load_classes(
                g_ptrs, stride_gk, k, num_classes, mask, dtype
            )
        mean = tl.sum(product, 0)  # sum_k p g
        for start in range(0, num_classes, BLOCK_K):
            k = start + offs_k
            p = load_classes(p_ptrs, stride_pk, k, num_classes, mask, dtype)
            grad = p * (load_classes(g_ptrs, stride_gk, k, num_classes, mask, dtype) - mean[None, :, :])
            add_corners(scratch_ptr, to_corners(grad.permute(1, 2, 0), weights), k, num_classes, tile > split)
        tl.debug_barrier()  # the next tile adds to what other threads stored
    if split >= tiles:
        for start in range(0, num_classes, BLOCK_K):
            add_corners(scratch_ptr, (0.0, 0.0, 0.0, 0.0), start + offs_k, num_classes, False)


@triton.jit
def load_classes(ptrs, stride_k, k, num_classes, mask, dtype: tl.constexpr):
    """``(BLOCK_Y, BLOCK_X)`` pointers -> ``(BLOCK_K, BLOCK_Y, BLOCK_X)`` values of the classes ``k``; 0 outside."""
    ptrs = ptrs[None, :, :] + (k.to(tl.int64) * stride_k)[:, None, None]
    return tl.load(ptrs, mask=(k < num_classes)[:, None, None] & mask[None, :, :], other=0.0).to(dtype)


def launch_config(num_classes: int, longest_y: int, longest_x: int) -> Tiles:
    """Tiles of at most sixteen warps."""
    return fit_tile(num_classes, longest_y, longest_x, most=4096)


def upsample_softmax(masks: Tensor, size: Sequence[int], crop: Sequence[int], align_corners: bool) -> Tensor:
    """``(B, K, h, w)`` -> ``(B, K, H', W')``."""
    batch, num_classes, *grid = masks.shape
    out = masks.new_empty((batch, num_classes, *crop))
    if not batch:
        return out
    ys, xs = (Axis.make(*axis, align_corners) for axis in zip(grid, size, crop, strict=True))
    tiles = launch_config(num_classes, ys.longest_cell, xs.longest_cell)
    splits = splits_of(ys, xs, batch, tiles.block_y, tiles.block_x)
    softmax_kernel[(batch * ys.size_in * xs.size_in * splits,)](
        masks_ptr=masks,
        out_ptr=out,
        masks_strides=masks.stride(),
        num_classes=num_classes,
        splits=splits,
        **geometry(ys, xs),
        **launch_arguments(tiles),
    )
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
    tiles = launch_config(num_classes, ys.longest_cell, xs.longest_cell)
    splits = splits_of(ys, xs, batch, tiles.block_y, tiles.block_x)
    dtype = statistics_dtype(probabilities.dtype)
    scratch = probabilities.new_empty((splits, batch, *grid, 4, num_classes), dtype=dtype)
    softmax_backward_kernel[(batch * ys.size_in * xs.size_in * splits,)](
        grad_ptr=grad,
        probabilities_ptr=probabilities,
        scratch_ptr=scratch,
        grad_strides=grad.stride(),
        probabilities_strides=probabilities.stride(),
        num_classes=num_classes,
        splits=splits,
        **geometry(ys, xs),
        **launch_arguments(tiles),
    )
    return sum_corners(scratch, grad_masks)
