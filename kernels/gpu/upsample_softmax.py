"""Softmax over the classes of bilinearly upsampled masks in Triton; the logits never reach memory.

With logits l (B, K, H', W'), the resize R of the masks (B, K, h, w) to a size, of which a crop is kept:
    p = softmax_k(l), l = R masks            grad_masks = R^T (p (g - sum_k p g)) for a gradient g of p
One program owns the outputs of one cell, which mix the same four corners (corners.py): a first walk over the classes
sums the exponentials, a second computes them again and writes the probabilities. The backward walks p and g twice
likewise, for sum_k p g and for the share of the cell in the gradients of its corners.

Saved for the backward: p, the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..bilinear import Axis
from ..registry import statistics_dtype
from .cells import (
    GEOMETRY,
    SAFE_SPREAD,
    Launch,
    add_corners,
    bounds,
    cell_outputs,
    fit_tile,
    geometry,
    log_sum_exp,
    probabilities,
    splits_of,
    strides,
    sum_corners,
    to_corners,
    upper_weights,
)
from .common import Specialization


@triton.jit(do_not_specialize=[*GEOMETRY, "num_classes", "splits"])
def softmax_kernel(
    masks_ptr,  # (B, K, h, w)
    out_ptr,  # (B, K, H', W'), contiguous
    stride_mb,
    stride_mk,
    stride_mh,
    stride_mw,
    num_classes,
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
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dtype: tl.constexpr = tl.float64 if masks_ptr.dtype.element_ty == tl.float64 else tl.float32
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

    offs_k = tl.arange(0, BLOCK_K)
    highest, lowest = bounds(corner_ptrs, tl.arange(0, BLOCK_C), stride_mk, num_classes, dtype, BLOCK_C)
    far = (highest - lowest > SAFE_SPREAD) | (num_classes == 1)  # of one class, exactly 1
    base = tl.where(far, 0.0, highest)
    for tile in range(split, tiles, splits):
        offs_y = first_y + tile // tiles_x * BLOCK_Y + tl.arange(0, BLOCK_Y)
        offs_x = first_x + tile % tiles_x * BLOCK_X + tl.arange(0, BLOCK_X)
        mask = (offs_y < end_y)[:, None] & (offs_x < end_x)[None, :]
        weight_y = upper_weights(offs_y, end_y, cell_y, step_y, offset_y, denominator_y, dtype)
        weight_x = upper_weights(offs_x, end_x, cell_x, step_x, offset_x, denominator_x, dtype)
        shift, log_sum = log_sum_exp(
            corner_ptrs, stride_mk, num_classes, base, far, weight_y, weight_x, dtype, BLOCK_Y, BLOCK_X, BLOCK_K
        )
        for start in range(0, num_classes, BLOCK_K):
            k = start + offs_k
            p = probabilities(
                corner_ptrs, k, stride_mk, num_classes, base, far, shift, log_sum, weight_y, weight_x, dtype
            )
            offs_r = (b * num_classes + k[:, None]) * kept_y + offs_y[None, :]
            ptrs = out_ptr + offs_r[:, :, None] * kept_x + offs_x[None, None, :]
            tl.store(
                ptrs,
                p.permute(2, 0, 1).to(out_ptr.dtype.element_ty),
                mask=(k < num_classes)[:, None, None] & mask[None, :, :],
            )


@triton.jit(do_not_specialize=[*GEOMETRY, "num_classes", "splits"])
def softmax_backward_kernel(
    grad_ptr,  # (B, K, H', W')
    probabilities_ptr,  # (B, K, H', W')
    scratch_ptr,  # (splits, B, h, w, 4, K)
    stride_gb,
    stride_gk,
    stride_gh,
    stride_gw,
    stride_pb,
    stride_pk,
    stride_ph,
    stride_pw,
    num_classes,
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
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,  # unused: the launch is that of the forward kernel
):
    dtype: tl.constexpr = scratch_ptr.dtype.element_ty
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
    scratch_ptr += (split * (tl.num_programs(0) // splits) + cell) * 4 * num_classes

    offs_k = tl.arange(0, BLOCK_K)
    for tile in range(split, tiles, splits):
        offs_y = first_y + tile // tiles_x * BLOCK_Y + tl.arange(0, BLOCK_Y)
        offs_x = first_x + tile % tiles_x * BLOCK_X + tl.arange(0, BLOCK_X)
        mask = (offs_y < end_y)[:, None] & (offs_x < end_x)[None, :]
        weight_y = upper_weights(offs_y, end_y, cell_y, step_y, offset_y, denominator_y, dtype)
        weight_x = upper_weights(offs_x, end_x, cell_x, step_x, offset_x, denominator_x, dtype)
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
            corners = to_corners(grad.permute(1, 2, 0), weight_y, weight_x)
            add_corners(scratch_ptr, corners, k, num_classes, tile > split)
        tl.debug_barrier()  # the next tile adds to what other threads stored
    if split >= tiles:
        for start in range(0, num_classes, BLOCK_K):
            add_corners(scratch_ptr, (0.0, 0.0, 0.0, 0.0), start + offs_k, num_classes, False)


@triton.jit
def load_classes(ptrs, stride_k, k, num_classes, mask, dtype: tl.constexpr):
    """``(BLOCK_Y, BLOCK_X)`` pointers -> ``(BLOCK_K, BLOCK_Y, BLOCK_X)`` values of the classes ``k``; 0 outside."""
    ptrs = ptrs[None, :, :] + (k.to(tl.int64) * stride_k)[:, None, None]
    return tl.load(ptrs, mask=(k < num_classes)[:, None, None] & mask[None, :, :], other=0.0).to(dtype)


def launch_config(num_classes: int, longest_y: int, longest_x: int) -> Launch:
    """Sixteen warps at most."""
    return fit_tile(num_classes, longest_y, longest_x, most=4096)


def upsample_softmax(masks: Tensor, size: Sequence[int], crop: Sequence[int], align_corners: bool) -> Tensor:
    """``(B, K, h, w)`` -> ``(B, K, H', W')``."""
    batch, num_classes, *grid = masks.shape
    out = masks.new_empty((batch, num_classes, *crop))
    if not batch:
        return out
    ys, xs = (Axis.make(*axis, align_corners) for axis in zip(grid, size, crop, strict=True))
    config = launch_config(num_classes, ys.longest_cell, xs.longest_cell)
    splits = splits_of(ys, xs, batch, config.block_y, config.block_x)
    softmax_kernel[(batch * ys.size_in * xs.size_in * splits,)](
        masks_ptr=masks,
        out_ptr=out,
        **strides("stride_m", "bkhw", masks),
        num_classes=num_classes,
        splits=splits,
        **geometry(ys, xs),
        **config.blocks(),
        **config.options(),
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
    config = launch_config(num_classes, ys.longest_cell, xs.longest_cell)
    splits = splits_of(ys, xs, batch, config.block_y, config.block_x)
    dtype = statistics_dtype(probabilities.dtype)
    scratch = probabilities.new_empty((splits, batch, *grid, 4, num_classes), dtype=dtype)
    softmax_backward_kernel[(batch * ys.size_in * xs.size_in * splits,)](
        grad_ptr=grad,
        probabilities_ptr=probabilities,
        scratch_ptr=scratch,
        **strides("stride_g", "bkhw", grad),
        **strides("stride_p", "bkhw", probabilities),
        num_classes=num_classes,
        splits=splits,
        **geometry(ys, xs),
        **config.blocks(),
        **config.options(),
    )
    return sum_corners(scratch, grad_masks)


def specializations(arch: str) -> Iterator[Specialization]:
    """The builds that ``aot`` checks: channels-last masks, contiguous probabilities and gradients."""
    shared = dict.fromkeys(("num_classes", "splits", *GEOMETRY), "i32")
    for dtype, num_classes, patch in (
        *(("bf16", num_classes, patch) for num_classes in (19, 150, 1000) for patch in (4, 16)),
        ("fp32", 150, 16),
    ):
        config = launch_config(num_classes, patch, patch)
        label = f"K={num_classes} P={patch} {dtype}"
        yield Specialization(
            f"softmax {label}",
            softmax_kernel,
            shared
            | {"masks_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}
            | dict.fromkeys(("stride_mb", "stride_mh", "stride_mw"), "i32"),
            {"stride_mk": 1} | config.blocks(),
            config.options(),
            frozenset({"stride_mw"} if num_classes % 16 else ()),
        )
        yield Specialization(
            f"softmax_backward {label}",
            softmax_backward_kernel,
            shared
            | {"grad_ptr": f"*{dtype}", "probabilities_ptr": f"*{dtype}", "scratch_ptr": "*fp32"}
            | dict.fromkeys(("stride_gb", "stride_gk", "stride_gh", "stride_pb", "stride_pk", "stride_ph"), "i32"),
            {"stride_gw": 1, "stride_pw": 1} | config.blocks(),
            config.options(),
        )
