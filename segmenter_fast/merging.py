"""Encoder layers with token merging, as a ``TokenMerging`` schedules it.

A group of patches is one token, the mean of their tokens weighted by the patches that each stands for. Attention is
proportional: a key's scores get the logarithm of its group's size. Prefix tokens are groups of themselves. The rotary
angles of a group are the mean of its patches' angles. With a threshold the images of a batch have different numbers of
groups; the shorter ones are padded by groups of size 0, whose bias of -inf keeps every query from them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import kernels
from .config import Pair
from .patches import channels_last_maps
from .rotary import rotation_table
from .token_merging import TokenMerging

# Of the similarity, for each factor of e in the size of a group.
SIZE_PENALTY = 0.01

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Groups:
    """Groups of patches."""

    index: Tensor
    """``(B, h, w)`` int64: the group of each patch."""
    bias: Tensor
    """``(B, groups)``: logarithms of their sizes, for attention; -inf for padding."""

    def spread(self, values: Tensor) -> Tensor:
        """``(B, groups, D)`` values of groups -> ``(B, h w, D)`` of their patches."""
        return values.gather(1, self.index.flatten(1)[..., None].expand(-1, -1, values.shape[2]))


@dataclass(frozen=True)
class Scores:
    """Class scores of patches, or of groups of patches."""

    values: Tensor
    """``(B, N, K)``."""
    grid: Pair
    """(h, w) patches."""
    groups: Groups | None = None

    def maps(self, gather: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return the scores ``(B, K, h, w)`` of patches (channels-last strides) and None.

        Without ``gather``, those ``(B, K, groups)`` of groups where there are some, and the index that the upsample ops
        take.
        """
        if self.groups is None:
            return channels_last_maps(self.values, self.grid), None
        if gather:
            return channels_last_maps(self.groups.spread(self.values), self.grid), None
        return self.values.mT, self.groups.index

    def index(self) -> Tensor:
        """Return the group of each patch, ``(B, h, w)`` int64 from 0 on; without merging each is one of its own."""
        if self.groups is not None:
            return self.groups.index
        batch, patches, _ = self.values.shape
        return torch.arange(patches, device=self.values.device).view(1, *self.grid).expand(batch, -1, -1)


@dataclass(frozen=True)
class _Step:
    index: Tensor  # (B, prefix + M) int64: the new group of each token
    groups: int  # of the image with the most
    counts: Tensor | None  # (B,) patch tokens of each image, where they differ


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    rotation: Tensor | None,
    grid: Pair,
    merging: TokenMerging | None,
    ops: Any = kernels,
) -> tuple[Tensor, Groups | None]:
    """Run all layers of an encoder.

    Args:
        x: ``(B, prefix + h w, D)`` tokens.
        rotation: of a rotary embedding: the ``rotation_table``, with merging the ``rotation_angles``.
        grid: (h, w).
        ops: with the names of ``kernels``.

    Returns:
        Tokens ``(B, prefix + groups, D)``, and the groups of patches; None where every token is a patch.
    """
    if merging is None:
        for block in blocks:
            x = block(x, rotation)
        return x, None
    angles, prefix = rotation, x.shape[1] - grid[0] * grid[1]
    rotation = None if angles is None else rotation_table(angles)
    index: Tensor | None = None
    sizes: Tensor | None = None
    bias: Tensor | None = None
    counts: Tensor | None = None
    for layer, block in enumerate(blocks):
        step = _match(block, x, bias, prefix, grid if index is None else None, merging, layer, counts, ops)
        if step is not None:
            if angles is not None:
                angles = angles if angles.ndim == 3 else angles.expand(x.shape[0], -1, -1)
                angles, _ = ops.merge_tokens(angles, step.index, step.groups, sizes)
                rotation = rotation_table(angles)
            x, sizes = ops.merge_tokens(x, step.index, step.groups, sizes)
            index = step.index if index is None else step.index.gather(1, index)
            bias, counts = sizes.log(), step.counts
        x = block(x, rotation, bias)
    if index is None or bias is None:
        return x, None
    return x, Groups(index[:, prefix:].unflatten(1, grid) - prefix, bias[:, prefix:])


def _match(
    block: nn.Module,
    x: Tensor,
    bias: Tensor | None,
    prefix: int,
    grid: Pair | None,
    merging: TokenMerging,
    layer: int,
    counts: Tensor | None,
    ops: Any,
) -> _Step | None:
    """Find the tokens that merge before a layer; None if none can.

    Tokens are alike by what the layer sees of them, their normalised form, whose channels may be summed to fewer, and
    groups merge less readily the larger they are.

    Args:
        bias: ``(B, prefix + M)``, logarithms of the patches that the tokens stand for; None where each is one.
        grid: of the patches; None if some of them have merged.
        counts: of a ``_Step``.
    """
    tokens = x.shape[1] - prefix
    if layer not in merging.layers or tokens < 2:
        return None
    removed = None if merging.threshold is not None else merging.removed(layer, tokens)
    if removed == 0:
        return None
    norm: Any = block.norm1
    with torch.no_grad():
        z = ops.unit_rows(x[:, prefix:], norm.weight, norm.bias, norm.eps, merging.channels)
    if merging.matching == "window" and layer == merging.layers[0] and grid is not None:
        found = _window_groups(z, grid, prefix, removed, merging.threshold)
        if found is None or removed is not None:
            return found
        index = found.index
    else:
        lengths = None if counts is None else (counts + 1) // 2
        sources, destinations = z[:, 1::2], z[:, ::2]
        if merging.crowd:  # a product with b + c m has c times that with the mean m in it
            destinations = destinations.add(z.mT.sum(2)[:, None], alpha=merging.crowd / tokens)
        value, match = ops.best_match(sources, destinations, lengths)
        if bias is not None:
            value = value - SIZE_PENALTY * bias[:, prefix + 1 :: 2]
        if counts is not None:
            padding = torch.arange(value.shape[1], device=x.device) >= counts[:, None] // 2
            value = value.masked_fill(padding, -torch.inf)
        index = ops.bipartite_groups(value, match, tokens, removed, prefix, merging.threshold)
        if removed is not None:
            return _Step(index, prefix + tokens - removed, None)
    own = index
    if counts is not None:
        own = index.masked_fill(torch.arange(prefix + tokens, device=x.device) >= prefix + counts[:, None], 0)
    left = own.amax(1) + 1
    numbers = left.tolist()
    groups = max(numbers)
    # Padding has no weight, in whatever group it is.
    return _Step(index.clamp(max=groups - 1), groups, None if min(numbers) == groups else left - prefix)


def _window_groups(z: Tensor, grid: Pair, prefix: int, removed: int | None, threshold: float | None) -> _Step | None:
    """Merge windows of 2 x 2 patches whose mean cosine similarity is largest, or above the threshold."""
    down, across = grid[0] // 2, grid[1] // 2
    count = down * across
    merged = count if removed is None else min((removed + 1) // 3, count)
    if not merged:
        return None
    maps = z.unflatten(1, grid)[:, : 2 * down, : 2 * across].unflatten(2, (across, 2)).unflatten(1, (down, 2))
    value = (maps.float().sum((2, 4)).square().sum(-1).flatten(1) - 4) / 12  # (B, windows)
    if removed is None:
        merges = value > threshold
    else:
        best = torch.argsort(-value, dim=1, stable=True)[:, :merged]
        merges = torch.zeros_like(value, dtype=torch.bool).scatter(1, best, True)
    first = torch.arange(0, 2 * down, 2, device=z.device)[:, None] * grid[1]
    first = (first + torch.arange(0, 2 * across, 2, device=z.device)).flatten() + prefix  # (windows,)
    others = first[:, None] + torch.tensor([1, grid[1], grid[1] + 1], device=z.device)
    kept = torch.ones(z.shape[0], prefix + z.shape[1], dtype=torch.int64, device=z.device)
    joins = merges[..., None].expand(-1, -1, 3).flatten(1)  # (B, 3 windows)
    kept = kept.index_copy(1, others.flatten(), 1 - joins.long())
    index = kept.cumsum(1) - 1
    joined = index[:, first[:, None].expand(-1, 3).flatten()]
    index = index.index_copy(1, others.flatten(), torch.where(joins, joined, index[:, others.flatten()]))
    return _Step(index, prefix + z.shape[1] - 3 * merged, None)


def sharing(module: ModuleT, **attributes: Any) -> ModuleT:
    """Return a module with the same parameters and layers, not copies of them, and other attributes."""
    other = object.__new__(type(module))
    other.__dict__.update(module.__dict__, _modules={**module._modules})
    for name, value in attributes.items():
        setattr(other, name, value)
    return other
