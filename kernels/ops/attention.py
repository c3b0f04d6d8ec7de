"""``attention``: checks, registration, first derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..library import autocast_dtype, define, differentiable, once_differentiable

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def attention(qkv: Tensor, scale: float | None = None) -> Tensor:
    """Non-causal softmax attention on a packed projection.

    Args:
        qkv: ``(B, N, 3, H, D)``, the reshaped output of the qkv Linear; any strides but the last, which is 1.
        scale: factor of the scores; ``D ** -0.5`` if not given.

    Returns:
        ``(B, N, H, D)``, contiguous, in the dtype of ``qkv`` (under autocast in autocast's dtype). The gradient
        of ``qkv`` is one packed buffer.

    Raises:
        ValueError: wrong rank or a third dimension other than 3, or a last stride other than 1.
        TypeError: a dtype that is not floating point.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must be (B, N, 3, H, D), got {tuple(qkv.shape)}")
    if qkv.dtype not in _FLOATS:
        raise TypeError(f"qkv must be float32, bfloat16, float16 or float64, got {qkv.dtype}")
    if qkv.shape[-1] > 1 and qkv.stride(-1) != 1:
        raise ValueError(f"qkv must have a last stride of 1, got strides {qkv.stride()}; call .contiguous() on it")
    cast = autocast_dtype(qkv)
    if cast is not None and qkv.dtype == torch.float32:
        qkv = qkv.to(cast)
    with_lse = torch.is_grad_enabled() and qkv.requires_grad
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.segmenter_fast.attention(qkv, scale, with_lse)[0]


def _fake(qkv: Tensor, scale: float, with_lse: bool) -> tuple[Tensor, Tensor]:
    b, n, _, heads, dim = qkv.shape
    statistics = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    lse_shape = (b, heads, n) if with_lse else (0,)
    return qkv.new_empty((b, n, heads, dim)), qkv.new_empty(lse_shape, dtype=statistics)


def _fake_backward(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    qkv, ctx.scale, with_lse = inputs
    if with_lse:
        ctx.save_for_backward(qkv, *output)
        ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.segmenter_fast.attention_backward(grad_out, *ctx.saved_tensors, ctx.scale), None, None


define(
    "attention(Tensor qkv, float scale, bool with_lse) -> (Tensor, Tensor)",
    triton=".attention:attention_forward",
    plain=".cpu.attention:attention_forward",
    fake=_fake,
)
define(
    "attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, float scale) -> Tensor",
    triton=".attention:attention_backward",
    plain=".cpu.attention:attention_backward",
    fake=_fake_backward,
)
differentiable("attention", _backward, _setup_context)
once_differentiable("attention_backward")
