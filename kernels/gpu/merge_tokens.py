"""Merging of tokens in Triton, forward and backward, and sums over groups.

merged_g = sum of w_t / size_g * x_t over the tokens t of group g, with size_g the sum of their weights w_t. A program
of the first kernel owns a window of groups and counts their tokens in a histogram. It notes the token of each group of
one, and lists the tokens of larger groups in order. A program of the second one owns BLOCK_G groups: it copies the
tokens that are alone, then sums larger groups one by one, in the order of the list, so that equal input gives equal
bits. Kernels hand over nothing but between launches, and each value has one writer. Backward is a gather:
grad_x_t = w_t / size_g * grad_merged_g.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, next_power_of_2, programs, refuse_float64

_TOKENS, _WINDOW, _GROUPS, _MEMBERS, _MOST_COLUMNS = 512, 1024, 4, 128, 512


@triton.jit(do_not_specialize=["seq_len", "groups"])
def group_members_kernel(
    index_ptr,  # (B, M), contiguous
    first_ptr,  # (B, groups) int32, contiguous, written: the token of a group of one; -1 where there are more, else M
    members_ptr,  # (B, M) int64, contiguous, written: group (high bits) and token of larger groups, by window and token
    bounds_ptr,  # (B, windows, 2) int32, contiguous, written: where those of a window begin, and their number
    seq_len, groups,
    BLOCK: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    windows = tl.cdiv(groups, WINDOW)
    image = (tl.program_id(0) // windows).to(tl.int64)
    window = tl.program_id(0) % windows * WINDOW
    size = tl.minimum(groups - window, WINDOW)
    index_ptr += image * seq_len
    first_ptr += image * groups + window
    offs, bins = tl.arange(0, BLOCK), tl.arange(0, WINDOW)
    counts = tl.zeros((WINDOW,), tl.int32)
    before = tl.zeros((BLOCK,), tl.int32)  # tokens of earlier windows
    for start in tl.range(0, seq_len, BLOCK):
        index = tl.load(index_ptr + start + offs, mask=start + offs < seq_len, other=groups).to(tl.int32) - window
        counts += tl.histogram(index, WINDOW, mask=(index >= 0) & (index < size))
        before += (index < 0).to(tl.int32)
    members_ptr += image * seq_len + tl.sum(before, 0)
    others = tl.where(counts == 0, seq_len, -1)
    tl.store(first_ptr + bins, others, mask=(counts != 1) & (bins < size))
    members = 0
    for start in tl.range(0, seq_len, BLOCK):
        index = tl.load(index_ptr + start + offs, mask=start + offs < seq_len, other=groups).to(tl.int32) - window
        inside = (index >= 0) & (index < size)
        count = tl.where(inside, tl.gather(counts, tl.where(inside, index, 0), 0), 0)
        tl.store(first_ptr + index, start + offs, mask=count == 1)
        several = (count > 1).to(tl.int32)
        member = (window + index).to(tl.int64) << 32 | start + offs
        tl.store(members_ptr + members + tl.cumsum(several, 0) - several, member, mask=count > 1)
        members += tl.sum(several, 0)
    bounds_ptr += 2 * tl.program_id(0)
    tl.store(bounds_ptr, tl.sum(before, 0))
    tl.store(bounds_ptr + 1, members)


@triton.jit(do_not_specialize=["seq_len", "groups"])
def merge_tokens_kernel(
    tokens_ptr,  # (B, M, D)
    weights_ptr,  # (B, M), contiguous, or None
    first_ptr, members_ptr, bounds_ptr,  # as above
    merged_ptr,  # (B, groups, D), written
    sizes_ptr,  # (B, groups), contiguous, written; None for sums in place of means
    tokens_strides, merged_strides,
    seq_len, groups,
    DIM: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    image, begin_g = tl.program_id(2).to(tl.int64), tl.program_id(0) * BLOCK_G
    offs_g = begin_g + tl.arange(0, BLOCK_G)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_g, mask_d = offs_g < groups, offs_d < DIM
    tokens_ptr += image * tokens_strides[0] + offs_d.to(tl.int64) * tokens_strides[2]
    merged_ptr += image * merged_strides[0] + offs_d.to(tl.int64) * merged_strides[2]
    if weights_ptr is not None:
        weights_ptr += image * seq_len
    if sizes_ptr is not None:
        sizes_ptr += image * groups
    first = tl.load(first_ptr + image * groups + offs_g, mask=mask_g, other=seq_len)
    there = (first >= 0) & (first < seq_len)
    weights = there.to(tl.float32)
    if weights_ptr is not None:
        weights = tl.load(weights_ptr + first, mask=there, other=0.0)
    mask = (there & (weights != 0))[:, None] & mask_d[None, :]
    rows = tl.load(tokens_ptr[None, :] + first.to(tl.int64)[:, None] * tokens_strides[1], mask=mask, other=0.0)
    mask_g = mask_g & (first >= 0)
    out_ptrs = merged_ptr[None, :] + offs_g.to(tl.int64)[:, None] * merged_strides[1]
    tl.store(out_ptrs, rows.to(merged_ptr.dtype.element_ty), mask=mask_g[:, None] & mask_d[None, :])
    if sizes_ptr is not None:
        tl.store(sizes_ptr + offs_g, weights, mask=mask_g & (tl.program_id(1) == 0))

    bounds_ptr += 2 * (image * tl.cdiv(groups, WINDOW) + begin_g // WINDOW)
    members_ptr += image * seq_len
    larger = tl.where(first < 0, offs_g, groups)
    group = tl.min(larger, 0)
    while group < groups:
        members = tl.load(bounds_ptr + 1)
        offs_m = tl.load(bounds_ptr) + tl.arange(0, BLOCK_M)
        acc = tl.zeros((BLOCK_D,), tl.float64 if tokens_ptr.dtype.element_ty == tl.float64 else tl.float32)
        size = 0.0
        for start in tl.range(0, members, BLOCK_M):
            member = tl.load(members_ptr + start + offs_m, mask=start + tl.arange(0, BLOCK_M) < members, other=-1)
            left = tl.where(member >> 32 == group, member.to(tl.int32), seq_len)
            token = tl.min(left, 0)
            while token < seq_len:
                row = tl.load(tokens_ptr + token.to(tl.int64) * tokens_strides[1], mask=mask_d, other=0.0)
                weight = 1.0 if weights_ptr is None else tl.load(weights_ptr + token)
                acc += row.to(acc.dtype) * weight
                size += weight
                left = tl.where(left > token, left, seq_len)
                token = tl.min(left, 0)
        if sizes_ptr is not None:
            acc *= 1.0 / tl.where(size == 0, float("inf"), size)
            tl.store(sizes_ptr + group, size, mask=tl.program_id(1) == 0)
        row_ptrs = merged_ptr + group.to(tl.int64) * merged_strides[1]
        tl.store(row_ptrs, acc.to(merged_ptr.dtype.element_ty), mask=mask_d)
        larger = tl.where(larger > group, larger, groups)
        group = tl.min(larger, 0)


@triton.jit
def _share(weights, sizes):
    """``weights / sizes``: 1 where they are equal, which an approximate division may miss, and 0 of nothing."""
    share = weights * (1.0 / tl.where(sizes == 0, float("inf"), sizes))
    return tl.where((weights == sizes) & (sizes != 0), 1.0, share)


@triton.jit(do_not_specialize=["seq_len", "groups"])
def merge_tokens_backward_kernel(
    grad_ptr,  # (B, groups, D)
    index_ptr,  # (B, M), contiguous
    weights_ptr,  # (B, M), contiguous, or None
    sizes_ptr,  # (B, groups), contiguous
    grad_tokens_ptr,  # (B, M, D), contiguous
    stride_b: tl.int64, stride_g: tl.int64,
    seq_len, groups,
    DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(seq_len, BLOCK_G)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    offs_t = (tl.program_id(0) % blocks) * BLOCK_G + tl.arange(0, BLOCK_G)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_t, mask_d = offs_t < seq_len, offs_d < DIM
    index = tl.load(index_ptr + image * seq_len + offs_t, mask=mask_t, other=-1)
    known = (index >= 0) & (index < groups)
    sizes = tl.load(sizes_ptr + image * groups + index, mask=known, other=0.0)
    weights = known.to(tl.float32)
    if weights_ptr is not None:
        weights = tl.load(weights_ptr + image * seq_len + offs_t, mask=mask_t, other=0.0)
    share = _share(weights, sizes)
    grad = tl.load(
        grad_ptr + image * stride_b + index[:, None] * stride_g + offs_d[None, :],
        mask=known[:, None] & mask_d[None, :],
        other=0.0,
    )
    out_ptrs = grad_tokens_ptr + (image * seq_len + offs_t)[:, None] * DIM + offs_d[None, :]
    result = (grad.to(tl.float32) * share[:, None]).to(grad_tokens_ptr.dtype.element_ty)
    tl.store(out_ptrs, result, mask=mask_t[:, None] & mask_d[None, :])


def _tile(dim: int) -> dict[str, int]:
    """Groups (or tokens) and columns of a program, one warp."""
    return dict(BLOCK_G=_GROUPS, BLOCK_D=min(max(next_power_of_2(dim), 128), _MOST_COLUMNS), num_warps=1)


def _merge(tokens: Tensor, index: Tensor, weights: Tensor | None, merged: Tensor, sizes: Tensor | None) -> None:
    """Write means, with their sizes, or sums of the groups ``(B, groups, D)`` of ``(B, M, D)`` tokens."""
    (images, groups, dim), seq_len, index = merged.shape, index.shape[1], index.contiguous()
    windows = cdiv(groups, _WINDOW)
    found = dict(first_ptr=index.new_empty((images, groups), dtype=torch.int32), members_ptr=torch.empty_like(index))
    found["bounds_ptr"] = index.new_empty((images, windows, 2), dtype=torch.int32)
    counts = dict(seq_len=seq_len, groups=groups, WINDOW=_WINDOW)
    group_members_kernel[programs(images * windows, index=index.shape)](
        index_ptr=index, **found, **counts, BLOCK=_TOKENS, num_warps=8
    )
    tile = _tile(dim)
    grid = programs(cdiv(groups, _GROUPS), cdiv(dim, tile["BLOCK_D"]), images, tokens=tokens.shape)
    merge_tokens_kernel[grid](
        **found,
        **counts,
        tokens_ptr=tokens,
        weights_ptr=None if weights is None else weights.float().contiguous(),
        merged_ptr=merged,
        sizes_ptr=sizes,
        tokens_strides=tokens.stride(),
        merged_strides=merged.stride(),
        DIM=dim,
        BLOCK_M=_MEMBERS,
        **tile,
    )


def merge_tokens(tokens: Tensor, index: Tensor, groups: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(B, M, D), (B, M)`` -> weighted means ``(B, groups, D)`` and sums of the weights ``(B, groups)``."""
    refuse_float64("merge_tokens", tokens)
    images, _, dim = tokens.shape
    merged = tokens.new_empty((images, groups, dim))
    sizes = tokens.new_empty((images, groups), dtype=torch.float32)
    if sizes.numel():
        _merge(tokens, index, weights, merged, sizes)
    return merged, sizes


def sum_groups(grad: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """Sums of the gradients ``(B, K, h, w)`` of each group's patches, written to ``(B, K, groups)`` ``out``."""
    if len(out):
        _merge(grad.flatten(2).mT, index.flatten(1), None, out.mT, None)
    return out


def merge_tokens_backward(grad: Tensor, index: Tensor, weights: Tensor | None, sizes: Tensor) -> Tensor:
    """``(B, groups, D)`` -> the gradient of the tokens, ``(B, M, D)``."""
    images, groups, dim = grad.shape
    seq_len = index.shape[1]
    grad_tokens = grad.new_empty((images, seq_len, dim))
    if grad_tokens.numel() == 0:
        return grad_tokens
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    tile = _tile(dim)
    grid = programs(images * cdiv(seq_len, _GROUPS), cdiv(dim, tile["BLOCK_D"]), index=index.shape)
    merge_tokens_backward_kernel[grid](
        grad_ptr=grad,
        index_ptr=index.contiguous(),
        weights_ptr=None if weights is None else weights.float().contiguous(),
        sizes_ptr=sizes.contiguous(),
        grad_tokens_ptr=grad_tokens,
        stride_b=grad.stride(0),
        stride_g=grad.stride(1),
        seq_len=seq_len,
        groups=groups,
        DIM=dim,
        **tile,
    )
    return grad_tokens
