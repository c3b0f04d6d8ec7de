"""Gradients of the corners of cells in Triton: gathered in registers, kept in scratch memory, summed for each input.

A backward kernel stores each cell's share of its corners' gradients in a float scratch ``(splits, B, h, w, 4, K)``;
``sum_corners`` adds the shares of an input, always in the same order and without atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import next_power_of_2


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def to_corners(top, bottom, weight_x):
    """Gradients ``(BLOCK_K, BLOCK_X)`` of the upper and the lower edge -> ``(BLOCK_K,)`` for each corner."""
    left, right = (1 - weight_x)[None, :], weight_x[None, :]
    return tl.reduce((top * left, top * right, bottom * left, bottom * right), 1, _add4)


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
def store_corners(scratch_ptr, gathered, first, num_classes, ys, xs, again):
    """Store the corners of classes from ``first`` on in a cell's ``(4, K)``; ``again``: add to what is there.

    An axis without a change of size has no second input. Its weight is 0, but 0 * NaN would reach a neighbour.
    """
    BLOCK_K: tl.constexpr = gathered[0].shape[0]
    k = first + tl.arange(0, gathered[0].shape[1])[None, :] * BLOCK_K + tl.arange(0, BLOCK_K)[:, None]
    mask = k < num_classes
    for corner in tl.static_range(4):
        ptrs = scratch_ptr + num_classes.to(tl.int64) * corner + k
        before = tl.load(ptrs, mask=mask & again, other=0.0)
        absent = ((corner >= 2) & (ys.step == ys.denominator)) | ((corner % 2 == 1) & (xs.step == xs.denominator))
        tl.store(ptrs, before + tl.where(absent, 0.0, gathered[corner]), mask=mask)


@triton.jit(do_not_specialize=["batch", "num_classes", "height", "width", "splits"])
def sum_corners_kernel(
    scratch_ptr,  # (splits, B, h, w, 4, K)
    grad_ptr,  # (B, K, h, w)
    batch, num_classes, height, width, splits,
    BLOCK_K: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_X inputs of one row, for BLOCK_K classes."""
    blocks_x = tl.cdiv(width, BLOCK_X)
    blocks_k = tl.cdiv(num_classes, BLOCK_K)
    pid = tl.program_id(0)
    offs_x = pid // blocks_k % blocks_x * BLOCK_X + tl.arange(0, BLOCK_X)
    offs_k = pid % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    row = (pid // blocks_k // blocks_x % height).to(tl.int64)
    b = (pid // blocks_k // blocks_x // height).to(tl.int64)
    mask_k = offs_k < num_classes
    mask_x = offs_x < width
    image = num_classes.to(tl.int64) * 4 * width * height
    acc = tl.zeros((BLOCK_X, BLOCK_K), scratch_ptr.dtype.element_ty)
    for split in range(splits):
        base = scratch_ptr + (split * batch.to(tl.int64) + b) * image
        for lower in tl.static_range(2):  # 1: the row is the lower edge of its cell
            for right in tl.static_range(2):
                # The last row is both edges of the last cell, the last column likewise.
                for last_row in tl.static_range(lower + 1):
                    for last_col in tl.static_range(right + 1):
                        cell_y = row - lower + last_row
                        cell_x = offs_x - right + last_col
                        inside_y = (cell_y >= 0) & ((last_row == 0) | (row == height - 1))
                        inside_x = (cell_x >= 0) & ((last_col == 0) | (offs_x == width - 1)) & mask_x
                        cell = (cell_y * width + cell_x) * 4 + 2 * lower + right
                        ptrs = base + cell[:, None] * num_classes + offs_k[None, :]
                        acc += tl.load(ptrs, mask=(inside_x & inside_y)[:, None] & mask_k[None, :], other=0.0)
    ptrs = grad_ptr + ((b * num_classes + offs_k[None, :]) * height + row) * width + offs_x[:, None]
    tl.store(ptrs, acc.to(grad_ptr.dtype.element_ty), mask=mask_x[:, None] & mask_k[None, :])


def sum_corners(scratch: Tensor, grad: Tensor) -> Tensor:
    """``(splits, B, h, w, 4, K)`` -> contiguous ``(B, K, h, w)`` ``grad``, which is written and returned."""
    batch, num_classes, height, width = grad.shape
    block_k, block_x = 32, min(32, next_power_of_2(width))
    grid = batch * height * -(-width // block_x) * -(-num_classes // block_k)
    sum_corners_kernel[(grid,)](
        scratch_ptr=scratch,
        grad_ptr=grad,
        batch=batch,
        num_classes=num_classes,
        height=height,
        width=width,
        splits=scratch.shape[0],
        BLOCK_K=block_k,
        BLOCK_X=block_x,
        num_warps=4,
    )
    return grad
