"""Linear layers whose float32 products, also those of their gradients, oneDNN computes where it is faster.

PyTorch runs MKL, which leaves AVX512 unused on AMD. oneDNN reads the weights, and in the backward their transpose,
where they lie: nothing is packed or copied. Two cores of an AMD EPYC (Zen 5), 1025 x 384 x 1152, oneDNN and MKL: 1.9
and 4.1 ms, gradient of the input 1.8 and 4.1, of the weights 2.4 and 4.2.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.cpu.native import has_feature
from .lazy_functions import is_transformed

_LEAST = 1 << 23  # multiplications; MKL is as fast at fewer, and faster at the gradients of narrow layers
_LEAST_FEATURES = 64
_PLAIN = (Tensor, nn.Parameter)


@cache
def onednn_beats_mkl() -> bool:
    """True on AMD processors with AVX512."""
    uses_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512") and torch.backends.mkldnn.is_available()
    return uses_avx512 and has_feature("sse4a")  # Intel never had SSE4a


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, by oneDNN where that is faster."""
    if not _is_faster(x, weight):
        return F.linear(x, weight, bias)
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    return _Linear.apply(x, weight, bias) if grad else _product(x, weight, bias)


def _is_faster(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling() or type(x) not in _PLAIN or type(weight) not in _PLAIN or not onednn_beats_mkl():
        return False
    if x.dtype != torch.float32 or weight.dtype != x.dtype or x.device.type != "cpu" or x.layout != torch.strided:
        return False
    outputs, inputs = weight.shape
    enough = x.numel() * outputs >= _LEAST and min(inputs, outputs) >= _LEAST_FEATURES
    fits = x.ndim > 1 and x.shape[-1] == inputs and enough
    changed = torch.is_autocast_enabled("cpu") or torch.jit.is_tracing() or is_transformed()
    return fits and not changed and weight.device == x.device and torch._C._get_mkldnn_enabled()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``(..., I), (O, I), (O,)`` -> ``(..., O)``."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(_matrix(x), _matrix(weight), bias, "none", [], "")
    return out.view(*x.shape[:-1], -1)


def _matrix(x: Tensor) -> Tensor:
    """``(rows, I)`` with a stride of 1 and no values that share memory."""
    x = x.reshape(-1, x.shape[-1])
    (rows, columns), (down, across) = x.shape, x.stride()
    return x if (across == 1 and down >= columns) or (down == 1 and across >= rows) else x.contiguous()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        # A graph of its own, or several gradients at once (is_grads_batched).
        plain = torch.is_grad_enabled() or is_transformed() or torch._C._functorch.is_legacy_batchedtensor(grad)
        product = F.linear if plain else _product
        grad_rows, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        return (
            product(grad, weight.T) if ctx.needs_input_grad[0] else None,
            product(grad_rows.T, rows.T) if ctx.needs_input_grad[1] else None,
            grad_rows.sum(0) if ctx.needs_input_grad[2] else None,
        )
