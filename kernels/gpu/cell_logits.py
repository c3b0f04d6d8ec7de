"""Logits of a cell as ``(BLOCK_Y, BLOCK_X, BLOCK_K)`` tensors: what the kernels of cross-entropy still build on."""

from __future__ import annotations

import triton
import triton.language as tl

from .cells import PADDING, SAFE_SPREAD, Tiles
from .common import LOG2_E, next_power_of_2


def fit_tile(num_classes: int, longest_y: int, longest_x: int, most: int) -> Tiles:
    """Tiles of at most ``most`` logits, 8 to a thread (one warp takes 512), and the widest block that pads little."""
    block_y, block_x = (min(next_power_of_2(longest), 16) for longest in (longest_y, longest_x))
    pixels, padded = block_y * block_x, max(next_power_of_2(num_classes), 8)
    least, widest = min(512 // pixels, padded), min(most // pixels, 256)
    choices = [block for block in (8, 16, 32, 64, 128, 256) if least <= block <= widest]
    taken = {block: -(-num_classes // block) * block for block in choices}
    block_k = max(block for block in choices if 10 * taken[block] <= 11 * min(taken.values()))
    num_warps = pixels * block_k // 256 if pixels * block_k > 512 else 1
    return Tiles(block_y, block_x, block_k, min(padded, 256), num_warps, num_stages=1)


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
