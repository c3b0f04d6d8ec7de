"""Every op in a few lines of plain PyTorch: the specification, and in float64 the oracle of the tests.

Names, argument order and results are those of the public ops in ``segmenter_fast.kernels``; only the argument
checks are missing. Nothing here is fast and nothing is fused.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import label_dtype, statistics_dtype


def attention(qkv: Tensor, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """``(B, N, 3, H, D), (B, N)`` -> ``(B, N, H, D)``: softmax(q k^T * scale + bias) v for every head."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, D) each
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    scores = q @ k.mT * scale
    if bias is None:
        return (scores.softmax(-1) @ v).transpose(1, 2)
    scores = scores + bias[:, None, None].to(scores.dtype)
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    return (scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0) @ v).transpose(1, 2)


def unit_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, channels: int | None = None
) -> Tensor:
    """``(B, M, D), (D,), (D,)`` -> ``(B, M, channels)``: LayerNorm, sums of every ``channels``-th channel, length 1."""
    dtype = statistics_dtype(x.dtype)
    channels = min(channels or x.shape[2], x.shape[2])
    z = F.layer_norm(x.to(dtype), weight.shape, weight.to(dtype), None if bias is None else bias.to(dtype), eps)
    parts = F.pad(z, (0, -x.shape[2] % channels)).split(channels, 2)  # their sum is faster than one over a dimension
    return F.normalize(reduce(torch.add, parts), dim=-1).to(x.dtype)


def best_match(a: Tensor, b: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``(B, S, D), (B, T, D)`` -> the largest scalar product of each row of ``a`` and its row of ``b``, ``(B, S)``."""
    dtype = statistics_dtype(a.dtype)
    scores = a.to(dtype) @ b.mT.to(dtype)
    left_out = scores.isnan()
    if lengths is not None:
        left_out = left_out | (torch.arange(b.shape[1], device=b.device) >= lengths[:, None, None])
    value, match = scores.masked_fill(left_out, -torch.inf).max(-1)
    return value, match


def bipartite_groups(
    value: Tensor, match: Tensor, tokens: int, merged: int | None, prefix: int = 0, threshold: float | None = None
) -> Tensor:
    """``(B, S), (B, S)`` -> ``(B, prefix + tokens)`` groups: tokens at odd positions merge into those at even ones."""
    merges = value > (torch.inf if threshold is None else threshold)
    if threshold is None:
        merges.scatter_(1, torch.argsort(-value, dim=1, stable=True)[:, :merged], True)
    kept = value.new_ones((len(value), prefix + tokens), dtype=torch.bool)
    kept[:, prefix + 1 :: 2] = ~merges
    index = kept.cumsum(1) - 1
    odd = index[:, prefix + 1 :: 2]
    odd.copy_(torch.where(merges, index[:, prefix::2].gather(1, match), odd))
    return index


def merge_tokens(tokens: Tensor, index: Tensor, groups: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``(B, M, D), (B, M)`` -> weighted means of groups ``(B, groups, D)`` and sums of the weights ``(B, groups)``."""
    dtype = statistics_dtype(tokens.dtype)
    members = F.one_hot(index, groups).mT.to(dtype)  # (B, groups, M)
    members = members if weights is None else members * weights.to(dtype)[:, None]
    sizes = members.sum(-1)
    shares = members / torch.where(sizes == 0, 1, sizes)[..., None]
    return (shares @ tokens.to(dtype)).to(tokens.dtype), sizes


def mask_scores(patches: Tensor, classes: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """``(B, N, D), (B, K, D), (K,), (K,)`` -> ``(B, N, K)``: cosine similarity, then LayerNorm over K."""
    patches = patches / patches.norm(dim=-1, keepdim=True)
    classes = classes / classes.norm(dim=-1, keepdim=True)
    return F.layer_norm(patches @ classes.mT, weight.shape, weight, bias, eps)


def on_grid(masks: Tensor, index: Tensor | None) -> Tensor:
    """``(B, K, h, w)``: with an ``index`` ``(B, h, w)``, the scores of each patch's group in ``(B, K, M)`` masks."""
    if index is None:
        return masks
    return masks.gather(2, index.flatten(1)[:, None].expand(-1, masks.shape[1], -1)).unflatten(2, index.shape[1:])


def upsample(
    masks: Tensor, size: tuple[int, int], crop: tuple[int, int] | None, align_corners: bool, index: Tensor | None = None
) -> Tensor:
    """``(B, K, h, w)`` -> ``(B, K, H, W)`` logits at ``size``, of which the top-left ``crop`` is kept."""
    height, width = size if crop is None else crop
    masks = on_grid(masks, index)
    logits = F.interpolate(masks, size=size, mode="bilinear", align_corners=align_corners)
    return logits[..., :height, :width]


def upsample_argmax(
    masks: Tensor,
    size: tuple[int, int],
    crop: tuple[int, int] | None = None,
    align_corners: bool = False,
    index: Tensor | None = None,
) -> Tensor:
    """``(B, K, h, w)`` -> ``(B, H, W)`` labels, uint8 where K <= 256 and int32 otherwise."""
    return upsample(masks, size, crop, align_corners, index).argmax(1).to(label_dtype(masks.shape[1]))


def upsample_softmax(
    masks: Tensor,
    size: tuple[int, int],
    crop: tuple[int, int] | None = None,
    align_corners: bool = False,
    index: Tensor | None = None,
) -> Tensor:
    """``(B, K, h, w)`` -> ``(B, K, H, W)`` probabilities over K."""
    return upsample(masks, size, crop, align_corners, index).softmax(1)


def upsample_cross_entropy(
    masks: Tensor,
    target: Tensor,
    size: tuple[int, int] | None = None,
    ignore_index: int = 255,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    align_corners: bool = False,
    index: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of ``(B, K, h, w)`` masks upsampled to ``size`` against a ``(B, H, W)`` target."""
    height, width = target.shape[1:]
    logits = upsample(masks, size or (height, width), (height, width), align_corners, index)
    options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction}
    return F.cross_entropy(logits, target.long(), weight, **options)


def lattice_logits(
    scores: Tensor, rows: Tensor, row_weights: Tensor, cols: Tensor, col_weights: Tensor, index: Tensor | None = None
) -> Tensor:
    """``(N, K), (S, 2, H), (S, H), (S, 2, W), (S, W)`` -> ``(S, K, H, W)``: mixes of the points ``rows + cols``."""
    v, u = row_weights[:, :, None, None], col_weights[:, None, :, None]
    points = rows[:, :, None, :, None] + cols[:, None, :, None, :]  # (S, 2, 2, H, W)
    points = points if index is None else index[points]
    top, bottom = (scores[points[:, i, 0].long()] * (1 - u) + scores[points[:, i, 1].long()] * u for i in range(2))
    return (top * (1 - v) + bottom * v).permute(0, 3, 1, 2)


def lattice_argmax(
    scores: Tensor, rows: Tensor, row_weights: Tensor, cols: Tensor, col_weights: Tensor, index: Tensor | None = None
) -> Tensor:
    """``(H, W)`` labels of the mean softmax, uint8 where K <= 256 and int32 otherwise."""
    logits = lattice_logits(scores, rows, row_weights, cols, col_weights, index)
    votes = logits[0] if len(logits) == 1 else logits.softmax(1).mean(0)  # the softmax is monotonic
    return votes.argmax(0).to(label_dtype(scores.shape[1]))


def lattice_softmax(
    scores: Tensor, rows: Tensor, row_weights: Tensor, cols: Tensor, col_weights: Tensor, index: Tensor | None = None
) -> Tensor:
    """``(K, H, W)``: the mean over S of the softmaxes."""
    return lattice_logits(scores, rows, row_weights, cols, col_weights, index).softmax(1).mean(0)
