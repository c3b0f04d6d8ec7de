"""Merging of tokens in Triton, forward and backward.

merged_g = sum of w_t / size_g * x_t over the tokens t of group g, with size_g the sum of their weights w_t. The first
kernel finds the first token of each group by an integer minimum and lists the other tokens, the second one compares all
pairs of these and links each token to the next one of its group. The third one owns BLOCK_G groups and BLOCK_D columns
and follows the links, so that a group is always summed in the order of its tokens: equal input gives equal bits. A
token alone has the share 1 and keeps its own. Backward is a gather: grad_x_t = w_t / size_g * grad_merged_g.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, programs, refuse_float64

_TOKENS, _PROGRAMS, _PAIRS, _GROUPS, _COLUMNS = 1024, 8, 64, 16, 128


@triton.jit(do_not_specialize=["seq_len", "groups"])
def merge_firsts_kernel(
    index_ptr,  # (B, M), contiguous
    first_ptr,  # (B, groups) int32, contiguous, written: the first token of a group, seq_len where it has none
    next_ptr,  # (B, M) int32, contiguous, written: seq_len
    others_ptr,  # (B, M) int32, contiguous, written: tokens that are not the first of their group, in order
    count_ptr,  # (B,) int32, written: their number
    seq_len, groups,
    BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    index_ptr += image * seq_len
    next_ptr += image * seq_len
    others_ptr += image * seq_len
    first_ptr += image * groups
    offs = tl.arange(0, BLOCK)
    for start in tl.range(0, groups, BLOCK):
        tl.store(first_ptr + start + offs, seq_len, mask=start + offs < groups)
    for start in tl.range(0, seq_len, BLOCK):
        tl.store(next_ptr + start + offs, seq_len, mask=start + offs < seq_len)
    tl.debug_barrier()
    for start in tl.range(0, seq_len, BLOCK):
        index = tl.load(index_ptr + start + offs, mask=start + offs < seq_len, other=-1)
        known = (index >= 0) & (index < groups)
        tl.atomic_min(first_ptr + index, start + offs, mask=known, sem="relaxed")
    tl.debug_barrier()
    found = 0
    for start in tl.range(0, seq_len, BLOCK):
        index = tl.load(index_ptr + start + offs, mask=start + offs < seq_len, other=-1)
        known = (index >= 0) & (index < groups)
        first = tl.load(first_ptr + index, mask=known, other=0, volatile=True)  # past the cache, as the atomics are
        other = (known & (first < start + offs)).to(tl.int32)
        rank = found + tl.cumsum(other, 0) - other
        tl.store(others_ptr + rank, start + offs, mask=other > 0)
        found += tl.sum(other, 0)
    tl.store(count_ptr + image, found)


@triton.jit(do_not_specialize=["seq_len", "groups"])
def merge_links_kernel(
    index_ptr, first_ptr, next_ptr, others_ptr, count_ptr,  # as above; next_ptr is written where there is a next token
    seq_len, groups,
    PROGRAMS: tl.constexpr,  # of an image
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    first_t = (tl.program_id(0) % PROGRAMS) * BLOCK_T
    others = tl.load(count_ptr + image)
    index_ptr += image * seq_len
    others_ptr += image * seq_len
    offs = tl.arange(0, BLOCK_T)
    for start_t in tl.range(first_t, others, PROGRAMS * BLOCK_T):
        mask = start_t + offs < others
        tokens = tl.load(others_ptr + start_t + offs, mask=mask, other=0)
        index = tl.load(index_ptr + tokens, mask=mask, other=-1).to(tl.int32)
        previous = tl.load(first_ptr + image * groups + index, mask=mask, other=0)
        before = tl.broadcast_to(previous[:, None], (BLOCK_T, BLOCK_T))  # the last with this group in each column
        for start in tl.range(0, start_t + BLOCK_T, BLOCK_T):
            left = start + offs < others
            earlier = tl.load(others_ptr + start + offs, mask=left, other=seq_len)
            group = tl.load(index_ptr + earlier, mask=left, other=-1).to(tl.int32)
            same = (index[:, None] == group[None, :]) & (earlier[None, :] < tokens[:, None])
            before = tl.where(same, earlier[None, :], before)
        tl.store(next_ptr + image * seq_len + tl.max(before, 1), tokens, mask=mask)


@triton.jit
def _share(weights, sizes):
    """``weights / sizes``: 1 where they are equal, which an approximate division may miss, and 0 of nothing."""
    share = weights * (1.0 / tl.where(sizes == 0, float("inf"), sizes))
    return tl.where((weights == sizes) & (sizes != 0), 1.0, share)


@triton.jit(do_not_specialize=["seq_len", "groups"])
def merge_tokens_kernel(
    tokens_ptr,  # (B, M, D), last stride 1
    weights_ptr,  # (B, M), contiguous, or None
    next_ptr,  # (B, M), contiguous
    first_ptr,  # (B, groups), contiguous
    merged_ptr,  # (B, groups, D), contiguous
    sizes_ptr,  # (B, groups), contiguous
    stride_b: tl.int64, stride_m: tl.int64,
    seq_len, groups,
    DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(groups, BLOCK_G)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    offs_g = (tl.program_id(0) % blocks) * BLOCK_G + tl.arange(0, BLOCK_G)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_g, mask_d = offs_g < groups, offs_d < DIM
    tokens_ptr += image * stride_b
    next_ptr += image * seq_len
    if weights_ptr is not None:
        weights_ptr += image * seq_len
    first = tl.load(first_ptr + image * groups + offs_g, mask=mask_g, other=seq_len)
    current = first
    sizes = tl.zeros((BLOCK_G,), tl.float32)
    while tl.min(current, 0) < seq_len:
        there = current < seq_len
        if weights_ptr is not None:
            sizes += tl.load(weights_ptr + current, mask=there, other=0.0)
        else:
            sizes += there.to(tl.float32)
        current = tl.load(next_ptr + current, mask=there, other=seq_len)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    current = first
    while tl.min(current, 0) < seq_len:
        there = current < seq_len
        weights = there.to(tl.float32)
        if weights_ptr is not None:
            weights = tl.load(weights_ptr + current, mask=there, other=0.0)
        share = _share(weights, sizes)
        rows = tl.load(
            tokens_ptr + current.to(tl.int64)[:, None] * stride_m + offs_d[None, :],
            mask=there[:, None] & mask_d[None, :],
            other=0.0,
        )
        acc += rows.to(tl.float32) * share[:, None]
        current = tl.load(next_ptr + current, mask=there, other=seq_len)
    out_ptrs = merged_ptr + (image * groups + offs_g)[:, None] * DIM + offs_d[None, :]
    tl.store(out_ptrs, acc.to(merged_ptr.dtype.element_ty), mask=mask_g[:, None] & mask_d[None, :])
    tl.store(sizes_ptr + image * groups + offs_g, sizes, mask=mask_g & (tl.program_id(1) == 0))


@triton.jit(do_not_specialize=["seq_len", "groups"])
def merge_tokens_backward_kernel(
    grad_ptr,  # (B, groups, D)
    index_ptr,  # (B, M), contiguous
    weights_ptr,  # (B, M), contiguous, or None
    sizes_ptr,  # (B, groups), contiguous
    grad_tokens_ptr,  # (B, M, D), contiguous
    stride_b: tl.int64, stride_g: tl.int64,
    seq_len, groups,
    DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(seq_len, BLOCK_T)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    offs_t = (tl.program_id(0) % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
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


def merge_tokens(tokens: Tensor, index: Tensor, groups: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(B, M, D), (B, M)`` -> weighted means ``(B, groups, D)`` and sums of the weights ``(B, groups)``."""
    refuse_float64("merge_tokens", tokens)
    images, seq_len, dim = tokens.shape
    merged = tokens.new_empty((images, groups, dim))
    sizes = tokens.new_empty((images, groups), dtype=torch.float32)
    if sizes.numel() == 0:
        return merged, sizes
    tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    scratch = index.new_empty((images * (2 * seq_len + groups + 1),), dtype=torch.int32)
    next_, others, first, number = scratch.split([images * size for size in (seq_len, seq_len, groups, 1)])
    links = dict(index_ptr=index.contiguous(), first_ptr=first, next_ptr=next_, others_ptr=others, count_ptr=number)
    counts = dict(seq_len=seq_len, groups=groups)
    merge_firsts_kernel[programs(images)](**links, **counts, BLOCK=_TOKENS, num_warps=8)
    merge_links_kernel[programs(images * _PROGRAMS)](**links, **counts, PROGRAMS=_PROGRAMS, BLOCK_T=_PAIRS, num_warps=4)
    merge_tokens_kernel[programs(images * cdiv(groups, _GROUPS), max(cdiv(dim, _COLUMNS), 1), tokens=tokens.shape)](
        tokens_ptr=tokens,
        weights_ptr=None if weights is None else weights.float().contiguous(),
        next_ptr=next_,
        first_ptr=first,
        merged_ptr=merged,
        sizes_ptr=sizes,
        stride_b=tokens.stride(0),
        stride_m=tokens.stride(1),
        **counts,
        DIM=dim,
        BLOCK_G=_GROUPS,
        BLOCK_D=_COLUMNS,
        num_warps=1,
    )
    return merged, sizes


def merge_tokens_backward(grad: Tensor, index: Tensor, weights: Tensor | None, sizes: Tensor) -> Tensor:
    """``(B, groups, D)`` -> the gradient of the tokens, ``(B, M, D)``."""
    images, groups, dim = grad.shape
    seq_len = index.shape[1]
    grad_tokens = grad.new_empty((images, seq_len, dim))
    if grad_tokens.numel() == 0:
        return grad_tokens
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    merge_tokens_backward_kernel[programs(images * cdiv(seq_len, _GROUPS), cdiv(dim, _COLUMNS), index=index.shape)](
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
        BLOCK_T=_GROUPS,
        BLOCK_D=_COLUMNS,
        num_warps=1,
    )
    return grad_tokens
