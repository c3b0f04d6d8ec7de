"""``unit_rows``, ``best_match``, ``bipartite_groups``, ``merge_tokens``: argument checks, registration, derivatives."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..cpu import tokens as cpu
from ..cpu.unit_rows import unit_rows as cpu_unit_rows
from ..registry import (
    FLOATS,
    define,
    differentiable_gradients,
    refuse_forward_mode,
    require_dtype,
    require_one_device,
    statistics_dtype,
)


def unit_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, channels: int | None = None
) -> Tensor:
    """Rows whose scalar products are the similarities of tokens: LayerNorm, sums of channels, length 1.

    Args:
        x: ``(B, M, D)`` floating point, any strides.
        weight, bias: ``(D,)`` floating point, of the LayerNorm.
        eps: added to its variances.
        channels: number of channels of the result, each the sum of every ``channels``-th channel of the LayerNorm; D,
            which is also the most that there are, if not given.

    Returns:
        ``(B, M, channels)`` in the dtype of ``x``, computed in float32 (float64 for float64). Not differentiable. Only
        CPUs have a kernel: on other devices it is the definition, which compilers fuse.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is allowed.
    """
    if x.ndim != 3 or x.shape[2] < 1:
        raise ValueError(f"x must be (B, M, D) with D at least 1, got {tuple(x.shape)}")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            require_dtype(name, tensor, *FLOATS)
            if name != "x" and tensor.shape != x.shape[2:]:
                raise ValueError(f"{name} must be (D,), here ({x.shape[2]},), got {tuple(tensor.shape)}")
    require_one_device(x=x, weight=weight, bias=bias)
    if channels is not None and channels < 1:
        raise ValueError(f"channels must be at least 1, got {channels}")
    channels = x.shape[2] if channels is None else min(channels, x.shape[2])
    function = torch.ops.segmenter_fast.unit_rows if x.device.type == "cpu" else reference.unit_rows
    return function(x.detach(), weight.detach(), None if bias is None else bias.detach(), eps, channels)


define(
    "unit_rows(Tensor x, Tensor weight, Tensor? bias, float eps, SymInt channels) -> Tensor",
    triton=None,
    plain=cpu_unit_rows,
    fake=lambda x, weight, bias, eps, channels: x.new_empty((*x.shape[:2], channels)),
)


def best_match(a: Tensor, b: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The row of ``b`` with which each row of ``a`` has the largest scalar product.

    Args:
        a: ``(B, S, D)`` floating point; any strides but the last, which is 1.
        b: ``(B, T, D)`` in the dtype of ``a``, T at least 1; the same of strides.
        lengths: ``(B,)`` int64 or int32: only the first ``lengths[i]`` rows of ``b[i]`` take part.

    Returns:
        The products ``(B, S)``, float32 (float64 for float64), and the rows of ``b``, ``(B, S)`` int64. Ties go to the
        lowest row. A product that is NaN never matches; where none is left, the product is -inf and the row 0. Not
        differentiable.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is allowed.
    """
    if a.ndim != 3 or b.ndim != 3 or a.shape[::2] != b.shape[::2]:
        given = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"a (B, S, D) and b (B, T, D) must share B and D, got {given}")
    if b.shape[1] < 1 or b.shape[2] < 1:
        raise ValueError(f"b must have at least one row and one column, got {tuple(b.shape)}")
    require_dtype("a", a, *FLOATS)
    if a.dtype != b.dtype:
        raise TypeError(f"a and b must share a dtype, got {a.dtype} and {b.dtype}")
    for name, tensor in (("a", a), ("b", b)):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} must have a last stride of 1, got strides {tensor.stride()}")
    if lengths is not None:
        require_dtype("lengths", lengths, torch.int64, torch.int32)
        if lengths.shape != a.shape[:1]:
            raise ValueError(f"lengths must be ({a.shape[0]},), got {tuple(lengths.shape)}")
    require_one_device(a=a, b=b, lengths=lengths)
    return torch.ops.segmenter_fast.best_match(a.detach(), b.detach(), lengths)


define(
    "best_match(Tensor a, Tensor b, Tensor? lengths) -> (Tensor, Tensor)",
    triton=".gpu.best_match:best_match",
    plain=cpu.best_match,
    fake=lambda a, b, lengths: (
        a.new_empty(a.shape[:2], dtype=statistics_dtype(a.dtype)),
        a.new_empty(a.shape[:2], dtype=torch.int64),
    ),
)


def bipartite_groups(
    value: Tensor, match: Tensor, tokens: int, merged: int | None, prefix: int = 0, threshold: float | None = None
) -> Tensor:
    """Groups of tokens, of which those at odd positions may merge into their match among those at even positions.

    Args:
        value: ``(B, tokens // 2)`` floating point: similarity of each token at an odd position and its match.
        match: ``(B, tokens // 2)`` int64: the match's rank among the tokens at even positions, which is not checked.
        tokens: their number, without the prefix.
        merged: number of tokens that merge in each image: those with the largest values, of equal ones the first. NaN
            comes last.
        prefix: number of tokens before all others that never merge.
        threshold: instead of ``merged``, which is then None: tokens with a larger value merge.

    Returns:
        ``(B, prefix + tokens)`` int64: the group of each token. Groups are numbered by their token at an even position
        or, of those without one, by their only token, in the order of the tokens. There are ``prefix + tokens -
        merged`` of them; with a threshold, as many as the largest entry of an image tells.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is allowed.
    """
    if tokens < 1 or prefix < 0:
        raise ValueError(f"tokens must be at least 1 and prefix at least 0, got {tokens} and {prefix}")
    if value.ndim != 2 or value.shape[1] != tokens // 2 or value.shape != match.shape:
        given = f"{tuple(value.shape)} and {tuple(match.shape)}"
        raise ValueError(f"value and match must be (B, tokens // 2), here (B, {tokens // 2}), got {given}")
    require_dtype("value", value, *FLOATS)
    require_dtype("match", match, torch.int64)
    require_one_device(value=value, match=match)
    if (merged is None) == (threshold is None):
        raise ValueError(f"give merged or threshold, got merged={merged} and threshold={threshold}")
    if merged is not None and not 0 <= merged <= tokens // 2:
        raise ValueError(f"merged must be in [0, tokens // 2], here [0, {tokens // 2}], got {merged}")
    return torch.ops.segmenter_fast.bipartite_groups(value.detach(), match, tokens, merged, prefix, threshold)


define(
    "bipartite_groups(Tensor value, Tensor match, SymInt tokens, SymInt? merged, SymInt prefix, float? threshold)"
    " -> Tensor",
    triton=".gpu.bipartite_groups:bipartite_groups",
    plain=cpu.bipartite_groups,
    fake=lambda value, match, tokens, merged, prefix, threshold: match.new_empty((match.shape[0], prefix + tokens)),
)


def merge_tokens(tokens: Tensor, index: Tensor, groups: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weighted means of the tokens of each group.

    Args:
        tokens: ``(B, M, D)`` floating point, any strides.
        index: ``(B, M)`` int64: the group of each token, in [0, groups), which is not checked on a GPU.
        groups: their number.
        weights: ``(B, M)`` floating point; ones if not given.

    Returns:
        The means ``(B, groups, D)`` in the dtype of ``tokens``, zero for a group without tokens or weight, and the sums
        of the weights ``(B, groups)``, float32 (float64 for float64 tokens). The means are summed in the dtype of the
        sums, always in one order, and are differentiable in ``tokens``.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is allowed.
        NotImplementedError: forward-mode differentiation.
    """
    if tokens.ndim != 3 or index.shape != tokens.shape[:2]:
        given = f"{tuple(tokens.shape)} and {tuple(index.shape)}"
        raise ValueError(f"tokens (B, M, D) and index (B, M) must share B and M, got {given}")
    require_dtype("tokens", tokens, *FLOATS)
    require_dtype("index", index, torch.int64)
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    require_one_device(tokens=tokens, index=index, weights=weights)
    if weights is not None:
        if weights.shape != index.shape:
            raise ValueError(f"weights must be (B, M), here {tuple(index.shape)}, got {tuple(weights.shape)}")
        require_dtype("weights", weights, *FLOATS)
        if weights.requires_grad:
            raise ValueError("weights require a gradient, which merge_tokens does not compute; give weights.detach()")
    refuse_forward_mode("merge_tokens", tokens)
    return torch.ops.segmenter_fast.merge_tokens(tokens, index, groups, weights)


def _setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    _, index, _, weights = inputs
    ctx.save_for_backward(index, weights, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        index, weights, _ = ctx.saved_tensors
        zeros = grad.new_zeros((*index.shape, grad.shape[2]), requires_grad=True)  # the means are linear in the tokens
        plain = partial(reference.merge_tokens, index=index, groups=grad.shape[1], weights=weights)
        return *differentiable_gradients(lambda tokens: plain(tokens)[0], grad, zeros), None, None, None
    return torch.ops.segmenter_fast.merge_tokens_backward(grad, *ctx.saved_tensors), None, None, None


define(
    "merge_tokens(Tensor tokens, Tensor index, SymInt groups, Tensor? weights) -> (Tensor, Tensor)",
    triton=".gpu.merge_tokens:merge_tokens",
    plain=cpu.merge_tokens,
    fake=lambda tokens, index, groups, weights: (
        tokens.new_empty((tokens.shape[0], groups, tokens.shape[2])),
        tokens.new_empty((tokens.shape[0], groups), dtype=statistics_dtype(tokens.dtype)),
    ),
    setup_context=_setup_context,
    backward=_backward,
)
define(
    "merge_tokens_backward(Tensor grad, Tensor index, Tensor? weights, Tensor sizes) -> Tensor",
    triton=".gpu.merge_tokens:merge_tokens_backward",
    plain=cpu.merge_tokens_backward,
    fake=lambda grad, index, weights, sizes: grad.new_empty((*index.shape, grad.shape[2])),
)
