"""Class scores of patches in Triton: cosine similarity and LayerNorm over the classes in one pass.

For each image, with p (N, D), c (K, D) and the norms |p|, |c| of their rows:
    s = p c^T / (|p| |c|)                  x = (s - mean_K s) / sqrt(var_K s + eps)          out = x * weight + bias
The norms are summed along with the matrix product, so the division comes after it, in float32.
Backward, from the output's gradient g, with h = g * weight:
    ds = (h - mean_K h - x mean_K (h x)) / sqrt(var + eps)
    dp = ds (c / |c|) / |p| - p (sum_K ds s) / |p|^2        dc = ds^T (p / |p|) / |c| - c (sum_N ds s) / |c|^2
The kernel computes s again and stores u = ds / (|p| |c|); dp and dc are then one matrix product each, u c and u^T p,
minus a multiple of p and c. u has the dtype of the patches. Of float16 it would leave the range (1e6 at norms of 1e-3):
it is stored in float32 and divided by a power of two for each image. Sums over N are stored per tile and added up
afterwards, so that the same input gives the same bits. Only the inputs are saved.

The compiler must not fuse the last product of s into s - mean_K s: the mean is that of rounded scores, and the
difference would grow by 1 / sqrt(eps).

The projections before are not fused. That would save 4 N D bytes an image (3 MB at N 1024, D 768: 1 us at 3 TB/s), but
the norm needs whole projected rows on the chip, D x 64 float32 values a tile: 196 KB at D 768, most of a register file.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    TRITON_3_6,
    cdiv,
    device_arch,
    dot_precision,
    launch_arguments,
    next_power_of_2,
    programs,
    refuse_float64,
)


@triton.jit
def _cosines(inputs, offs_n, offs_k, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """Tile of s ``(BLOCK_N, BLOCK_K)`` and the inverse norms of its patches and classes; zero norms give NaN.

    ``inputs`` are pointers and strides of an image's patches and classes, then N, K and D.
    """
    patches_ptr, patches_strides, classes_ptr, classes_strides, num_patches, num_classes, dim = inputs
    _, stride_pn, stride_pd = patches_strides
    _, stride_ck, stride_cd = classes_strides
    dots = tl.zeros((offs_n.shape[0], offs_k.shape[0]), tl.float32)
    patch_norms = tl.zeros(offs_n.shape, tl.float32)
    class_norms = tl.zeros(offs_k.shape, tl.float32)
    patches_ptr += offs_n.to(tl.int64)[:, None] * stride_pn
    classes_ptr += offs_k.to(tl.int64)[:, None] * stride_ck
    for start in range(0, dim, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = (offs_d < dim)[None, :]
        p_ptrs = patches_ptr + offs_d.to(tl.int64)[None, :] * stride_pd
        c_ptrs = classes_ptr + offs_d.to(tl.int64)[None, :] * stride_cd
        p = tl.load(p_ptrs, mask=(offs_n < num_patches)[:, None] & mask_d, other=0.0)
        c = tl.load(c_ptrs, mask=(offs_k < num_classes)[:, None] & mask_d, other=0.0)
        dots = tl.dot(p, c.T, dots, input_precision=PRECISION)
        p, c = p.to(tl.float32), c.to(tl.float32)
        patch_norms += tl.sum(p * p, 1)
        class_norms += tl.sum(c * c, 1)
    inverse_p, inverse_c = 1 / tl.sqrt(patch_norms), 1 / tl.sqrt(class_norms)
    return dots * inverse_p[:, None] * inverse_c[None, :], inverse_p, inverse_c


@triton.jit
def _merge(count, mean, square, scores, valid, num_valid):
    """Update the running mean and sum of squared deviations of the rows by a block of scores."""
    block_mean = tl.sum(tl.where(valid, scores, 0.0), 1) / num_valid
    centred = tl.where(valid, scores - block_mean[:, None], 0.0)
    total = count + num_valid
    delta = block_mean - mean
    square += tl.sum(centred * centred, 1) + delta * delta * (count * num_valid / total)
    return total, mean + delta * (num_valid / total), square


@triton.jit
def mask_scores_kernel(
    patches_ptr,  # (B, N, D)
    classes_ptr,  # (B, K, D)
    weight_ptr,  # (K,)
    bias_ptr,  # (K,)
    out_ptr,  # (B, N, K), contiguous
    patches_strides, classes_strides,
    num_patches, num_classes, dim, eps,
    ONE_BLOCK: tl.constexpr,  # all classes fit one block: compute it once
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(num_patches, BLOCK_N)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    offs_n = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    patches_ptr += b * patches_strides[0]
    classes_ptr += b * classes_strides[0]
    inputs = patches_ptr, patches_strides, classes_ptr, classes_strides, num_patches, num_classes, dim
    out_ptr += (b * num_patches + offs_n.to(tl.int64))[:, None] * num_classes
    mask_n = (offs_n < num_patches)[:, None]

    scores = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    count = 0.0
    mean = tl.zeros((BLOCK_N,), tl.float32)
    square = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, num_classes, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        scores, _, _ = _cosines(inputs, offs_n, offs_k, BLOCK_D, PRECISION)
        valid = (offs_k < num_classes)[None, :]
        count, mean, square = _merge(
            count, mean, square, scores, valid, tl.minimum(num_classes - start, BLOCK_K).to(tl.float32)
        )
    rstd = 1 / tl.sqrt(square / num_classes + eps)
    for start in range(0, num_classes, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        if not ONE_BLOCK:
            scores, _, _ = _cosines(inputs, offs_n, offs_k, BLOCK_D, PRECISION)
        mask_k = offs_k < num_classes
        weight = tl.load(weight_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        out = (scores - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
        tl.store(out_ptr + offs_k[None, :], out.to(out_ptr.dtype.element_ty), mask=mask_n & mask_k[None, :])


@triton.jit
def mask_scores_backward_kernel(
    grad_ptr,  # (B, N, K)
    patches_ptr,  # (B, N, D)
    classes_ptr,  # (B, K, D)
    weight_ptr,  # (K,)
    u_ptr,  # (B, N, K), contiguous: ds / (|p| |c|)
    patch_factor_ptr,  # (B, N): (sum_K ds s) / |p|^2
    sums_ptr,  # (B * tiles, 3, K): sums over the tile's patches of g x, g and ds s / |c|^2
    grad_strides, patches_strides, classes_strides,
    num_patches, num_classes, dim, eps,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(num_patches, BLOCK_N)
    tile = tl.program_id(0).to(tl.int64)
    b = tile // tiles
    offs_n = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_patches
    rows = b * num_patches + offs_n.to(tl.int64)
    patches_ptr += b * patches_strides[0]
    classes_ptr += b * classes_strides[0]
    inputs = patches_ptr, patches_strides, classes_ptr, classes_strides, num_patches, num_classes, dim
    stride_gb, stride_gn, stride_gk = grad_strides
    grad_ptr += b * stride_gb + offs_n.to(tl.int64)[:, None] * stride_gn
    sums_ptr += tile * 3 * num_classes

    # Sweep 0: the statistics. Sweep 1: the two means of the LayerNorm's gradient. Sweep 2: the results.
    count = 0.0
    mean = tl.zeros((BLOCK_N,), tl.float32)
    square = tl.zeros((BLOCK_N,), tl.float32)
    rstd = tl.zeros((BLOCK_N,), tl.float32)
    mean_h = tl.zeros((BLOCK_N,), tl.float32)
    mean_hx = tl.zeros((BLOCK_N,), tl.float32)
    patch_factor = tl.zeros((BLOCK_N,), tl.float32)
    for sweep in tl.static_range(3):
        for start in range(0, num_classes, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            mask_k = offs_k < num_classes
            mask = mask_n[:, None] & mask_k[None, :]
            scores, inverse_p, inverse_c = _cosines(inputs, offs_n, offs_k, BLOCK_D, PRECISION)
            if sweep == 0:
                num_valid = tl.minimum(num_classes - start, BLOCK_K).to(tl.float32)
                count, mean, square = _merge(count, mean, square, scores, mask_k[None, :], num_valid)
            else:
                x = (scores - mean[:, None]) * rstd[:, None]
                g = tl.load(grad_ptr + offs_k.to(tl.int64)[None, :] * stride_gk, mask=mask, other=0.0).to(tl.float32)
                h = g * tl.load(weight_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
                if sweep == 1:
                    mean_h += tl.sum(h, 1) / num_classes
                    mean_hx += tl.sum(tl.where(mask, h * x, 0.0), 1) / num_classes
                else:
                    ds = tl.where(mask, (h - mean_h[:, None] - x * mean_hx[:, None]) * rstd[:, None], 0.0)
                    dss = tl.where(mask, ds * scores, 0.0)
                    patch_factor += tl.sum(dss, 1) * inverse_p * inverse_p
                    u = ds * inverse_p[:, None] * inverse_c[None, :]
                    u_ptrs = u_ptr + rows[:, None] * num_classes + offs_k[None, :]
                    tl.store(u_ptrs, u.to(u_ptr.dtype.element_ty), mask=mask)
                    sum_gx = tl.sum(tl.where(mask, g * x, 0.0), 0)
                    tl.store(sums_ptr + offs_k, sum_gx, mask=mask_k)
                    tl.store(sums_ptr + num_classes + offs_k, tl.sum(g, 0), mask=mask_k)
                    class_factor = tl.sum(dss, 0) * inverse_c * inverse_c
                    tl.store(sums_ptr + 2 * num_classes + offs_k, class_factor, mask=mask_k)
        if sweep == 0:
            rstd = 1 / tl.sqrt(square / num_classes + eps)
    tl.store(patch_factor_ptr + rows, patch_factor, mask=mask_n)


class Tiles(NamedTuple):
    """Patches, classes and channels of a tile, warps and pipeline stages of a program."""

    block_n: int
    block_k: int
    block_d: int
    num_warps: int
    num_stages: int


@lru_cache
def launch_config(num_classes: int, dtype: torch.dtype, backward: bool, arch: str) -> Tiles:
    """Tiles of up to 256 classes forward and 64 backward (32 on gfx942), where more tiles are alive."""
    block_k = max(next_power_of_2(num_classes), 16)
    if backward:
        nvidia = arch.startswith("sm_")
        block_k = min(block_k, 64 if nvidia else 32)
        few_warps = block_k <= 32 and not (nvidia and dtype == torch.float32)  # with four warps float32 spills on sm_90
        block_d = 16 if TRITON_3_6 and block_k == 64 and dtype == torch.float32 else 32
        return Tiles(32, block_k, block_d, 4 if few_warps else 8, 1)
    if arch == "sm_75" and block_k > 64 and dtype == torch.float16:  # larger tiles spill
        return Tiles(32, 64, 32, 8, 1)
    if num_classes > 256:
        # float32 with two stages spills on sm_100.
        return Tiles(32, 64, 32, 8, 1) if dtype == torch.float32 else Tiles(64, 128, 32, 8, 2)
    block_d = 16 if TRITON_3_6 and block_k == 256 and dtype == torch.float32 else 32
    return Tiles(32 if block_k == 256 else 64, block_k, block_d, 4 if block_k <= 64 else 8, 2)


def mask_scores(patches: Tensor, classes: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``(B, N, D), (B, K, D), (K,), (K,)`` -> ``(B, N, K)``, contiguous, in the wider dtype of patches and weight."""
    refuse_float64("mask_scores", patches)
    (b, n, dim), k = patches.shape, classes.shape[1]
    out = patches.new_empty((b, n, k), dtype=torch.promote_types(patches.dtype, weight.dtype))
    if out.numel() == 0:
        return out
    arch = device_arch(patches)
    tiles = launch_config(k, patches.dtype, False, arch)
    mask_scores_kernel[programs(cdiv(n, tiles.block_n) * b, patches=patches.shape)](
        patches_ptr=patches,
        classes_ptr=classes,
        weight_ptr=weight.contiguous(),
        bias_ptr=bias.contiguous(),
        out_ptr=out,
        patches_strides=patches.stride(),
        classes_strides=classes.stride(),
        num_patches=n,
        num_classes=k,
        dim=dim,
        eps=eps,
        ONE_BLOCK=k <= tiles.block_k,
        PRECISION=dot_precision(patches.dtype, arch),
        enable_fp_fusion=False,
        **launch_arguments(tiles),
    )
    return out


def mask_scores_backward(
    grad: Tensor, patches: Tensor, classes: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of patches, classes, weight and bias, each in its tensor's dtype."""
    refuse_float64("mask_scores", patches)
    (b, n, dim), k = patches.shape, classes.shape[1]
    if b * n * k * dim == 0:
        return tuple(torch.zeros_like(tensor) for tensor in (patches, classes, weight, bias))  # type: ignore[return-value]
    arch = device_arch(patches)
    tiles = launch_config(k, patches.dtype, True, arch)
    blocks = cdiv(n, tiles.block_n)
    half = patches.dtype == torch.float16
    u = patches.new_empty((b, n, k), dtype=torch.float32 if half else patches.dtype)
    patch_factor = patches.new_empty((b, n), dtype=torch.float32)
    sums = patches.new_empty((b, blocks, 3, k), dtype=torch.float32)
    mask_scores_backward_kernel[programs(blocks * b, patches=patches.shape)](
        grad_ptr=grad,
        patches_ptr=patches,
        classes_ptr=classes,
        weight_ptr=weight.contiguous(),
        u_ptr=u,
        patch_factor_ptr=patch_factor,
        sums_ptr=sums,
        grad_strides=grad.stride(),
        patches_strides=patches.stride(),
        classes_strides=classes.stride(),
        num_patches=n,
        num_classes=k,
        dim=dim,
        eps=eps,
        PRECISION=dot_precision(patches.dtype, arch),
        enable_fp_fusion=False,
        **launch_arguments(tiles),
    )
    sums = sums.sum(1)  # (B, 3, K)
    factors = patch_factor.unsqueeze(-1), sums[:, 2].unsqueeze(-1)
    if half:
        largest = torch.linalg.vector_norm(u.nan_to_num(0.0, 0.0, 0.0), torch.inf, (1, 2), keepdim=True)
        bits = largest.clamp_(min=torch.finfo(torch.float32).tiny).view(torch.int32)
        scale = (bits & 0x7F800000).view(torch.float32)  # the power of two below
        u, factors = (u / scale).half(), tuple(factor / scale for factor in factors)
    grad_patches = (u @ classes).sub_(patches * factors[0])
    grad_classes = (u.mT @ patches).sub_(classes * factors[1])
    if half:
        grad_patches.mul_(scale)
        grad_classes.mul_(scale)
    return grad_patches, grad_classes, sums[:, 0].sum(0).to(weight.dtype), sums[:, 1].sum(0).to(bias.dtype)
