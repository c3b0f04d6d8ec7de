"""``attention``: argument checks, registration, derivatives."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..cpu import attention as cpu
from ..registry import (
    FLOATS,
    autocast_dtype,
    define,
    differentiable_gradients,
    library,
    refuse_forward_mode,
    require_dtype,
    require_one_device,
    statistics_dtype,
)


def attention(qkv: Tensor, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """Non-causal softmax attention on a packed projection.

    Args:
        qkv: ``(B, N, 3, H, D)``, the reshaped output of the qkv Linear; any strides but the last, which is 1.
        scale: factor of the scores; ``D ** -0.5`` if not given.
        bias: ``(B, N)``, any floating point dtype: added to the scaled scores of each key, in every head and for every
            query. -inf leaves a key out; where all keys are left out, the output is zero. The logarithm of the size of
            a key's group makes attention proportional (Bolya et al., Token Merging, ICLR 2023).

    Returns:
        ``(B, N, H, D)``, contiguous, in the dtype of ``qkv`` (under autocast in autocast's dtype). The gradient
        of ``qkv`` is one packed buffer.

    Raises:
        ValueError: wrong rank or a third dimension other than 3, a last stride other than 1, a bias of another shape or
            device or one that requires a gradient, which it does not get, or, where Triton runs, a head size other than
            16, 32, 64, 80, 96 and 128.
        TypeError: a dtype that is not floating point; float64, where Triton runs.
        NotImplementedError: forward-mode differentiation.

    NVIDIA GPUs before compute capability 8.0 run PyTorch's ``scaled_dot_product_attention``, because the Triton kernels
    spill thousands of registers there.

    ``torch.func.vmap`` folds its dimension into the batch. PyTorch refuses ``torch.func.grad`` for every operator with
    a registered derivative; ``torch.autograd.grad`` computes the same, also around ``vmap``.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3 or qkv.shape[4] < 1:
        raise ValueError(f"qkv must be (B, N, 3, H, D), D at least 1, got {tuple(qkv.shape)}")
    require_dtype("qkv", qkv, *FLOATS)
    if qkv.shape[-1] > 1 and qkv.stride(-1) != 1:
        raise ValueError(f"qkv must have a last stride of 1, got strides {qkv.stride()}; call .contiguous() on it")
    refuse_forward_mode("attention", qkv)
    qkv = qkv.to(autocast_dtype(qkv) or qkv.dtype)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    if bias is not None:
        bias = _checked_bias(qkv, bias)
    if qkv.is_cuda and _before_ampere(qkv.device):
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, D) each
        mask = None if bias is None else bias.to(qkv.dtype).view(len(q), 1, 1, -1).expand(-1, -1, qkv.shape[1], -1)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2).contiguous()
    with_lse = torch.is_grad_enabled() and qkv.requires_grad
    return torch.ops.segmenter_fast.attention(qkv, scale, with_lse, bias)[0]


def _checked_bias(qkv: Tensor, bias: Tensor) -> Tensor:
    """The bias in the dtype of statistics, contiguous."""
    if bias.shape != qkv.shape[:2]:
        raise ValueError(f"bias must be (B, N), here {tuple(qkv.shape[:2])}, got {tuple(bias.shape)}")
    require_dtype("bias", bias, *FLOATS)
    require_one_device(qkv=qkv, bias=bias)
    if bias.requires_grad:
        raise ValueError("bias requires a gradient, which attention does not compute; give bias.detach()")
    return bias.to(statistics_dtype(qkv.dtype)).contiguous()


_capability = cache(torch.cuda.get_device_capability)


def _before_ampere(device: torch.device) -> bool:
    return torch.version.hip is None and _capability(device) < (8, 0)


# What torch.compiler.assume_constant_result sets. That function imports the whole compiler.
_before_ampere._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _fake(qkv: Tensor, scale: float, with_lse: bool, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    b, n, _, heads, dim = qkv.shape
    lse_shape = (b, heads, n) if with_lse else (0,)
    return qkv.new_empty((b, n, heads, dim)), qkv.new_empty(lse_shape, dtype=statistics_dtype(qkv.dtype))


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    qkv, ctx.scale, with_lse, bias = inputs
    ctx.save_for_backward(qkv, bias, *(output if with_lse else ()))
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    qkv, bias, *saved = ctx.saved_tensors
    if torch.is_grad_enabled():
        plain = partial(reference.attention, scale=ctx.scale, bias=bias)
        return *differentiable_gradients(plain, grad_out, qkv), None, None, None
    # Nothing was saved inside torch.func.vmap, where a tensor does not report that it requires a gradient.
    out, lse = saved or torch.ops.segmenter_fast.attention(qkv, ctx.scale, True, bias)
    grad = torch.ops.segmenter_fast.attention_backward(grad_out, qkv, out, lse, ctx.scale, bias)
    return grad, None, None, None


def _fold(info: Any, dim: int | None, tensor: Tensor | None) -> Tensor | None:
    """Make the vmapped dimension the outer part of the batch."""
    if tensor is None:
        return None
    tensor = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1).contiguous()


def _unfold(info: Any, tensor: Tensor) -> Tensor:
    return tensor.unflatten(0, (info.batch_size, tensor.shape[0] // info.batch_size))


def _vmap(info: Any, in_dims: Any, qkv: Tensor, scale: float, with_lse: bool, bias: Tensor | None = None) -> Any:
    bias = _fold(info, in_dims[3] if len(in_dims) > 3 else None, bias)
    out, lse = torch.ops.segmenter_fast.attention(_fold(info, in_dims[0], qkv), scale, with_lse, bias)
    return ((_unfold(info, out), _unfold(info, lse)), (0, 0)) if with_lse else ((_unfold(info, out), lse), (0, None))


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    grad_out, qkv, out, lse, bias = (
        _fold(info, in_dims[n] if n < len(in_dims) else None, args[n] if n < len(args) else None)
        for n in (0, 1, 2, 3, 5)
    )
    return _unfold(info, torch.ops.segmenter_fast.attention_backward(grad_out, qkv, out, lse, args[4], bias)), 0


# The second result is the log-sum-exp as the backward of the same backend takes it: natural on the CPU, to base 2 from
# Triton.
define(
    "attention(Tensor qkv, float scale, bool with_lse, Tensor? bias=None) -> (Tensor, Tensor)",
    triton=".gpu.attention_forward:attention_forward",
    plain=cpu.attention_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
define(
    "attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, float scale, Tensor? bias=None) -> Tensor",
    triton=".gpu.attention_backward:attention_backward",
    plain=cpu.attention_backward,
    fake=lambda grad_out, qkv, out, lse, scale, bias=None: qkv.new_empty(qkv.shape),
)
torch.library.register_vmap("segmenter_fast::attention", _vmap, lib=library)
torch.library.register_vmap("segmenter_fast::attention_backward", _vmap_backward, lib=library)
