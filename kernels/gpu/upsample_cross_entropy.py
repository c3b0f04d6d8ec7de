"""Cross-entropy of bilinearly upsampled masks in Triton; the forward pass leaves the gradient of the masks.

With logits l (B, K, H', W'), target t, class weights v, smoothing e, V = sum_k v_k and a loss gradient g per pixel:
    loss = (1 - e) v_t (lse - l_t) + e / K (V lse - sum_k v_k l_k)
    grad_k = g (((1 - e) v_t + e V / K) softmax_k - (1 - e) v_t [k = t] - e v_k / K)      both 0 where ignored
One program owns the outputs of one cell, which mix the same four corners (corners.py). The largest corner is a shift
that no logit of the cell exceeds. Where it lies far above the cell's maxima, they are computed instead: else far
pixels would underflow. A first walk over the classes sums the exponentials, a second turns them into the gradient of
the corners. The linear terms, sum_k v_k l_k and its gradient, are rank one and stay outside the tile.

Saved for the backward: the gradient of the masks, float32 (B, K, h, w), for reductions "mean" and "sum"; it is only
scaled there. "none" has one gradient per pixel: its backward runs the same kernel again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bilinear import Axis
from ..loss_options import LossOptions
from ..registry import statistics_dtype
from . import cells as corner_kernels
from . import target_weight as target_kernels
from .cells import (
    GEOMETRY,
    SAFE_SPREAD,
    Launch,
    add_corners,
    bounds,
    cell_outputs,
    corner_logits,
    fit_tile,
    geometry,
    log_sum_exp,
    mix,
    probabilities,
    splits_of,
    strides,
    sum_corners,
    to_corners,
    upper_weights,
)
from .common import LOG2_E, Specialization


@triton.jit(do_not_specialize=[*GEOMETRY, "num_classes", "ignore_index", "splits"])
def cross_entropy_kernel(
    masks_ptr,  # (B, K, h, w)
    target_ptr,  # (B, H', W')
    weight_ptr,  # (K,) or None
    smoothing_ptr,  # () or None
    grad_loss_ptr,  # (B, H', W') or None: no gradient
    loss_ptr,  # (B, H', W') contiguous, or one sum for each program
    scratch_ptr,  # (splits, B, h, w, 4, K)
    stride_mb,
    stride_mk,
    stride_mh,
    stride_mw,
    stride_tb,
    stride_th,
    stride_tw,
    stride_gb,
    stride_gh,
    stride_gw,
    num_classes,
    ignore_index,
    splits,
    height,
    width,
    step_y,
    offset_y,
    denominator_y,
    kept_y,
    step_x,
    offset_x,
    denominator_x,
    kept_x,
    PER_PIXEL: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dtype: tl.constexpr = loss_ptr.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    split = pid % splits
    cell = pid // splits  # (B, h, w)
    cell_x = cell % width
    cell_y = cell // width % height
    b = cell // width // height
    first_y, end_y = cell_outputs(cell_y, step_y, offset_y, denominator_y, kept_y)
    first_x, end_x = cell_outputs(cell_x, step_x, offset_x, denominator_x, kept_x)
    tiles_x = tl.cdiv(end_x - first_x, BLOCK_X)
    tiles = tl.cdiv(end_y - first_y, BLOCK_Y) * tiles_x

    top_ptr = masks_ptr + b * stride_mb + cell_y * stride_mh
    bottom_ptr = masks_ptr + b * stride_mb + tl.minimum(cell_y + 1, height - 1) * stride_mh
    left, right = cell_x * stride_mw, tl.minimum(cell_x + 1, width - 1) * stride_mw
    corner_ptrs = (top_ptr + left, top_ptr + right, bottom_ptr + left, bottom_ptr + right)
    scratch_ptr += (split * (tl.num_programs(0) // splits) + cell) * 4 * num_classes

    offs_k = tl.arange(0, BLOCK_K)
    highest, lowest = bounds(corner_ptrs, tl.arange(0, BLOCK_C), stride_mk, num_classes, dtype, BLOCK_C)
    far = (highest - lowest > SAFE_SPREAD) | (num_classes == 1)  # of one class, exactly 1
    base = tl.where(far, 0.0, highest)

    hard, soft, total = 1.0, 0.0, 0.0
    linear = (0.0, 0.0, 0.0, 0.0)  # sum_k v_k l_k at the corners
    if smoothing_ptr is not None:
        smoothing = tl.load(smoothing_ptr)
        hard, soft = 1 - smoothing, smoothing / num_classes
        total, linear = linear_terms(
            corner_ptrs, weight_ptr, tl.arange(0, BLOCK_C), stride_mk, num_classes, base, dtype, BLOCK_C
        )

    loss_sum = tl.zeros((BLOCK_Y, BLOCK_X), dtype)
    for tile in range(split, tiles, splits):
        offs_y = first_y + tile // tiles_x * BLOCK_Y + tl.arange(0, BLOCK_Y)
        offs_x = first_x + tile % tiles_x * BLOCK_X + tl.arange(0, BLOCK_X)
        mask = (offs_y < end_y)[:, None] & (offs_x < end_x)[None, :]
        weight_y = upper_weights(offs_y, end_y, cell_y, step_y, offset_y, denominator_y, dtype)
        weight_x = upper_weights(offs_x, end_x, cell_x, step_x, offset_x, denominator_x, dtype)

        target_ptrs = target_ptr + b * stride_tb + offs_y[:, None] * stride_th + offs_x[None, :] * stride_tw
        target = tl.load(target_ptrs, mask=mask, other=0).to(tl.int64)
        valid = mask & (target != ignore_index)
        is_class = (target >= 0) & (target < num_classes)
        target = tl.where(valid & is_class, target, 0)
        hard_weight = tl.full((BLOCK_Y, BLOCK_X), 1.0, dtype) * hard
        if weight_ptr is not None:
            hard_weight *= tl.load(weight_ptr + target)
        hard_weight = tl.where(is_class | ~valid, hard_weight, float("nan"))

        shift, log_sum = log_sum_exp(
            corner_ptrs, stride_mk, num_classes, base, far, weight_y, weight_x, dtype, BLOCK_Y, BLOCK_X, BLOCK_K
        )
        c00, c01, c10, c11 = corner_logits(corner_ptrs, target * stride_mk, valid, base, 1.0, dtype)
        top, bottom = mix(c00, c01, weight_x[None, :], True), mix(c10, c11, weight_x[None, :], True)
        log_sum_e = log_sum / LOG2_E
        loss = hard_weight * (log_sum_e - (mix(top, bottom, weight_y[:, None], True) - shift))
        if smoothing_ptr is not None:
            top = mix(linear[0], linear[1], weight_x[None, :], True)
            bottom = mix(linear[2], linear[3], weight_x[None, :], True)
            loss += soft * (total * (log_sum_e + shift) - mix(top, bottom, weight_y[:, None], True))
        loss = tl.where(valid, loss, 0.0)
        if PER_PIXEL:
            tl.store(loss_ptr + (b * kept_y + offs_y[:, None]) * kept_x + offs_x[None, :], loss, mask=mask)
        else:
            loss_sum += loss

        if grad_loss_ptr is not None:
            grad_ptrs = grad_loss_ptr + b * stride_gb + offs_y[:, None] * stride_gh + offs_x[None, :] * stride_gw
            grad_loss = tl.where(valid, tl.load(grad_ptrs, mask=mask, other=0.0).to(dtype), 0.0)
            hard_weight = tl.where(valid, hard_weight * grad_loss, 0.0)
            factor = hard_weight
            if smoothing_ptr is not None:
                factor += grad_loss * (soft * total)
                linear_grad = to_corners(grad_loss[:, :, None], weight_y, weight_x)
            small_target = target.to(tl.int32)
            for start in range(0, num_classes, BLOCK_K):
                k = start + offs_k
                grad = factor[:, :, None] * probabilities(
                    corner_ptrs, k, stride_mk, num_classes, base, far, shift, log_sum, weight_y, weight_x, dtype
                )
                one_hot = k[None, None, :] == small_target[:, :, None]
                grad -= tl.where(one_hot, hard_weight[:, :, None], 0.0)
                corners = to_corners(grad, weight_y, weight_x)
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
        tl.store(loss_ptr + pid, tl.sum(tl.sum(loss_sum, 1), 0))
    if grad_loss_ptr is not None and split >= tiles:
        for start in range(0, num_classes, BLOCK_K):
            add_corners(scratch_ptr, (0.0, 0.0, 0.0, 0.0), start + offs_k, num_classes, False)


@triton.jit
def linear_terms(
    corner_ptrs, weight_ptr, offs_c, stride_k, num_classes, base, dtype: tl.constexpr, BLOCK_C: tl.constexpr
):
    """sum_k v_k, and sum_k v_k (c_k - base) at the four corners."""
    total = tl.zeros((BLOCK_C,), dtype)
    s00 = tl.zeros((BLOCK_C,), dtype)
    s01 = tl.zeros((BLOCK_C,), dtype)
    s10 = tl.zeros((BLOCK_C,), dtype)
    s11 = tl.zeros((BLOCK_C,), dtype)
    for start in range(0, num_classes, BLOCK_C):
        k = start + offs_c
        mask = k < num_classes
        weight = tl.where(mask, 1.0, 0.0).to(dtype)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + k, mask=mask, other=0.0)
        c00, c01, c10, c11 = corner_logits(corner_ptrs, k.to(tl.int64) * stride_k, mask, base, 1.0, dtype)
        total += weight
        s00 += weight * c00
        s01 += weight * c01
        s10 += weight * c10
        s11 += weight * c11
    return tl.sum(total, 0), (tl.sum(s00, 0), tl.sum(s01, 0), tl.sum(s10, 0), tl.sum(s11, 0))


def launch_config(num_classes: int, longest_y: int, longest_x: int) -> Launch:
    """Eight warps at most: with more, a build with weights and smoothing spills."""
    return fit_tile(num_classes, longest_y, longest_x, most=2048)


def upsample_cross_entropy(
    masks: Tensor, target: Tensor, options: LossOptions, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """Loss and, where asked for, the gradient of the masks for a loss gradient of 1; else an empty tensor."""
    dtype = statistics_dtype(masks.dtype)
    ones = torch.ones((), dtype=dtype, device=masks.device)
    total = (
        target_kernels.target_weight(target, options.ignore_index, options.weight, masks.shape[1], dtype)
        if options.reduction == "mean"
        else ones
    )
    grad_loss = total.reciprocal().to(dtype).expand(target.shape) if with_grad else None
    grad = masks.new_empty(masks.shape if with_grad else (0,), dtype=dtype)
    per_pixel = options.reduction == "none"
    loss = _launch(masks, target, grad_loss, grad, options, per_pixel=per_pixel)
    if per_pixel:
        return loss, grad
    return (loss.sum(dtype=torch.float64) / total).to(dtype), grad


def pixel_backward(grad_loss: Tensor, masks: Tensor, target: Tensor, options: LossOptions) -> Tensor:
    """Gradient of the masks for a loss gradient per pixel (reduction "none")."""
    grad = torch.empty_like(masks, memory_format=torch.contiguous_format)
    _launch(masks, target, grad_loss, grad, options, per_pixel=False)
    return grad


def _launch(
    masks: Tensor,
    target: Tensor,
    grad_loss: Tensor | None,
    grad: Tensor,
    options: LossOptions,
    *,
    per_pixel: bool,
) -> Tensor:
    """The losses, per pixel or in partial sums; ``grad``, where there is a ``grad_loss``, is written."""
    (batch, num_classes, *grid), dtype = masks.shape, statistics_dtype(masks.dtype)
    ys, xs = (
        Axis.make(*axis, options.align_corners) for axis in zip(grid, options.size, target.shape[1:], strict=True)
    )
    config = launch_config(num_classes, ys.longest_cell, xs.longest_cell)
    splits = splits_of(ys, xs, batch, config.block_y, config.block_x)
    cells = batch * ys.size_in * xs.size_in
    loss = masks.new_empty(target.shape if per_pixel else (cells * splits,), dtype=dtype)
    if cells == 0:
        return loss
    with_grad = grad_loss is not None
    scratch_shape = (splits, batch, *grid, 4, num_classes) if with_grad else (0,)
    scratch = masks.new_empty(scratch_shape, dtype=dtype)
    cross_entropy_kernel[(cells * splits,)](
        masks_ptr=masks,
        target_ptr=target,
        weight_ptr=options.weight,
        smoothing_ptr=masks.new_full((), options.label_smoothing, dtype=dtype) if options.label_smoothing else None,
        grad_loss_ptr=grad_loss,
        loss_ptr=loss,
        scratch_ptr=scratch,
        **strides("stride_m", "bkhw", masks),
        **strides("stride_t", "bhw", target),
        **strides("stride_g", "bhw", target if grad_loss is None else grad_loss),
        num_classes=num_classes,
        ignore_index=options.ignore_index,
        splits=splits,
        **geometry(ys, xs),
        PER_PIXEL=per_pixel,
        **config.blocks(),
        **config.options(),
    )
    if with_grad:
        sum_corners(scratch, grad)
    return loss


def specializations(arch: str) -> Iterator[Specialization]:
    """The builds that ``aot`` checks: loss alone and with gradient, weights and smoothing, channels-last masks."""
    stride_m = ("stride_mb", "stride_mh", "stride_mw")
    stride_t = ("stride_tb", "stride_th")
    yield from target_kernels.specializations(arch)
    yield from corner_kernels.specializations(arch)
    optional = ("weight_ptr", "smoothing_ptr", "grad_loss_ptr")
    for dtype, num_classes, patch, present in (
        *(("bf16", num_classes, patch, "g") for num_classes in (19, 150, 1000) for patch in (4, 8, 16)),
        ("fp32", 150, 16, "g"),
        ("fp32", 150, 16, "wsg"),
        ("bf16", 150, 16, ""),
    ):
        pointers = [name for name in optional if name[0] in present]
        config = launch_config(num_classes, patch, patch)
        signature = {"masks_ptr": f"*{dtype}", "target_ptr": "*i64", "loss_ptr": "*fp32", "scratch_ptr": "*fp32"}
        signature |= dict.fromkeys(pointers, "*fp32")
        strides = (*stride_m, *stride_t, "stride_gb", "stride_gh", "stride_gw")
        signature |= dict.fromkeys((*strides, "num_classes", "ignore_index", "splits", *GEOMETRY), "i32")
        yield Specialization(
            f"cross_entropy K={num_classes} P={patch} {dtype} {present}".strip(),
            cross_entropy_kernel,
            signature,
            {name: None for name in optional if name not in pointers}
            | {"stride_mk": 1, "stride_tw": 1, "PER_PIXEL": False}
            | config.blocks(),
            config.options(),
            frozenset({"stride_mw"} if num_classes % 16 else ()),
        )
