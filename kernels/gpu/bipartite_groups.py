"""Groups of a bipartite matching in Triton: which tokens merge, and the number of each token's group.

One program owns an image with S sources, the tokens at odd positions. The ``merged``-th largest value is found bit by
bit: values are mapped to unsigned integers of the same order, NaN to zero, and a bit belongs to the bound if at least
``merged`` integers reach it. Of those equal to the bound the first ones merge. A destination's group is its number plus
the sources before it that are kept; groups of destinations are stored first, and merged sources then read theirs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import device_arch, next_power_of_2, programs, refuse_float64

_MOST = 2048


@triton.jit
def _load_keys(value_ptr, start, sources, BLOCK: tl.constexpr):
    """Values of BLOCK sources as integers of the same order, above zero; zero for NaN and past the last source."""
    offs = start + tl.arange(0, BLOCK)
    value = tl.load(value_ptr + offs, mask=offs < sources, other=float("nan")) + 0.0  # no negative zero
    bits = value.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)
    return tl.where(value == value, key, 0).to(tl.uint32)


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
    ties = 0  # sources at the bound that merge
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
    kept = prefix  # groups before the block
    equal = 0  # sources at the bound before the block
    for start in tl.range(0, destinations, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        if threshold is None:
            keys = _load_keys(value_ptr, start, sources, BLOCK)
            at_bound = ((keys == bound) & (offs < sources)).to(tl.int32)
            rank = equal + tl.cumsum(at_bound, 0) - at_bound
            merges = (keys > bound) | ((at_bound > 0) & (rank < ties))
            equal += tl.sum(at_bound, 0)
        else:
            merges = tl.load(value_ptr + offs, mask=offs < sources, other=float("nan")) > threshold
        alone = ((offs < sources) & (merges == 0)).to(tl.int32)
        group = kept + tl.arange(0, BLOCK) + tl.cumsum(alone, 0) - alone
        tl.store(index_ptr + 2 * offs, group.to(tl.int64), mask=offs < destinations)
        tl.store(index_ptr + 2 * offs + 1, tl.where(alone > 0, group + 1, -1).to(tl.int64), mask=offs < sources)
        kept += BLOCK + tl.sum(alone, 0)
    tl.debug_barrier()
    for start in tl.range(0, sources, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        merges = tl.load(index_ptr + 2 * offs + 1, mask=offs < sources, other=0) < 0
        match = tl.load(match_ptr + offs, mask=merges, other=0)
        known = merges & (match >= 0) & (match < destinations)
        group = tl.load(index_ptr + 2 * match, mask=known, other=0)
        tl.store(index_ptr + 2 * offs + 1, group, mask=merges)


def bipartite_groups(
    value: Tensor, match: Tensor, tokens: int, merged: int | None, prefix: int, threshold: float | None
) -> Tensor:
    """``(B, S), (B, S)`` -> the group of each token, ``(B, prefix + tokens)`` int64."""
    refuse_float64("bipartite_groups", value)
    images = len(value)
    index = match.new_empty((images, prefix + tokens))
    if images:
        block = min(max(next_power_of_2(tokens - tokens // 2), 64), _MOST)
        bipartite_groups_kernel[programs(images, value=value.shape)](
            value_ptr=value.float().contiguous(),
            match_ptr=match.contiguous(),
            index_ptr=index,
            tokens=tokens,
            merged=0 if merged is None else merged,
            prefix=prefix,
            threshold=threshold,
            BLOCK=block,
            num_warps=8 if block > 1024 or (block == 1024 and device_arch(value) == "sm_80") else 4,  # others spill
        )
    return index
