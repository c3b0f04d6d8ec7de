"""``attention``: argument checks, registration, first derivative."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..cpu import attention as cpu
from ..registry import (
    FLOATS,
    autocast_dtype,
    define,
    derivative_error,
    dtype_error,
    library,
    no_second_derivative,
    statistics_dtype,
)


def attention(qkv: Tensor, scale: float | None = None) -> Tensor:
    """Non-causal softmax attention on a packed projection.

    Args:
        qkv: ``(B, N, 3, H, D)``, the reshaped output of the qkv Linear; any strides but the last, which is 1.
        scale: factor of the scores; ``D ** -0.5`` if not given.

    Returns:
        ``(B, N, H, D)``, contiguous, in the dtype of ``qkv`` (under autocast in autocast's dtype). The gradient
        of ``qkv`` is one packed buffer.

    Raises:
        ValueError: wrong rank or a third dimension other than 3, a last stride other than 1, or, where Triton runs,
            a head size other than 16, 32, 64, 80, 96 and 128.
        TypeError: a dtype that is not floating point; float64, where Triton runs.
        NotImplementedError: a second derivative, or forward-mode differentiation.

    NVIDIA GPUs before compute capability 8.0 run PyTorch's ``scaled_dot_product_attention``, because the Triton kernels
    spill thousands of registers there.

    ``torch.func.vmap`` folds its dimension into the batch. PyTorch refuses ``torch.func.grad`` for every operator with
    a registered derivative; ``torch.autograd.grad`` computes the same, also around ``vmap``.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must be (B, N, 3, H, D), got {tuple(qkv.shape)}")
    if qkv.dtype not in FLOATS:
        raise dtype_error("qkv", qkv, FLOATS)
    if qkv.shape[-1] > 1 and qkv.stride(-1) != 1:
        raise ValueError(f"qkv must have a last stride of 1, got strides {qkv.stride()}; call .contiguous() on it")
    if forward_ad.unpack_dual(qkv).tangent is not None:
        raise derivative_error("attention", "forward-mode")
    qkv = qkv.to(autocast_dtype(qkv) or qkv.dtype)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    if qkv.is_cuda and _before_ampere(qkv.device):
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, D) each
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()
    with_lse = torch.is_grad_enabled() and qkv.requires_grad
    return torch.ops.segmenter_fast.attention(qkv, scale, with_lse)[0]


_capability = cache(torch.cuda.get_device_capability)


def _before_ampere(device: torch.device) -> bool:
    return torch.version.hip is None and _capability(device) < (8, 0)


# What torch.compiler.assume_constant_result sets. That function imports the whole compiler.
_before_ampere._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _fake(qkv: Tensor, scale: float, with_lse: bool) -> tuple[Tensor, Tensor]:
    b, n, _, heads, dim = qkv.shape
    lse_shape = (b, heads, n) if with_lse else (0,)
    return qkv.new_empty((b, n, heads, dim)), qkv.new_empty(lse_shape, dtype=statistics_dtype(qkv.dtype))


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    qkv, ctx.scale, with_lse = inputs
    ctx.save_for_backward(qkv, *(output if with_lse else ()))
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, None, None]:
    qkv, *saved = ctx.saved_tensors
    # Nothing was saved inside torch.func.vmap, where a tensor does not report that it requires a gradient.
    out, lse = saved or torch.ops.segmenter_fast.attention(qkv, ctx.scale, True)
    return torch.ops.segmenter_fast.attention_backward(grad_out, qkv, out, lse, ctx.scale), None, None


def _fold(info: Any, dim: int | None, tensor: Tensor) -> Tensor:
    """Make the vmapped dimension the outer part of the batch."""
    tensor = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1).contiguous()


def _unfold(info: Any, tensor: Tensor) -> Tensor:
    return tensor.unflatten(0, (info.batch_size, tensor.shape[0] // info.batch_size))


def _vmap(info: Any, in_dims: Any, qkv: Tensor, scale: float, with_lse: bool) -> Any:
    out, lse = torch.ops.segmenter_fast.attention(_fold(info, in_dims[0], qkv), scale, with_lse)
    return ((_unfold(info, out), _unfold(info, lse)), (0, 0)) if with_lse else ((_unfold(info, out), lse), (0, None))


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    *tensors, scale = args
    folded = (_fold(info, dim, tensor) for dim, tensor in zip(in_dims[:-1], tensors, strict=True))
    return _unfold(info, torch.ops.segmenter_fast.attention_backward(*folded, scale)), 0


# The second result is the log-sum-exp as the backward of the same backend takes it: natural on the CPU, to base 2 from
# Triton.
define(
    "attention(Tensor qkv, float scale, bool with_lse) -> (Tensor, Tensor)",
    triton=".gpu.attention_forward:attention_forward",
    plain=cpu.attention_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
define(
    "attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, float scale) -> Tensor",
    triton=".gpu.attention_backward:attention_backward",
    plain=cpu.attention_backward,
    fake=lambda grad_out, qkv, out, lse, scale: qkv.new_empty(qkv.shape),
    backward=no_second_derivative("attention"),
)
torch.library.register_vmap("segmenter_fast::attention", _vmap, lib=library)
torch.library.register_vmap("segmenter_fast::attention_backward", _vmap_backward, lib=library)
