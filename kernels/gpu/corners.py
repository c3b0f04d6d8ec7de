"""Gradients of the corners of cells in Triton: gathered in registers, added to parts, summed for each input."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bilinear import shape_on_grid
from ..loss_options import SEGMENT
from .common import cdiv, next_power_of_2, programs
from .merge_tokens import sum_groups


@triton.jit
def to_corners(top, bottom, weight_x):
    """Gradients ``(BLOCK_K, BLOCK_X)`` of the upper and the lower edge -> ``(BLOCK_K,)`` for each corner."""
    left, right = (1 - weight_x)[None, :], weight_x[None, :]
    return tl.sum(top * left, 1), tl.sum(top * right, 1), tl.sum(bottom * left, 1), tl.sum(bottom * right, 1)


@triton.jit
def gather(gathered, corners, column):
    """``(BLOCK_K, BLOCK_X)`` for each corner, with the ``(BLOCK_K,)`` values of ``corners`` in one column.

    Each lane keeps the values of one step, so that BLOCK_X steps are stored at once.
    """
    mine = (tl.arange(0, gathered[0].shape[1]) == column)[None, :]
    return (
        tl.where(mine, corners[0][:, None], gathered[0]),
        tl.where(mine, corners[1][:, None], gathered[1]),
        tl.where(mine, corners[2][:, None], gathered[2]),
        tl.where(mine, corners[3][:, None], gathered[3]),
    )


@triton.jit
def add_parts(parts_ptr, gathered, k, num_classes, apart):
    """Add the corners of classes ``k``, upper left, upper right, lower left and lower right, to parts.

    ``apart``: whether the rows, and the columns, are two inputs. Elsewhere the lower, or the right, corners are no
    part: their weight is 0, but 0 * NaN would reach a neighbour.
    """
    mask = k < num_classes
    for corner in tl.static_range(4):
        ptrs = parts_ptr + (corner % 2 * 2 + corner // 2) * num_classes + k
        there = mask & (apart[0] | (corner < 2)) & (apart[1] | (corner % 2 == 0))
        tl.store(ptrs, tl.load(ptrs, mask=there, other=0.0) + gathered[corner], mask=there)


@triton.jit(do_not_specialize=["elements", "num_classes", "height", "width"])
def sum_parts_kernel(
    parts_ptr,  # (B, h, columns, 2, K), and the scale
    grad_loss_ptr,  # (), or None: neither it nor the scale counts
    grad_ptr,  # (B, K, h, w)
    grad_strides, elements, num_classes, height, width,
    SEGMENT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_X inputs of one row, for BLOCK_K classes."""
    blocks_x, blocks_k = tl.cdiv(width, BLOCK_X), tl.cdiv(num_classes, BLOCK_K)
    pid = tl.program_id(0).to(tl.int64)
    line = pid // blocks_k // blocks_x  # (B, h)
    offs_x = pid // blocks_k % blocks_x * BLOCK_X + tl.arange(0, BLOCK_X)
    offs_k = pid % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_x, mask_k = (offs_x < width)[:, None], (offs_k < num_classes)[None, :]
    stride_x = 2 * num_classes.to(tl.int64)
    stride_y = (width + tl.cdiv(width, SEGMENT) - 1) * stride_x
    ptrs = parts_ptr + line * stride_y + ((offs_x + offs_x // SEGMENT) * stride_x)[:, None] + offs_k[None, :]
    first = ((offs_x % SEGMENT == 0) & (offs_x > 0))[:, None]  # of its segment: also the last column of the one before
    grad = tl.zeros((BLOCK_X, BLOCK_K), parts_ptr.dtype.element_ty)
    for lower in tl.static_range(2):
        mask = mask_x & mask_k & (line % height >= lower)
        grad += tl.load(ptrs - lower * (stride_y - num_classes), mask=mask, other=0.0)
        grad += tl.load(ptrs - lower * (stride_y - num_classes) - stride_x, mask=mask & first, other=0.0)
    if grad_loss_ptr is not None:
        grad *= tl.load(grad_loss_ptr) * tl.load(parts_ptr + elements)
    ptrs = grad_ptr + line // height * grad_strides[0] + line % height * grad_strides[2]
    ptrs += (offs_x * grad_strides[3])[:, None] + (offs_k * grad_strides[1])[None, :]
    tl.store(ptrs, grad.to(grad_ptr.dtype.element_ty), mask=mask_x & mask_k)


def sum_parts(parts: Tensor, grad_loss: Tensor | None, masks: Tensor, index: Tensor | None = None) -> Tensor:
    """Gradient of the masks: sum of the parts for each input, with a ``grad_loss`` times it and the scale."""
    batch, num_classes, height, width = shape_on_grid(masks, index)
    grad = (
        torch.empty_like(masks)
        if index is None
        else parts.new_empty(batch, height, width, num_classes).permute(0, 3, 1, 2)
    )
    block_k, block_x = 32, min(32, next_power_of_2(width))
    if batch:
        count = batch * height * cdiv(width, block_x) * cdiv(num_classes, block_k)
        sum_parts_kernel[programs(count, masks=grad.shape)](
            parts_ptr=parts,
            grad_loss_ptr=grad_loss,
            grad_ptr=grad,
            grad_strides=grad.stride(),
            elements=parts.numel() - 1,
            num_classes=num_classes,
            height=height,
            width=width,
            SEGMENT=SEGMENT,
            BLOCK_K=block_k,
            BLOCK_X=block_x,
            num_warps=4,
        )
    return grad if index is None else sum_groups(grad, index, masks.new_empty(masks.shape))
