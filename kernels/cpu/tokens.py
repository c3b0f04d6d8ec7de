"""Matching and merging of tokens by PyTorch's matrix products, sorts and sums of bags, for every device."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import statistics_dtype
from .native import has_feature

_TILE_SCORES = 1 << 20  # of one product
_SAMPLE = 16  # rows whose best product is typical


def best_match(a: Tensor, b: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(B, S, D), (B, T, D)`` -> the largest scalar product of each row of ``a`` and its row of ``b``, ``(B, S)``."""
    dtype = statistics_dtype(a.dtype)
    value = a.new_full(a.shape[:2], -torch.inf, dtype=dtype)
    match = a.new_zeros(a.shape[:2], dtype=torch.int64)
    counts = [b.shape[1]] * len(b) if lengths is None else lengths.tolist()
    if a.shape[1]:
        for image, count in enumerate(counts):
            if (rows := b[image, : max(count, 0)]).numel():
                value[image], match[image] = _best_of_image(a[image], rows, dtype)
    return value, match


def _best_of_image(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(S, D), (T, D)`` -> ``(S,)`` values and rows.

    bfloat16 products are rounded after the best of a few rows is subtracted: the ranks of others as good are then finer
    than bfloat16's step at their value. The value of each row's best is computed again in float32.
    """
    low = a.dtype == torch.bfloat16 and a.device.type == "cpu" and _multiplies_bfloat16()
    bound = None
    if low:
        typical = (a[:: max(len(a) // _SAMPLE, 1)].float() @ b.T.float()).max()
        bound = -torch.where(typical.isfinite(), typical, 0).to(b.dtype).expand(len(b)).contiguous()
    rows, columns = (a, b) if low else (a.to(dtype), b.to(dtype))
    columns, onednn = columns.contiguous(), dtype == torch.float32 and a.device.type == "cpu" and onednn_beats_mkl()
    found = []
    for part in rows.split(max(_TILE_SCORES // len(b), 1)):
        scores = (
            torch.ops.mkldnn._linear_pointwise(part, columns, bound, "none", [], "")
            if onednn
            else F.linear(part, columns, bound)
        )
        best, match = scores.max(1)
        if best.isnan().any():
            best, match = torch.where(scores.isnan(), -torch.inf, scores).max(1)
        found.append((best, match))
    value, match = (torch.cat(parts) for parts in zip(*found, strict=True))
    if low:
        exact = (a.float() * b[match]).sum(1)
        value = torch.where(exact.isnan(), -torch.inf, exact)
    return value, match


@cache
def onednn_beats_mkl() -> bool:
    """True on AMD processors with AVX512, which oneDNN uses and MKL does not: their float32 products differ by 2.2x."""
    uses_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512") and torch.backends.mkldnn.is_available()
    return uses_avx512 and has_feature("sse4a")  # Intel never had SSE4a


@cache
def _multiplies_bfloat16() -> bool:
    """True if the CPU has bfloat16 matrix products and oneDNN uses them."""
    units = has_feature("amx_tile", "avx512_bf16")
    return units and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def bipartite_groups(
    value: Tensor, match: Tensor, tokens: int, merged: int | None, prefix: int, threshold: float | None
) -> Tensor:
    """``(B, S), (B, S)`` -> the group of each token, ``(B, prefix + tokens)`` int64."""
    merges = value > (torch.inf if threshold is None else threshold)
    if threshold is None:
        merges.scatter_(1, torch.argsort(-value, dim=1, stable=True)[:, :merged], True)
    kept = value.new_ones((len(value), prefix + tokens), dtype=torch.bool)
    kept[:, prefix + 1 :: 2] = ~merges
    index = kept.cumsum(1) - 1
    sources = index[:, prefix + 1 :: 2]
    sources.copy_(torch.where(merges, index[:, prefix::2].gather(1, match), sources))
    return index


def merge_tokens(tokens: Tensor, index: Tensor, groups: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(B, M, D), (B, M)`` -> weighted means ``(B, groups, D)`` and sums of the weights ``(B, groups)``."""
    b, _, dim = tokens.shape
    dtype = statistics_dtype(tokens.dtype)
    weights = index.new_ones(index.shape, dtype=dtype) if weights is None else weights.to(dtype)
    sizes = weights.new_zeros(b, groups).scatter_add_(1, index, weights)
    rows = (index + groups * torch.arange(b, device=index.device)[:, None]).flatten()
    shares = _shares(index, weights, sizes)
    if tokens.device.type == "cpu" and tokens.numel():  # a bag is a group; 4 times as fast as index_add_
        order, counts = rows.argsort(stable=True), torch.bincount(rows, minlength=b * groups)
        members, offsets = tokens.to(dtype).flatten(0, 1), counts.cumsum(0) - counts
        merged = F.embedding_bag(order, members, offsets, mode="sum", per_sample_weights=shares.flatten()[order])
    else:
        merged = tokens.new_zeros((b * groups, dim), dtype=dtype)
        merged.index_add_(0, rows, (tokens * shares[..., None]).flatten(0, 1))
    return merged.to(tokens.dtype).view(b, groups, dim), sizes


def merge_tokens_backward(grad: Tensor, index: Tensor, weights: Tensor | None, sizes: Tensor) -> Tensor:
    """``(B, groups, D)`` -> the gradient of the tokens, ``(B, M, D)``."""
    weights = index.new_ones(index.shape, dtype=sizes.dtype) if weights is None else weights.to(sizes.dtype)
    shares = _shares(index, weights, sizes)
    return (grad.gather(1, index[..., None].expand(-1, -1, grad.shape[2])) * shares[..., None]).to(grad.dtype)


def _shares(index: Tensor, weights: Tensor, sizes: Tensor) -> Tensor:
    """Part of its group's weight that each token has, ``(B, M)``; 0 in a group without weight."""
    of_group = sizes.gather(1, index)
    return torch.where(of_group == 0, 0, weights / of_group)
