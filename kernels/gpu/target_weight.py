"""Summed class weights of the pixels that count: what cross-entropy's mean divides by, in Triton.

For a target (B, H', W') and class weights v (K,), 1 if not given: the sum of v[target] over all pixels but those of
``ignore_index``; NaN where a target is no class, which makes the loss and all of its gradient NaN. The device is never
asked for the value, so that a CUDA graph can hold the launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..loss_options import LossOptions

TARGET_BLOCK = 512


@triton.jit(do_not_specialize=["num_classes", "rows", "columns", "ignore_index"])
def target_weight_kernel(
    target_ptr,  # (B, H', W')
    weight_ptr,  # (K,) or None
    partial_ptr,  # (B * H',)
    target_strides,
    num_classes,
    rows,
    columns,
    ignore_index,
    BLOCK: tl.constexpr,
):
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
            BLOCK=TARGET_BLOCK,
            num_warps=4,
        )
    return partial.sum(dtype=torch.float64)
