"""Cells of a bilinear resize in Triton: geometry, corner values, and the sum of the gradients that cells leave.

Cell (cy, cx) of ``h x w`` holds the outputs that mix inputs (cy, cx), (cy, cx + 1), (cy + 1, cx), (cy + 1, cx + 1),
its corners, clamped at the far border. Outputs before the first centre belong to cell 0, where their upper weight is
clamped to 0, as in PyTorch. A backward kernel stores each cell's share of its corners' gradients in a float scratch
``(splits, B, h, w, 4, K)``; ``sum_corners`` adds the shares of an input, always in the same order and without atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..bilinear import Axis
from .common import LOG2_E

SAFE_SPREAD = tl.constexpr(32.0)  # exp(-32) is far from underflow
PADDING = tl.constexpr(-3e38)  # of classes that do not exist; finite, because 0 * inf is NaN

GEOMETRY = [f"{field}_{axis}" for axis in "yx" for field in Axis._fields]


def geometry(ys: Axis, xs: Axis) -> dict[str, int]:
    """Launch arguments named in ``GEOMETRY``: scalars, because Triton compiles again for new values in a tuple."""
    return dict(zip(GEOMETRY, (*ys, *xs), strict=True))


class Tiles(NamedTuple):
    """Outputs and classes of a tile, classes of a step along the corners alone, warps and stages of a program."""

    block_y: int
    block_x: int
    block_k: int
    block_c: int
    num_warps: int
    num_stages: int


def fit_tile(num_classes: int, longest_y: int, longest_x: int, most: int) -> Tiles:
    """Tiles of at most ``most`` logits, 8 to a thread (one warp takes 512), and the widest block that pads little."""
    block_y, block_x = (min(triton.next_power_of_2(longest), 16) for longest in (longest_y, longest_x))
    pixels, padded = block_y * block_x, max(triton.next_power_of_2(num_classes), 8)
    least, widest = min(512 // pixels, padded), min(most // pixels, 256)
    choices = [block for block in (8, 16, 32, 64, 128, 256) if least <= block <= widest]
    taken = {block: -(-num_classes // block) * block for block in choices}
    block_k = max(block for block in choices if 10 * taken[block] <= 11 * min(taken.values()))
    num_warps = pixels * block_k // 256 if pixels * block_k > 512 else 1
    return Tiles(block_y, block_x, block_k, min(padded, 256), num_warps, num_stages=1)


def splits_of(ys: Axis, xs: Axis, batch: int, block_y: int, block_x: int) -> int:
    """Number of programs for a cell: one, unless the cells are too few to fill a device."""
    cell_tiles = -(-ys.longest_cell // block_y) * -(-xs.longest_cell // block_x)
    return min(cell_tiles, -(-512 // max(batch * ys.size_in * xs.size_in, 1)))


@triton.jit
def cell_start(cell, axis):
    """First kept output of ``cell``, as in ``Axis.cell_starts``; int64, so that the products cannot overflow."""
    step = tl.maximum(axis.step, 1)
    return tl.minimum((tl.maximum(cell * axis.denominator - axis.offset, 0) + step - 1) // step, axis.kept)


@triton.jit
def upper_weights(outputs, end, cell, axis, dtype: tl.constexpr):
    """Weight of input ``cell + 1`` at ``outputs`` of ``cell``; past its ``end``, that of its last one."""
    numerator = tl.minimum(outputs, end - 1) * axis.step + axis.offset - cell * axis.denominator
    return tl.maximum(numerator, 0).to(dtype) / axis.denominator


@triton.jit
def open_cell(ys, xs, splits, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """The program's cell: index among all cells, image, rows, columns; the program's split of the cell's tiles.

    Rows and columns are each the cell's index along the axis, its first output and one past its last.
    """
    pid = tl.program_id(0).to(tl.int64)
    split = pid % splits
    cell = pid // splits  # (B, h, w)
    cell_x = cell % xs.size_in
    cell_y = cell // xs.size_in % ys.size_in
    b = cell // xs.size_in // ys.size_in
    rows = cell_y, tl.where(cell_y == 0, 0, cell_start(cell_y, ys)), cell_start(cell_y + 1, ys)
    cols = cell_x, tl.where(cell_x == 0, 0, cell_start(cell_x, xs)), cell_start(cell_x + 1, xs)
    tiles = tl.cdiv(rows[2] - rows[1], BLOCK_Y) * tl.cdiv(cols[2] - cols[1], BLOCK_X)
    return cell, b, rows, cols, split, tiles


@triton.jit
def open_tile(tile, rows, cols, ys, xs, dtype: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """Outputs of a tile, which of them exist ``(BLOCK_Y, BLOCK_X)``, and their upper weights along y and x."""
    cell_y, first_y, end_y = rows
    cell_x, first_x, end_x = cols
    tiles_x = tl.cdiv(end_x - first_x, BLOCK_X)
    offs_y = first_y + tile // tiles_x * BLOCK_Y + tl.arange(0, BLOCK_Y)
    offs_x = first_x + tile % tiles_x * BLOCK_X + tl.arange(0, BLOCK_X)
    mask = (offs_y < end_y)[:, None] & (offs_x < end_x)[None, :]
    weights = upper_weights(offs_y, end_y, cell_y, ys, dtype), upper_weights(offs_x, end_x, cell_x, xs, dtype)
    return offs_y, offs_x, mask, weights


@triton.jit
def cell_softmax(
    masks_ptr, masks_strides, num_classes, b, cell_y, cell_x, ys, xs, dtype: tl.constexpr, BLOCK_C: tl.constexpr
):
    """A cell as ``logits`` takes it, and ``far``: each pixel is shifted by its own maximum, the base is 0.

    Otherwise the base is the largest corner, which no logit exceeds. The largest of the classes' smallest corners
    bounds every pixel's maximum from below; where it lies far below the largest corner, exponentials could underflow.
    """
    stride_mb, stride_mk, stride_mh, stride_mw = masks_strides
    top_ptr = masks_ptr + b * stride_mb + cell_y * stride_mh
    bottom_ptr = masks_ptr + b * stride_mb + tl.minimum(cell_y + 1, ys.size_in - 1) * stride_mh
    left, right = cell_x * stride_mw, tl.minimum(cell_x + 1, xs.size_in - 1) * stride_mw
    ptrs = top_ptr + left, top_ptr + right, bottom_ptr + left, bottom_ptr + right
    offs_c = tl.arange(0, BLOCK_C)
    highest = tl.full((BLOCK_C,), -float("inf"), dtype)
    lowest = tl.full((BLOCK_C,), -float("inf"), dtype)
    for start in range(0, num_classes, BLOCK_C):
        k = start + offs_c
        mask = k < num_classes
        offsets = k.to(tl.int64) * stride_mk
        c00 = tl.load(ptrs[0] + offsets, mask=mask, other=-float("inf")).to(dtype)
        c01 = tl.load(ptrs[1] + offsets, mask=mask, other=-float("inf")).to(dtype)
        c10 = tl.load(ptrs[2] + offsets, mask=mask, other=-float("inf")).to(dtype)
        c11 = tl.load(ptrs[3] + offsets, mask=mask, other=-float("inf")).to(dtype)
        highest = tl.maximum(highest, tl.maximum(tl.maximum(c00, c01), tl.maximum(c10, c11)))
        lowest = tl.maximum(lowest, tl.minimum(tl.minimum(c00, c01), tl.minimum(c10, c11)))
    largest = tl.max(highest, 0)
    far = (largest - tl.max(lowest, 0) > SAFE_SPREAD) | (num_classes == 1)  # of one class, exactly 1
    return (ptrs, stride_mk, num_classes, tl.where(far, 0.0, largest)), far


@triton.jit
def corner_logits(cell, k, mask, scale: tl.constexpr, dtype: tl.constexpr):
    """The four corners of classes ``k`` minus the base, times ``scale``; PADDING where ``mask`` is false."""
    ptrs, stride_k, _, base = cell
    offsets = k.to(tl.int64) * stride_k
    c00 = (tl.load(ptrs[0] + offsets, mask=mask, other=0.0).to(dtype) - base) * scale
    c01 = (tl.load(ptrs[1] + offsets, mask=mask, other=0.0).to(dtype) - base) * scale
    c10 = (tl.load(ptrs[2] + offsets, mask=mask, other=0.0).to(dtype) - base) * scale
    c11 = (tl.load(ptrs[3] + offsets, mask=mask, other=0.0).to(dtype) - base) * scale
    return (
        tl.where(mask, c00, PADDING),
        tl.where(mask, c01, PADDING),
        tl.where(mask, c10, PADDING),
        tl.where(mask, c11, PADDING),
    )


@triton.jit
def mix(lower, upper, weight, EXACT: tl.constexpr):
    """``(1 - weight) * lower + weight * upper``, EXACT: with PyTorch's roundings; else as one multiply-add.

    A multiply-add takes the difference of both; where ``lower`` is -inf it takes ``upper``, which keeps -inf and, at
    weight 0, PyTorch's 0 * inf = NaN.
    """
    if EXACT:
        return (1 - weight) * lower + weight * upper
    else:
        return lower + weight * tl.where(lower == -float("inf"), upper, upper - lower)


@triton.jit
def logits(cell, k, weights, FAR: tl.constexpr, dtype: tl.constexpr):
    """``(BLOCK_Y, BLOCK_X, BLOCK_K)`` logits minus the base; unless FAR, in units of log 2.

    ``cell`` holds the corners' pointers, the stride of the classes, their number and the base; ``weights`` are the
    tile's upper weights along y and x.
    """
    scale: tl.constexpr = 1.0 if FAR else LOG2_E
    weight_y, weight_x = weights
    c00, c01, c10, c11 = corner_logits(cell, k, k < cell[2], scale, dtype)
    # Along x first: a thread holds a column of pixels, which share that pair of values.
    top = mix(c00[None, :], c01[None, :], weight_x[:, None], FAR)
    bottom = mix(c10[None, :], c11[None, :], weight_x[:, None], FAR)
    return mix(top[None, :, :], bottom[None, :, :], weight_y[:, None, None], FAR)


@triton.jit
def log_sum_exp(
    cell, far, weights, dtype: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr
):
    """``(BLOCK_Y, BLOCK_X)`` shift and log2 sum_k exp(logit - base - shift); the shift is 0 unless ``far``."""
    num_classes = cell[2]
    offs_k = tl.arange(0, BLOCK_K)
    exp_sum = tl.zeros((BLOCK_Y, BLOCK_X, BLOCK_K), dtype)
    if far:
        largest = tl.full((BLOCK_Y, BLOCK_X, BLOCK_K), -float("inf"), dtype)
        for start in range(0, num_classes, BLOCK_K):
            largest = tl.maximum(largest, logits(cell, start + offs_k, weights, True, dtype))
        shift = tl.max(largest, 2)
        for start in range(0, num_classes, BLOCK_K):
            logit = logits(cell, start + offs_k, weights, True, dtype)
            exp_sum += tl.exp2((logit - shift[:, :, None]) * LOG2_E)
    else:
        shift = tl.zeros((BLOCK_Y, BLOCK_X), dtype)
        for start in range(0, num_classes, BLOCK_K):
            exp_sum += tl.exp2(logits(cell, start + offs_k, weights, False, dtype))
    return shift, tl.log2(tl.sum(exp_sum, 2))


@triton.jit
def probabilities(cell, k, far, shift, log_sum, weights, dtype: tl.constexpr):
    """``(BLOCK_Y, BLOCK_X, BLOCK_K)`` softmax; far logits take more operations and fewer roundings."""
    if far:
        logit = logits(cell, k, weights, True, dtype)
        p = tl.exp2((logit - shift[:, :, None]) * LOG2_E - log_sum[:, :, None])
    else:
        p = tl.exp2(logits(cell, k, weights, False, dtype) - log_sum[:, :, None])
    return p


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def to_corners(grad, weights):
    """Transpose of the resize: ``(BLOCK_Y, BLOCK_X, BLOCK_K)`` -> ``(BLOCK_K,)`` for each corner."""
    weight_y, weight_x = weights
    bottom = tl.sum(grad * weight_y[:, None, None], 0)  # (BLOCK_X, BLOCK_K)
    top = tl.sum(grad, 0) - bottom
    right = weight_x[:, None]
    # One reduction of four values: it synchronises the warps once.
    return tl.reduce((top * (1 - right), top * right, bottom * (1 - right), bottom * right), 0, _add4)


@triton.jit
def add_corners(scratch_ptr, corners, k, num_classes, again):
    """Store ``(BLOCK_K,)`` for each corner in a cell's ``(4, K)`` scratch; ``again``: add to what is there."""
    mask = k < num_classes
    for corner in tl.static_range(4):
        ptrs = scratch_ptr + num_classes.to(tl.int64) * corner + k
        before = tl.load(ptrs, mask=mask & again, other=0.0)
        tl.store(ptrs, before + corners[corner], mask=mask)


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
    pid = tl.program_id(0).to(tl.int64)
    row = pid // (blocks_x * blocks_k) % height
    b = pid // (blocks_x * blocks_k) // height
    offs_x = pid // blocks_k % blocks_x * BLOCK_X + tl.arange(0, BLOCK_X)
    offs_k = pid % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
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
    block_k, block_x = 32, min(32, triton.next_power_of_2(width))
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
