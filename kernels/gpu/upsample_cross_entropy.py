"""Cross-entropy of bilinearly upsampled masks in Triton; the forward pass leaves the gradient of the masks.

With logits l (B, K, H', W'), target t, class weights v, smoothing e, V = sum_k v_k and a loss gradient g per pixel:
    loss = (1 - e) v_t (lse - l_t) + e / K (V lse - sum_k v_k l_k)
    grad_k = g (((1 - e) v_t + e V / K) softmax_k - (1 - e) v_t [k = t] - e v_k / K)      both 0 where ignored
The mean divides by the sum of v_t over the pixels that count, which a kernel of its own computes. It stays on the
device, so that a CUDA graph can hold the launches. A target that is no class makes it NaN, and so loss and gradient.
One program owns the outputs of one cell, which mix the same four corners (cells.py). A first pass over the classes sums
the exponentials, a second computes the gradient of the corners. The linear terms, sum_k v_k l_k and its gradient, are
rank one and stay outside the tile.

Saved for the backward: the gradient of the masks, float32 (B, K, h, w), for reductions "mean" and "sum"; it is only
scaled there. "none" has one gradient per pixel: its backward runs the same kernel again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bilinear import Axis
from ..loss_options import LossOptions
from ..registry import statistics_dtype
from .cell_logits import (
    add_corners,
    cell_softmax,
    corner_logits,
    fit_tile,
    log_sum_exp,
    mix,
    probabilities,
    to_corners,
)
from .cells import GEOMETRY, Tiles, geometry, open_cell, open_tile, splits_of
from .common import LOG2_E, launch_arguments
from .corners import sum_corners


@triton.jit(do_not_specialize=["num_classes", "rows", "columns", "ignore_index"])
def target_weight_kernel(
    target_ptr,  # (B, H', W')
    weight_ptr,  # (K,) or None
    partial_ptr,  # (B * H',)
    target_strides,
    num_classes, rows, columns, ignore_index,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Summed class weights of one row of the target; NaN where a target is no class."""
    dtype: tl.constexpr = partial_ptr.dtype.element_ty
    stride_tb, stride_th, stride_tw = target_strides
    pid = tl.program_id(0).to(tl.int64)
    target_ptr += pid // rows * stride_tb + pid % rows * stride_th
    acc = tl.zeros((BLOCK,), dtype)
    for start in range(0, columns, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < columns
        target = tl.load(target_ptr + offs.to(tl.int64) * stride_tw, mask=mask, other=0).to(tl.int64)
        mask &= target != ignore_index
        is_class = (target >= 0) & (target < num_classes)
        weight = tl.full((BLOCK,), 1.0, dtype)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + target, mask=mask & is_class, other=0.0)
        acc += tl.where(mask, tl.where(is_class, weight, float("nan")), 0.0)
    tl.store(partial_ptr + pid, tl.sum(acc, 0))


@triton.jit
def mix_corners(corners, weights):
    """``(BLOCK_Y, BLOCK_X)`` exact mixes of corner values."""
    weight_y, weight_x = weights
    top = mix(corners[0], corners[1], weight_x[None, :], True)
    bottom = mix(corners[2], corners[3], weight_x[None, :], True)
    return mix(top, bottom, weight_y[:, None], True)


@triton.jit(do_not_specialize=["num_classes", "ignore_index", "splits", *GEOMETRY])
def cross_entropy_kernel(
    masks_ptr,  # (B, K, h, w)
    target_ptr,  # (B, H', W')
    weight_ptr,  # (K,) or None
    smoothing_ptr,  # () or None
    grad_loss_ptr,  # (B, H', W') or None: no gradient
    loss_ptr,  # (B, H', W') contiguous, or one sum for each program
    scratch_ptr,  # (splits, B, h, w, 4, K)
    masks_strides, target_strides, grad_loss_strides,
    num_classes, ignore_index, splits,
    size_in_y, size_out_y, kept_y, step_y, offset_y, denominator_y,
    size_in_x, size_out_x, kept_x, step_x, offset_x, denominator_x,
    PER_PIXEL: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = loss_ptr.dtype.element_ty
    ys = Axis(size_in_y, size_out_y, kept_y, step_y, offset_y, denominator_y)
    xs = Axis(size_in_x, size_out_x, kept_x, step_x, offset_x, denominator_x)
    index, b, rows, cols, split, tiles = open_cell(ys, xs, splits, BLOCK_Y, BLOCK_X)
    stride_tb, stride_th, stride_tw = target_strides
    scratch_ptr += (split * (tl.num_programs(0) // splits) + index) * 4 * num_classes
    offs_k = tl.arange(0, BLOCK_K)
    cell, far = cell_softmax(masks_ptr, masks_strides, num_classes, b, rows[0], cols[0], ys, xs, dtype, BLOCK_C)

    hard, soft, total = 1.0, 0.0, 0.0
    linear = (0.0, 0.0, 0.0, 0.0)  # sum_k v_k l_k at the corners
    if smoothing_ptr is not None:
        smoothing = tl.load(smoothing_ptr)
        hard, soft = 1 - smoothing, smoothing / num_classes
        total, linear = linear_terms(cell, weight_ptr, dtype, BLOCK_C)

    loss_sum = tl.zeros((BLOCK_Y, BLOCK_X), dtype)
    for tile in range(split, tiles, splits):
        offs_y, offs_x, mask, weights = open_tile(tile, rows, cols, ys, xs, dtype, BLOCK_Y, BLOCK_X)
        target_ptrs = target_ptr + b * stride_tb + offs_y[:, None] * stride_th + offs_x[None, :] * stride_tw
        target = tl.load(target_ptrs, mask=mask, other=0).to(tl.int64)
        valid = mask & (target != ignore_index)
        is_class = (target >= 0) & (target < num_classes)
        target = tl.where(valid & is_class, target, 0)
        hard_weight = tl.full((BLOCK_Y, BLOCK_X), 1.0, dtype) * hard
        if weight_ptr is not None:
            hard_weight *= tl.load(weight_ptr + target)
        hard_weight = tl.where(is_class | ~valid, hard_weight, float("nan"))

        shift, log_sum = log_sum_exp(cell, far, weights, dtype, BLOCK_Y, BLOCK_X, BLOCK_K)
        target_logit = mix_corners(corner_logits(cell, target, valid, 1.0, dtype), weights)
        log_sum_e = log_sum / LOG2_E
        loss = hard_weight * (log_sum_e - (target_logit - shift))
        if smoothing_ptr is not None:
            loss += soft * (total * (log_sum_e + shift) - mix_corners(linear, weights))
        loss = tl.where(valid, loss, 0.0)
        if PER_PIXEL:
            tl.store(loss_ptr + (b * ys.kept + offs_y[:, None]) * xs.kept + offs_x[None, :], loss, mask=mask)
        else:
            loss_sum += loss

        if grad_loss_ptr is not None:
            stride_gb, stride_gh, stride_gw = grad_loss_strides
            grad_ptrs = grad_loss_ptr + b * stride_gb + offs_y[:, None] * stride_gh + offs_x[None, :] * stride_gw
            grad_loss = tl.where(valid, tl.load(grad_ptrs, mask=mask, other=0.0).to(dtype), 0.0)
            hard_weight = tl.where(valid, hard_weight * grad_loss, 0.0)
            factor = hard_weight
            if smoothing_ptr is not None:
                factor += grad_loss * (soft * total)
                linear_grad = to_corners(grad_loss[:, :, None], weights)
            small_target = target.to(tl.int32)
            for start in range(0, num_classes, BLOCK_K):
                k = start + offs_k
                grad = factor[:, :, None] * probabilities(cell, k, far, shift, log_sum, weights, dtype)
                one_hot = k[None, None, :] == small_target[:, :, None]
                grad -= tl.where(one_hot, hard_weight[:, :, None], 0.0)
                corners = to_corners(grad, weights)
                if smoothing_ptr is not None:
                    class_weight = tl.full((BLOCK_K,), 1.0, dtype) * soft
                    if weight_ptr is not None:
                        class_weight *= tl.load(weight_ptr + k, mask=k < num_classes, other=0.0)
                    corners = (
                        corners[0] - linear_grad[0] * class_weight,
                        corners[1] - linear_grad[1] * class_weight,
                        corners[2] - linear_grad[2] * class_weight,
                        corners[3] - linear_grad[3] * class_weight,
                    )
                add_corners(scratch_ptr, corners, k, num_classes, tile > split)
            tl.debug_barrier()  # the next tile adds to what other threads stored

    if not PER_PIXEL:
        tl.store(loss_ptr + tl.program_id(0), tl.sum(tl.sum(loss_sum, 1), 0))
    if grad_loss_ptr is not None and split >= tiles:
        for start in range(0, num_classes, BLOCK_K):
            add_corners(scratch_ptr, (0.0, 0.0, 0.0, 0.0), start + offs_k, num_classes, False)


@triton.jit
def linear_terms(cell, weight_ptr, dtype: tl.constexpr, BLOCK_C: tl.constexpr):
    """sum_k v_k, and sum_k v_k (c_k - base) at the four corners."""
    num_classes = cell[2]
    total = tl.zeros((BLOCK_C,), dtype)
    s00 = tl.zeros((BLOCK_C,), dtype)
    s01 = tl.zeros((BLOCK_C,), dtype)
    s10 = tl.zeros((BLOCK_C,), dtype)
    s11 = tl.zeros((BLOCK_C,), dtype)
    for start in range(0, num_classes, BLOCK_C):
        k = start + tl.arange(0, BLOCK_C)
        mask = k < num_classes
        weight = tl.where(mask, 1.0, 0.0).to(dtype)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + k, mask=mask, other=0.0)
        c00, c01, c10, c11 = corner_logits(cell, k, mask, 1.0, dtype)
        total += weight
        s00 += weight * c00
        s01 += weight * c01
        s10 += weight * c10
        s11 += weight * c11
    return tl.sum(total, 0), (tl.sum(s00, 0), tl.sum(s01, 0), tl.sum(s10, 0), tl.sum(s11, 0))


def launch_config(num_classes: int, longest_y: int, longest_x: int) -> Tiles:
    """Tiles of at most eight warps: with more, a build with weights and smoothing spills."""
    return fit_tile(num_classes, longest_y, longest_x, most=2048)


def target_weight(target: Tensor, options: LossOptions, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Summed class weights of all pixels that count, float64 on the target's device."""
    batch, rows, columns = target.shape
    partial = target.new_empty(batch * rows, dtype=dtype)
    if batch:
        target_weight_kernel[(batch * rows,)](
            target_ptr=target,
            weight_ptr=options.weight,
            partial_ptr=partial,
            target_strides=target.stride(),
            num_classes=num_classes,
            rows=rows,
            columns=columns,
            ignore_index=options.ignore_index,
            BLOCK=512,
            num_warps=4,
        )
    return partial.sum(dtype=torch.float64)


def upsample_cross_entropy(
    masks: Tensor, target: Tensor, options: LossOptions, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """Loss and, where asked for, the gradient of the masks for a loss gradient of 1; else an empty tensor."""
    dtype = statistics_dtype(masks.dtype)
    total = torch.ones((), dtype=dtype, device=masks.device)
    if options.reduction == "mean":
        total = target_weight(target, options, masks.shape[1], dtype)
    grad_loss = total.reciprocal().to(dtype).expand(target.shape) if with_grad else None
    grad = masks.new_empty(masks.shape if with_grad else (0,), dtype=dtype)
    per_pixel = options.reduction == "none"
    loss = _launch(masks, target, grad_loss, grad, options, per_pixel)
    return (loss if per_pixel else (loss.sum(dtype=torch.float64) / total).to(dtype)), grad


def pixel_backward(grad_loss: Tensor, masks: Tensor, target: Tensor, options: LossOptions) -> Tensor:
    """Gradient of the masks for a loss gradient per pixel (reduction "none")."""
    grad = torch.empty_like(masks, memory_format=torch.contiguous_format)
    _launch(masks, target, grad_loss, grad, options, per_pixel=False)
    return grad


def _launch(
    masks: Tensor, target: Tensor, grad_loss: Tensor | None, grad: Tensor, options: LossOptions, per_pixel: bool
) -> Tensor:
    """Losses, per pixel or in partial sums; ``grad``, where there is a ``grad_loss``, is written."""
    (batch, num_classes, *grid), dtype = masks.shape, statistics_dtype(masks.dtype)
    sizes = zip(grid, options.size, target.shape[1:], strict=True)
    ys, xs = (Axis.make(*axis, options.align_corners) for axis in sizes)
    tiles = launch_config(num_classes, ys.longest_cell, xs.longest_cell)
    splits = splits_of(ys, xs, batch, tiles.block_y, tiles.block_x)
    cells = batch * ys.size_in * xs.size_in
    loss = masks.new_empty(target.shape if per_pixel else (cells * splits,), dtype=dtype)
    if cells == 0:
        return loss
    scratch = masks.new_empty((0,) if grad_loss is None else (splits, batch, *grid, 4, num_classes), dtype=dtype)
    cross_entropy_kernel[(cells * splits,)](
        masks_ptr=masks,
        target_ptr=target,
        weight_ptr=options.weight,
        smoothing_ptr=masks.new_full((), options.label_smoothing, dtype=dtype) if options.label_smoothing else None,
        grad_loss_ptr=grad_loss,
        loss_ptr=loss,
        scratch_ptr=scratch,
        masks_strides=masks.stride(),
        target_strides=target.stride(),
        grad_loss_strides=None if grad_loss is None else grad_loss.stride(),
        num_classes=num_classes,
        ignore_index=options.ignore_index,
        splits=splits,
        **geometry(ys, xs),
        PER_PIXEL=per_pixel,
        **launch_arguments(tiles),
    )
    if grad_loss is not None:
        sum_corners(scratch, grad)
    return loss
