"""Attention through PyTorch's flash kernel for the CPU, forward and backward, on views of the packed projection.

The kernel takes ``(B, H, N, D)`` tensors of any strides with a last stride of 1, so neither the split into q, k and v
nor the transposes copy anything; the views cost 1 to 2 % over contiguous q, k and v. The kernel distributes batch,
heads and query blocks over the cores. Devices without it, and empty tensors, take matrix products and softmax.

Its products are MKL's. Products by blocks of queries are slower than the kernel where they are MKL's, too. Processor
time at 4097 tokens, 2 heads of 64, one core of a Xeon with AMX: 57 ms against 24 in bfloat16 (its two products alone
take 22, as contractions over 64 do not reach AMX's rate), 94 against 70 in float32; backward 197 against 119. On an AMD
processor MKL leaves AVX512 unused, and oneDNN's products by blocks win: see ``_by_blocks``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ..registry import statistics_dtype

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# The kernel's backward is slower in float16, and in bfloat16 up to this number of tokens, than in float32. Processor
# time on one core of a Xeon with AMX, 6 heads of 64, casts included: float16 435 ms against 346 (2 x 2305 tokens), 17
# against 11 (4 x 257); bfloat16 5.0 against 1.1 (4 x 65), 14 against 11 (4 x 257), but 23 against 24 (4 x 401).
_WIDEN_BFLOAT16_UP_TO = 320

_BLOCKS_FROM = 384  # tokens
_BLOCK = 512  # queries
_PACKED_FROM = 5  # blocks of queries; packing keys and values once for them takes 0.2 ms
_BLOCK_SCORES = 1 << 21
_BLOCK_DTYPES = (torch.float32, torch.bfloat16)


def attention_forward(qkv: Tensor, scale: float, with_lse: bool, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``(B, N, 3, H, D)`` -> ``(B, N, H, D)`` and the log-sum-exp ``(B, H, N)``, empty if not ``with_lse``.

    ``bias`` ``(B, N)`` is added to the scores of each key.
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, D) each, views
    mask = None if bias is None else bias[:, None, None]
    if qkv.numel() == 0 or qkv.device.type != "cpu":
        scores = (q @ k.mT).to(statistics_dtype(qkv.dtype)) * scale
        if mask is not None:
            scores = scores + mask
        lse = scores.logsumexp(-1)
        if mask is not None:  # zeros where every score is -inf
            lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        out = (scores - lse.unsqueeze(-1)).exp().to(qkv.dtype) @ v
    elif not with_lse and blocks_win(qkv.shape[1], qkv.dtype):
        return _by_blocks(qkv, scale, bias), qkv.new_empty(0, dtype=torch.float32)
    elif not with_lse and (whole := _whole_blocks(qkv)):
        parts = (_flash(part, k, v, attn_mask=mask, scale=scale)[0] for part in (q[:, :, :whole], q[:, :, whole:]))
        return torch.cat([part.transpose(1, 2) for part in parts], 1), qkv.new_empty(
            0, dtype=statistics_dtype(qkv.dtype)
        )
    else:
        out, lse = _flash(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).contiguous(), lse.contiguous() if with_lse else lse.new_empty(0)


def blocks_win(tokens: int, dtype: torch.dtype) -> bool:
    """True if attention without gradients runs ``_by_blocks`` on this CPU, faster than PyTorch's attention."""
    return tokens >= _BLOCKS_FROM and dtype in _BLOCK_DTYPES and onednn_beats_mkl()


def onednn_beats_mkl() -> bool:
    """True on AMD processors with AVX512, which oneDNN uses and MKL does not: their float32 products differ by 2.2x."""
    return _uses_avx512_of_amd()


# What torch.compiler.assume_constant_result sets, which would import the whole compiler.
onednn_beats_mkl._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _uses_avx512_of_amd() -> bool:
    uses_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512") and torch.backends.mkldnn.is_available()
    features = getattr(torch.cpu, "get_capabilities", None)
    return uses_avx512 and features is not None and bool(features().get("sse4a"))  # Intel never had SSE4a


def _whole_blocks(qkv: Tensor) -> int:
    """Queries of the first of two calls of the flash kernel that share the work among threads more evenly, or 0.

    The kernel gives each thread as many blocks of 256 queries (64 below 768) as the others, head by head. At 2^k + 1
    tokens the last block of a head is one query: of 3 heads of 1025 tokens, one of two threads gets 7 of 12 whole ones.
    """
    b, n, _, heads, _ = qkv.shape
    block = 256 if n >= 768 else 64
    few = 0 < n % block <= block // 8 and n >= 192
    return n - n % block if few and b * heads % torch.get_num_threads() else 0


def _by_blocks(qkv: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """``(B, N, 3, H, D)`` -> ``(B, N, H, D)`` by oneDNN's float32 products, head by head, some queries at a time.

    Two cores of an AMD EPYC (Zen 5), float32, heads of 64, this and the flash kernel: 1025 tokens 3.0 and 5.1 ms (3
    heads), 6.0 and 8.9 (6 heads); 4097 tokens 81 and 134 (6 heads), and packing saves a tenth more; no gain at 257.
    """
    product = torch.ops.mkldnn._linear_pointwise  # of (n, D) and (m, D): (n, m)
    pack = torch.ops.mkldnn._reorder_linear_weight
    b, n, _, heads, dim = qkv.shape
    out = qkv.new_empty(b, n, heads, dim)
    blocks = -(-n // min(_BLOCK, max(_BLOCK_SCORES // n, 1)))
    size = -(-n // blocks)
    biases: Sequence[Tensor | None] = [None] * b if bias is None else bias.contiguous().unbind()
    for image, result, added in zip(qkv.float(), out, biases, strict=True):
        if added is not None and bool((added == -torch.inf).all()):
            result.zero_()
            continue
        for head in range(heads):
            q, k = image[:, 0, head] * scale, image[:, 1, head].contiguous()
            values = image[:, 2, head].T.contiguous()
            if blocks >= _PACKED_FROM:
                k, values = pack(k, size), pack(values, size)
            for rows, into in zip(q.split(size), result[:, head].split(size), strict=True):
                scores = product(rows, k, added, "none", [], "")
                into.copy_(product(torch.softmax(scores, 1, out=scores), values, None, "none", [], ""))
    return out


def attention_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """Gradient of ``qkv`` as one packed ``(B, N, 3, H, D)`` buffer."""
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    short = qkv.dtype == torch.bfloat16 and qkv.shape[1] <= _WIDEN_BFLOAT16_UP_TO
    if qkv.device.type == "cpu" and (short or qkv.dtype == torch.float16):
        grad_out, qkv, out = grad_out.float(), qkv.float(), out.float()
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    grad_out, out = grad_out.transpose(1, 2), out.transpose(1, 2)
    mask = None if bias is None else bias[:, None, None]
    if qkv.numel() == 0 or qkv.device.type != "cpu":
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
