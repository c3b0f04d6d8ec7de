"""Attention on a CPU: C++ of ``attention.cpp`` and ``attention_backward.cpp``, elsewhere PyTorch's flash kernel.

The flash kernel takes ``(B, H, N, D)`` tensors of any strides with a last stride of 1, so neither the split into q, k
and v nor the transposes copy anything. Devices without it, and empty tensors, take matrix products and softmax.

Two cores of an AMD EPYC (Zen 5), heads of 64, this and the flash kernel: 4097 tokens, 6 heads 56 and 140 ms; 1025
tokens, 12 heads 7.2 and 17.8 ms; 257 tokens, 6 heads 0.26 and 0.61 ms; in bfloat16 34 and 149, 4.5 and 19, 0.16 and
0.73 ms. Backward: 163 and 364, 21 and 46, 0.64 and 1.4 ms; in bfloat16 101 and 247, 13 and 33, 0.41 and 1.5 ms.
With AVX2 alone, PyTorch's backward takes 1.1x to 1.6x as long in float32, 1.2x to 10x in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..registry import statistics_dtype
from .native import has_feature, kernel, pointer

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# PyTorch's backward is slower in float16, and in bfloat16 up to this number of tokens, than in float32. Processor
# time on one core of a Xeon with AMX, 6 heads of 64, casts included: float16 435 ms against 346 (2 x 2305 tokens), 17
# against 11 (4 x 257); bfloat16 5.0 against 1.1 (4 x 65), 14 against 11 (4 x 257), but 23 against 24 (4 x 401).
_WIDEN_BFLOAT16_UP_TO = 320


def attention_forward(qkv: Tensor, scale: float, with_lse: bool, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``(B, N, 3, H, D)`` -> ``(B, N, H, D)`` and the log-sum-exp ``(B, H, N)``, empty if not ``with_lse``.

    ``bias`` ``(B, N)`` is added to the scores of each key.
    """
    on_cpu = qkv.device.type == "cpu" and qkv.numel() > 0
    if on_cpu and (run := _native(qkv)):
        return _run_native(run, qkv, scale, with_lse, bias)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, D) each, views
    mask = None if bias is None else bias[:, None, None]
    if not on_cpu:
        scores = (q @ k.mT).to(statistics_dtype(qkv.dtype)) * scale
        if mask is not None:
            scores = scores + mask
        lse = scores.logsumexp(-1)
        if mask is not None:  # zeros where every score is -inf
            lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        out = (scores - lse.unsqueeze(-1)).exp().to(qkv.dtype) @ v
    else:
        out, lse = _flash(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).contiguous(), lse.contiguous() if with_lse else lse.new_empty(0)


def runs_native(dtype: torch.dtype) -> bool:
    """True if attention runs the C++ kernel on this CPU. In bfloat16, AMX makes PyTorch's own kernel faster."""
    return _native(torch.empty(0, dtype=dtype)) is not None


# What torch.compiler.assume_constant_result sets, which would import the whole compiler.
runs_native._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _native(qkv: Tensor, name: str = "attention") -> Callable[..., None] | None:
    return None if qkv.dtype == torch.bfloat16 and has_feature("amx_tile") else kernel(qkv, name)


def _run_native(
    run: Callable[..., None], qkv: Tensor, scale: float, with_lse: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    b, n, _, heads, dim = qkv.shape
    qkv, bias = _operands(qkv, bias)
    if not scale > 1e-20:  # the kernel divides the bias by it and looks for the largest product
        qkv, scale = torch.cat([qkv[:, :, :1] * scale, qkv[:, :, 1:]], 2), 1.0
    out = qkv.new_empty(b, n, heads, dim)
    lse = qkv.new_empty((b, heads, n) if with_lse else 0, dtype=torch.float32)
    pointers = map(pointer, (qkv, bias, out, lse if with_lse else None))
    run(*pointers, *_sizes(qkv), scale)
    return out, lse


def _operands(qkv: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both as the kernels read them: ``qkv`` with a last stride of 1, a contiguous bias in float32."""
    qkv = qkv if qkv.shape[-1] == 1 or qkv.stride(-1) == 1 else qkv.contiguous()
    return qkv, None if bias is None else bias.float().contiguous()


def _sizes(qkv: Tensor) -> tuple[int, ...]:
    b, n, _, heads, dim = qkv.shape
    return (b, n, heads, dim, *qkv.stride()[:4], qkv.dtype == torch.bfloat16, torch.get_num_threads())


def attention_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """Gradient of ``qkv`` as one packed ``(B, N, 3, H, D)`` buffer."""
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    on_cpu = qkv.device.type == "cpu" and qkv.numel() > 0
    if on_cpu and (run := _native(qkv, "attention_backward")):
        qkv, bias = _operands(qkv, bias)
        given = (grad_out.contiguous(), out.contiguous(), qkv, lse.contiguous(), bias, grad_qkv)
        run(*map(pointer, given), *_sizes(qkv), scale)
        return grad_qkv
    short = qkv.dtype == torch.bfloat16 and qkv.shape[1] <= _WIDEN_BFLOAT16_UP_TO
    if qkv.device.type == "cpu" and (short or qkv.dtype == torch.float16):
        grad_out, qkv, out = grad_out.float(), qkv.float(), out.float()
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    grad_out, out = grad_out.transpose(1, 2), out.transpose(1, 2)
    mask = None if bias is None else bias[:, None, None]
    if not on_cpu:
        scores = (q @ k.mT).to(lse.dtype) * scale
        p = ((scores if mask is None else scores + mask) - lse.unsqueeze(-1)).exp()
        delta = (grad_out * out).to(lse.dtype).sum(-1, keepdim=True)
        grad_scores = (p * ((grad_out @ v.mT).to(lse.dtype) - delta) * scale).to(qkv.dtype)
        grads = (grad_scores @ k, grad_scores.mT @ q, p.to(qkv.dtype).mT @ grad_out)
    else:
        grads = _flash_backward(grad_out, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale)
    for index, grad in enumerate(grads):
        grad_qkv[:, :, index] = grad.transpose(1, 2)
    return grad_qkv
