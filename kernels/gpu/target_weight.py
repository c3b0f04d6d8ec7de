"""Summed class weights of the pixels that count: what cross-entropy's mean divides by, in Triton.

For a target (B, H', W') and class weights v (K,), 1 if not given: the sum of v[target] over all pixels but those of
``ignore_index``; NaN where a target is no class, which makes the loss and all of its gradient NaN. The device is never
asked for the value, so that a CUDA graph can hold the launch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cells import strides
from .common import Specialization

TARGET_BLOCK = 512


@triton.jit(do_not_specialize=["num_classes", "rows", "columns", "ignore_index"])
def target_weight_kernel(
    target_ptr,  # (B, H', W')
    weight_ptr,  # (K,) or None
    partial_ptr,  # (B * H',)
    stride_tb,
    stride_th,
    stride_tw,
    num_classes,
    rows,
    columns,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """Summed class weights of one row of the target; NaN where a target is no class."""
    dtype: tl.constexpr = partial_ptr.dtype.element_ty
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


def target_weight(
    target: Tensor, ignore_index: int, weight: Tensor | None, num_classes: int, dtype: torch.dtype
) -> Tensor:
    """Summed class weights of all pixels that count, float64 on the target's device."""
    batch, rows, columns = target.shape
    partial = target.new_empty(batch * rows, dtype=dtype)
    if batch:
        target_weight_kernel[(batch * rows,)](
            target_ptr=target,
            weight_ptr=weight,
            partial_ptr=partial,
            **strides("stride_t", "bhw", target),
            num_classes=num_classes,
            rows=rows,
            columns=columns,
            ignore_index=ignore_index,
            BLOCK=TARGET_BLOCK,
            num_warps=4,
        )
    return partial.sum(dtype=torch.float64)


def specializations(arch: str) -> Iterator[Specialization]:
    """The builds that ``aot`` checks."""
    yield Specialization(
        "target_weight",
        target_weight_kernel,
        {"target_ptr": "*i64", "partial_ptr": "*fp32", "weight_ptr": "*fp32"}
        | dict.fromkeys(("stride_tb", "stride_th", "num_classes", "rows", "columns", "ignore_index"), "i32"),
        {"stride_tw": 1, "BLOCK": TARGET_BLOCK},
        {"num_warps": 4},
    )
