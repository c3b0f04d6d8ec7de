"""Loss of a tile of a cell and its gradient, for ``upsample_cross_entropy``, whose formulas these are."""

from __future__ import annotations

import triton
import triton.language as tl

from .cells import exponentials, load_corners, mix, sum_exponentials
from .common import LOG2_E
from .corners import add_parts, gather, to_corners

IGNORED, NO_CLASS = tl.constexpr(-1), tl.constexpr(-2)  # targets that are no class


@triton.jit
def load_tile(ptr, strides, b, offs_y, offs_x, mask):
    """Values ``(BLOCK_Y, BLOCK_X)`` of image ``b``; 0 outside the mask."""
    ptrs = ptr + b * strides[0] + offs_y[:, None] * strides[1] + offs_x[None, :] * strides[2]
    return tl.load(ptrs, mask=mask, other=0)


@triton.jit
def read_target(target, mask, weight_ptr, num_classes, ignore_index, dtype: tl.constexpr):
    """Target, where it is no class IGNORED or NO_CLASS, and its class weight, there 0 or NaN."""
    mask &= target != ignore_index
    target = tl.where((target >= 0) & (target < num_classes), target, NO_CLASS)
    target = tl.where(mask, target, IGNORED).to(tl.int32)
    weight = tl.where(target == NO_CLASS, float("nan"), mask.to(dtype))
    if weight_ptr is not None:
        weight *= tl.load(weight_ptr + target, mask=target >= 0, other=1.0)
    return target, weight


@triton.jit
def tile_loss(
    cell, linear, pixels, weights, apart, offs_k, parts_ptr, weight_ptr,
    FAR: tl.constexpr, SMOOTHING: tl.constexpr, PER_PIXEL: tl.constexpr,
):  # fmt: skip
    """Losses of a tile, 0 where ignored, or sums of its columns; its gradient is added to the parts."""
    num_classes, base = cell[2], cell[3]
    target, weight, grad_loss = pixels
    weight_y, weight_x = weights
    counts = target != IGNORED
    dtype: tl.constexpr = weight.dtype
    shift, total = sum_exponentials(cell, offs_k, weights, FAR, dtype)
    hard, soft = weight * (1 - SMOOTHING), SMOOTHING / num_classes.to(dtype)
    log_sum = tl.log2(total) / LOG2_E
    c00, c01, c10, c11 = load_corners(cell, tl.maximum(target, 0).to(offs_k.dtype), dtype)
    target_logit = mix_tile((c00 - base, c01 - base, c10 - base, c11 - base), weights)
    loss = hard * (log_sum - (target_logit - shift))
    factor = hard
    if SMOOTHING > 0:
        loss += soft * (linear[4] * (log_sum + shift) - mix_tile(linear, weights))
        factor = hard + soft * linear[4]
    loss = tl.where(counts, loss, 0.0)
    if not PER_PIXEL:
        loss = tl.sum(loss, 0)

    if parts_ptr is not None:
        BLOCK_X: tl.constexpr = weight_x.shape[0]
        BLOCK_K: tl.constexpr = offs_k.shape[0]
        apart_y, weight_x = apart[0].to(dtype), weight_x * apart[1].to(dtype)
        scale = grad_loss * factor / total  # 0 where ignored, but NaN, as in PyTorch, where a logit is NaN
        scale_y = scale * weight_y[:, None]
        if SMOOTHING > 0:
            total *= tl.where(factor == 0, 0.0, hard / factor)
            linear_y = tl.sum(grad_loss * weight_y[:, None], 0) * apart_y
            linear_grad = to_corners((tl.sum(grad_loss, 0) - linear_y)[None, :], linear_y[None, :], weight_x)
        first = tl.min(tl.min(tl.where(target >= 0, target, num_classes), 1), 0)
        last = tl.max(tl.max(target, 1), 0)
        relative = target[:, None, :] - offs_k[None, :, None]
        for group in range(0, num_classes, BLOCK_X * BLOCK_K):
            zero = tl.zeros((BLOCK_K, BLOCK_X), dtype)
            gathered = zero, zero, zero, zero
            for start in range(group, tl.minimum(group + BLOCK_X * BLOCK_K, num_classes), BLOCK_K):
                e = exponentials(cell, start + offs_k, shift, weights, FAR, dtype)
                if (start <= last) & (start + BLOCK_K > first):
                    e = tl.where(relative == start, e - total[:, None, :], e)
                if FAR:  # scale_y would take registers that the shift has
                    e *= scale[:, None, :]
                    bottom = tl.sum(e * weight_y[:, None, None], 0) * apart_y
                    top = tl.sum(e, 0) - bottom
                else:
                    bottom = tl.sum(e * scale_y[:, None, :], 0) * apart_y
                    top = tl.sum(e * scale[:, None, :], 0) - bottom
                gathered = gather(gathered, to_corners(top, bottom, weight_x), (start - group) // BLOCK_K)
            k = group + tl.arange(0, BLOCK_X)[None, :] * BLOCK_K + offs_k[:, None]
            if SMOOTHING > 0:
                class_weight = soft
                if weight_ptr is not None:
                    class_weight = soft * tl.load(weight_ptr + k, mask=k < num_classes, other=0.0)
                gathered = subtract(gathered, linear_grad, class_weight)
            add_parts(parts_ptr, gathered, k, num_classes, apart)
    return loss


@triton.jit
def subtract(gathered, linear, class_weight):
    """Corners ``(BLOCK_K, BLOCK_X)`` minus the product of a gradient ``(1,)`` for each corner and the class weights."""
    return (
        gathered[0] - class_weight * linear[0][:, None],
        gathered[1] - class_weight * linear[1][:, None],
        gathered[2] - class_weight * linear[2][:, None],
        gathered[3] - class_weight * linear[3][:, None],
    )


@triton.jit
def mix_tile(corners, weights):
    """``(BLOCK_Y, BLOCK_X)`` mixes of corner values."""
    weight_y, weight_x = weights
    top, bottom = mix(corners[0], corners[1], weight_x[None, :]), mix(corners[2], corners[3], weight_x[None, :])
    return mix(top, bottom, weight_y[:, None])


@triton.jit
def linear_terms(cell, weight_ptr, offs_c, dtype: tl.constexpr):
    """sum_k v_k (c_k - base) at the four corners, and sum_k v_k."""
    num_classes, base = cell[2], cell[3]
    BLOCK_C: tl.constexpr = offs_c.shape[0]
    zero = tl.zeros((BLOCK_C,), dtype)
    s00, s01, s10, s11, total = zero, zero, zero, zero, zero
    for start in range(0, num_classes, BLOCK_C):
        k = start + offs_c
        mask = k < num_classes
        weight = mask.to(dtype)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + k, mask=mask, other=0.0)
        c00, c01, c10, c11 = load_corners(cell, k, dtype)
        s00 += tl.where(mask, weight * (c00 - base), 0.0)
        s01 += tl.where(mask, weight * (c01 - base), 0.0)
        s10 += tl.where(mask, weight * (c10 - base), 0.0)
        s11 += tl.where(mask, weight * (c11 - base), 0.0)
        total += weight
    return tl.sum(s00, 0), tl.sum(s01, 0), tl.sum(s10, 0), tl.sum(s11, 0), tl.sum(total, 0)
