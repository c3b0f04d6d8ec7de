"""Groups of a bipartite matching in Triton: which tokens merge, and the number of each token's group.

One program owns an image with S sources, the tokens at odd positions. The ``merged``-th largest value is found bit by
bit: values are mapped to unsigned integers of the same order, NaN to zero, and a bit belongs to the bound if at least
``merged`` integers reach it. Of those equal to the bound the first ones merge. A destination's group is its number plus
the sources before it that are kept. With the groups of a block of destinations at hand, those of the sources that merge
with them are gathered; nothing is exchanged through memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import TRITON_3_6, device_arch, next_power_of_2, programs, refuse_float64

_MOST = 2048


@triton.jit
def _load_keys(value_ptr, start, sources, BLOCK: tl.constexpr):
    """Values of BLOCK sources as integers of the same order, above zero; zero for NaN and past the last source."""
    offs = start + tl.arange(0, BLOCK)
    value = tl.load(value_ptr + offs, mask=offs < sources, other=float("nan")) + 0.0  # no negative zero
    bits = value.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)
    return tl.where(value == value, key, 0).to(tl.uint32)


@triton.jit
def _merges(value_ptr, start, sources, bound, end, threshold, BLOCK: tl.constexpr):
    """Tell which of BLOCK sources merge: those above the bound, at it those before ``end``; or above the threshold."""
    offs = start + tl.arange(0, BLOCK)
    if threshold is None:
        keys = _load_keys(value_ptr, start, sources, BLOCK)
        merges = (keys > bound) | ((keys == bound) & (offs < end))
    else:
        merges = tl.load(value_ptr + offs, mask=offs < sources, other=float("nan")) > threshold
    return merges


@triton.jit(do_not_specialize=["tokens", "merged", "prefix"])
def bipartite_groups_kernel(
    value_ptr,  # (B, S) float32, contiguous
    match_ptr,  # (B, S) int64, contiguous
    index_ptr,  # (B, prefix + tokens) int64, contiguous, written
    tokens, merged, prefix,
    threshold,  # of values that merge, or None: the ``merged`` largest do
    BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    sources = tokens // 2
    destinations = tokens - sources
    value_ptr += image * sources
    match_ptr += image * sources
    index_ptr += image * (prefix + tokens)
    for start in tl.range(0, prefix, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        tl.store(index_ptr + offs, offs.to(tl.int64), mask=offs < prefix)
    index_ptr += prefix
    bound = tl.full((), 0, tl.uint32)
    end = 0  # of the sources at the bound that merge
    if threshold is None:
        first = _load_keys(value_ptr, 0, sources, BLOCK)
        for bit in range(32):
            candidate = bound | (tl.full((), 1, tl.uint32) << (31 - bit))
            reach = tl.sum((first >= candidate).to(tl.int32), 0)
            for start in tl.range(BLOCK, sources, BLOCK):
                reach += tl.sum((_load_keys(value_ptr, start, sources, BLOCK) >= candidate).to(tl.int32), 0)
            bound = tl.where(reach >= merged, candidate, bound)
        ties = merged
        for start in tl.range(0, sources, BLOCK):
            ties -= tl.sum((_load_keys(value_ptr, start, sources, BLOCK) > bound).to(tl.int32), 0)
        for start in tl.range(0, sources, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            equal = ((_load_keys(value_ptr, start, sources, BLOCK) == bound) & (offs < sources)).to(tl.int32)
            end = tl.maximum(end, tl.max(tl.where((equal > 0) & (tl.cumsum(equal, 0) <= ties), offs + 1, 0), 0))
            ties -= tl.sum(equal, 0)
    kept = prefix  # groups before the block
    for start in tl.range(0, destinations, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        alone = ((offs < sources) & (_merges(value_ptr, start, sources, bound, end, threshold, BLOCK) == 0)).to(
            tl.int32
        )
        group = kept + tl.arange(0, BLOCK) + tl.cumsum(alone, 0) - alone
        tl.store(index_ptr + 2 * offs, group.to(tl.int64), mask=offs < destinations)
        tl.store(index_ptr + 2 * offs + 1, (group + 1).to(tl.int64), mask=alone > 0)
        kept += BLOCK + tl.sum(alone, 0)
        for other in tl.range(0, sources, BLOCK):
            offs = other + tl.arange(0, BLOCK)
            merges = _merges(value_ptr, other, sources, bound, end, threshold, BLOCK)
            match = tl.load(match_ptr + offs, mask=merges, other=0).to(tl.int32) - start
            merges = merges & (match >= 0) & (match < BLOCK)
            of_match = tl.gather(group, tl.where(merges, match, 0), 0)
            tl.store(index_ptr + 2 * offs + 1, of_match.to(tl.int64), mask=merges)


def bipartite_groups(
    value: Tensor, match: Tensor, tokens: int, merged: int | None, prefix: int, threshold: float | None
) -> Tensor:
    """``(B, S), (B, S)`` -> the group of each token, ``(B, prefix + tokens)`` int64."""
    refuse_float64("bipartite_groups", value)
    images = len(value)
    index = match.new_empty((images, prefix + tokens))
    if images:
        block = min(max(next_power_of_2(tokens - tokens // 2), 64), _MOST)
        warps = 8 if block > 1024 or (block == 1024 and device_arch(value) == "sm_80") else 4
        bipartite_groups_kernel[programs(images, value=value.shape)](
            value_ptr=value.float().contiguous(),
            match_ptr=match.contiguous(),
            index_ptr=index,
            tokens=tokens,
            merged=0 if merged is None else merged,
            prefix=prefix,
            threshold=threshold,
            BLOCK=block,
            num_warps=16 if TRITON_3_6 and block > 256 else warps,  # others spill
        )
    return index
