"""Attention backward in Triton.

With p = exp(q k^T * scale - lse), by exp2, dO = ``grad_out`` and O = ``out`` (shapes as in ``attention_forward``):
    delta_i = dO_i . O_i        ds = p * (dO v^T - delta)
    dv = p^T dO                 dk = ds^T q * scale              dq = ds k * scale
Two passes without atomics: each program owns what it writes, so that equal input gives equal bits. A program of the
first pass owns BLOCK_M queries, computes delta (saved for the second) and visits the keys for dq; one of the second
owns BLOCK_N keys and visits the queries for dk and dv. Both compute p again from the saved log-sum-exp. The gradients
are the three slices of one contiguous ``(B, N, 3, H, D)`` buffer.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_forward import (
    TAIL,
    Tiles,
    add_product,
    check,
    fills,
    load_at,
    load_bias,
    load_rows,
    locate,
    qkv_strides,
    row_pointers,
    store_rows,
    table_arch,
    tail,
)
from .common import (
    LOG2_E,
    TRITON_3_6,
    cdiv,
    device_arch,
    dot_precision,
    launch_arguments,
    next_power_of_2,
    processors,
    programs,
)


@triton.jit
def _add_keys(
    dq, q, grad_out, lse, delta, k_ptr, v_ptr, bias_ptr, start, stride_n, seq_len, scale_log2,
    ROWS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to ``dq``, not yet scaled, the share of ROWS keys."""
    k = load_rows(k_ptr, start, stride_n, seq_len, ROWS, DIM, PAD, EDGE)
    v = load_rows(v_ptr, start, stride_n, seq_len, ROWS, DIM, PAD, EDGE)
    scores = tl.dot(q, k.T, input_precision=PRECISION) * scale_log2  # (BLOCK_M, ROWS)
    if bias_ptr is not None:
        scores += load_bias(bias_ptr, start, seq_len, ROWS, EDGE)[None, :]
    p = tl.exp2(scores - lse[:, None])
    ds = p * (tl.dot(grad_out, v.T, input_precision=PRECISION) - delta[:, None])
    if EDGE:
        ds = tl.where(start + tl.arange(0, ROWS)[None, :] < seq_len, ds, 0.0)
    return add_product(dq, ds.to(k.dtype), k, PRECISION)


@triton.jit
def _add_queries(
    dk, dv, k, v, bias, q_ptrs, grad_out_ptrs, lse_ptrs, delta_ptrs, start, seq_len, scale_log2,
    ROWS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to ``dk``, not yet scaled, and ``dv`` the share of ROWS queries."""
    q = load_at(q_ptrs, start, seq_len, ROWS, DIM, PAD, EDGE)
    grad_out = load_at(grad_out_ptrs, start, seq_len, ROWS, DIM, PAD, EDGE)
    mask_m = start + tl.arange(0, ROWS) < seq_len
    if EDGE:
        lse = tl.load(lse_ptrs, mask=mask_m, other=0.0)
        delta = tl.load(delta_ptrs, mask=mask_m, other=0.0)
    else:
        lse = tl.load(lse_ptrs)
        delta = tl.load(delta_ptrs)
    scores = tl.dot(k, q.T, input_precision=PRECISION) * scale_log2  # (BLOCK_N, ROWS)
    if bias is not None:
        scores += bias[:, None]
    p = tl.exp2(scores - lse[None, :])
    if EDGE:
        p = tl.where(mask_m[None, :], p, 0.0)
    dv = add_product(dv, p.to(grad_out.dtype), grad_out, PRECISION)
    ds = p * (tl.dot(v, grad_out.T, input_precision=PRECISION) - delta[None, :])
    if EDGE:  # an infinite value times the zeros of a missing row would be NaN
        ds = tl.where(mask_m[None, :], ds, 0.0)
    return add_product(dk, ds.to(q.dtype), q, PRECISION), dv


@triton.jit(do_not_specialize=["seq_len", "heads"])
def attention_backward_queries_kernel(
    grad_out_ptr,  # (B, N, H, D)
    qkv_ptr,  # (B, N, 3, H, D)
    out_ptr,  # (B, N, H, D), contiguous
    lse_ptr,  # (B, H, N), contiguous, to base 2
    bias_ptr,  # (B, N), contiguous, or None
    delta_ptr,  # (B, H, N), contiguous, written
    grad_qkv_ptr,  # (B, N, 3, H, D), contiguous; the queries' slice is written
    stride_grad_b: tl.int64, stride_grad_n: tl.int64, stride_grad_h: tl.int64,
    stride_b: tl.int64, stride_n: tl.int64, stride_s: tl.int64, stride_h: tl.int64,
    seq_len, heads,
    scale,
    scale_log2,  # scale * log2(e), rounded as in the forward
    HEAD_DIM: tl.constexpr, PAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    stride_n, stride_grad_n = stride_n.to(tl.int64), stride_grad_n.to(tl.int64)
    start_m, b, h, head_index, q_ptr, k_ptr, v_ptr = locate(
        qkv_ptr, stride_b, stride_s, stride_h, seq_len, heads, BLOCK_M
    )
    stride_out = heads.to(tl.int64) * HEAD_DIM
    grad_out_ptr += b * stride_grad_b + h * stride_grad_h
    out_ptr += b * seq_len * stride_out + h * HEAD_DIM
    if bias_ptr is not None:
        bias_ptr += b * seq_len
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < seq_len

    grad_out = load_rows(grad_out_ptr, start_m, stride_grad_n, seq_len, BLOCK_M, HEAD_DIM, PAD_DIM, True)
    out = load_rows(out_ptr, start_m, stride_out, seq_len, BLOCK_M, HEAD_DIM, PAD_DIM, True)
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + head_index * seq_len + offs_m, delta, mask=mask_m)
    lse = tl.load(lse_ptr + head_index * seq_len + offs_m, mask=mask_m, other=0.0)
    q = load_rows(q_ptr, start_m, stride_n, seq_len, BLOCK_M, HEAD_DIM, PAD_DIM, True)

    dq = tl.zeros((BLOCK_M, PAD_DIM), tl.float32)
    full = seq_len // BLOCK_N * BLOCK_N
    if TAIL_N > 0:
        dq = _add_keys(
            dq, q, grad_out, lse, delta, k_ptr, v_ptr, bias_ptr, full, stride_n, seq_len, scale_log2,
            TAIL_N, HEAD_DIM, PAD_DIM, True, PRECISION,
        )  # fmt: skip
    for start in tl.range(0, full, BLOCK_N):
        dq = _add_keys(
            dq, q, grad_out, lse, delta, k_ptr, v_ptr, bias_ptr, start, stride_n, seq_len, scale_log2,
            BLOCK_N, HEAD_DIM, PAD_DIM, False, PRECISION,
        )  # fmt: skip
    dq_ptr = grad_qkv_ptr + b * seq_len * 3 * stride_out + h * HEAD_DIM
    store_rows(dq_ptr, dq * scale, start_m, 3 * stride_out, seq_len, BLOCK_M, HEAD_DIM, PAD_DIM)


@triton.jit(do_not_specialize=["seq_len", "heads"])
def attention_backward_keys_kernel(
    grad_out_ptr,  # (B, N, H, D)
    qkv_ptr,  # (B, N, 3, H, D)
    lse_ptr,  # (B, H, N), contiguous, to base 2
    bias_ptr,  # (B, N), contiguous, or None
    delta_ptr,  # (B, H, N), contiguous
    grad_qkv_ptr,  # (B, N, 3, H, D), contiguous; the slices of keys and values are written
    stride_grad_b: tl.int64, stride_grad_n: tl.int64, stride_grad_h: tl.int64,
    stride_b: tl.int64, stride_n: tl.int64, stride_s: tl.int64, stride_h: tl.int64,
    seq_len, heads,
    scale,
    scale_log2,  # scale * log2(e), rounded as in the forward
    HEAD_DIM: tl.constexpr, PAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    stride_n, stride_grad_n = stride_n.to(tl.int64), stride_grad_n.to(tl.int64)
    start_n, b, h, head_index, q_ptr, k_ptr, v_ptr = locate(
        qkv_ptr, stride_b, stride_s, stride_h, seq_len, heads, BLOCK_N
    )
    stride_out = heads.to(tl.int64) * HEAD_DIM
    grad_out_ptr += b * stride_grad_b + h * stride_grad_h
    lse_ptr += head_index * seq_len
    delta_ptr += head_index * seq_len

    k = load_rows(k_ptr, start_n, stride_n, seq_len, BLOCK_N, HEAD_DIM, PAD_DIM, True)
    v = load_rows(v_ptr, start_n, stride_n, seq_len, BLOCK_N, HEAD_DIM, PAD_DIM, True)
    bias = None
    if bias_ptr is not None:
        bias = load_bias(bias_ptr + b * seq_len, start_n, seq_len, BLOCK_N, True)
    dk = tl.zeros((BLOCK_N, PAD_DIM), tl.float32)
    dv = tl.zeros((BLOCK_N, PAD_DIM), tl.float32)
    full = seq_len // BLOCK_M * BLOCK_M
    q_ptrs = row_pointers(q_ptr, 0, stride_n, BLOCK_M, PAD_DIM)
    grad_out_ptrs = row_pointers(grad_out_ptr, 0, stride_grad_n, BLOCK_M, PAD_DIM)
    lse_ptrs, delta_ptrs = lse_ptr + tl.arange(0, BLOCK_M), delta_ptr + tl.arange(0, BLOCK_M)
    for start in tl.range(0, full, BLOCK_M):  # pointers that move on, and the rest last: fewer registers
        dk, dv = _add_queries(
            dk, dv, k, v, bias, q_ptrs, grad_out_ptrs, lse_ptrs, delta_ptrs, start, seq_len, scale_log2,
            BLOCK_M, HEAD_DIM, PAD_DIM, False, PRECISION,
        )  # fmt: skip
        q_ptrs += BLOCK_M * stride_n
        grad_out_ptrs += BLOCK_M * stride_grad_n
        lse_ptrs += BLOCK_M
        delta_ptrs += BLOCK_M
    for start in tl.range(full, seq_len, TAIL_M, num_stages=1):
        offs_m = start + tl.arange(0, TAIL_M)
        dk, dv = _add_queries(
            dk, dv, k, v, bias, row_pointers(q_ptr, start, stride_n, TAIL_M, PAD_DIM),
            row_pointers(grad_out_ptr, start, stride_grad_n, TAIL_M, PAD_DIM), lse_ptr + offs_m, delta_ptr + offs_m,
            start, seq_len, scale_log2, TAIL_M, HEAD_DIM, PAD_DIM, True, PRECISION,
        )  # fmt: skip
    dk_ptr = grad_qkv_ptr + b * seq_len * 3 * stride_out + (heads + h) * HEAD_DIM
    dv_ptr = dk_ptr + stride_out
    store_rows(dk_ptr, dk * scale, start_n, 3 * stride_out, seq_len, BLOCK_N, HEAD_DIM, PAD_DIM)
    store_rows(dv_ptr, dv, start_n, 3 * stride_out, seq_len, BLOCK_N, HEAD_DIM, PAD_DIM)


# As in the forward, for few and for many programs, but of the queries' pass and of the keys' pass. With 128 registers
# two programs of 8 warps share a multiprocessor of sm_90.
_HALF = {
    ("sm_80", False): ((Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3)), (Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 3))),
    ("sm_80", True): ((Tiles(64, 64, 4, 2), Tiles(64, 64, 8, 3)), (Tiles(64, 64, 4, 2), Tiles(64, 64, 8, 3))),
    ("sm_86", False): ((Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3)), (Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 3))),
    ("sm_86", True): ((Tiles(64, 32, 8, 3), Tiles(32, 64, 8, 3)), (Tiles(64, 32, 8, 3), Tiles(32, 64, 8, 3))),
    ("sm_90", False): ((Tiles(64, 64, 4, 3), Tiles(32, 64, 4, 3)), (Tiles(128, 64, 8, 3), Tiles(32, 128, 8, 3, 128))),
    ("sm_90", True): ((Tiles(64, 64, 4, 2), Tiles(64, 64, 8, 3)), (Tiles(128, 64, 8, 3), Tiles(64, 64, 8, 3))),
    ("sm_100", False): ((Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3)), (Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 3))),
    ("sm_100", True): ((Tiles(64, 64, 4, 3), Tiles(64, 64, 8, 3)), (Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 3))),
    ("gfx942", False): ((Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)), (Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2))),
    ("gfx942", True): ((Tiles(64, 32, 4, 2), Tiles(32, 64, 4, 2)), (Tiles(64, 32, 4, 2), Tiles(32, 64, 4, 2))),
}
_FLOAT = {  # by padded head size
    16: (Tiles(32, 32, 4, 3), Tiles(32, 32, 8, 3)),
    32: (Tiles(32, 32, 4, 3), Tiles(32, 32, 8, 3)),
    64: (Tiles(64, 32, 8, 3), Tiles(32, 32, 8, 2)),  # keys: three stages spill
    128: (Tiles(16, 16, 8, 3), Tiles(32, 16, 8, 3)),
}
_FLOAT_GFX = dict.fromkeys((16, 32, 64), (Tiles(32, 32, 4, 2), Tiles(32, 32, 4, 2)))
_FLOAT_GFX[128] = Tiles(16, 32, 4, 2), Tiles(32, 16, 4, 2)


@lru_cache
def launch_config(
    head_dim: int, seq_len: int, dtype: torch.dtype, arch: str, heads: int, processors: int, biased: bool = False
) -> tuple[Tiles, Tiles]:
    """Tiles of the queries' pass and of the keys' pass, each chosen as in the forward."""
    if dtype == torch.float32:
        tiles = (_FLOAT_GFX if arch.startswith("gfx") else _FLOAT)[next_power_of_2(head_dim)]
        if biased and TRITON_3_6 and head_dim in (16, 64) and table_arch(arch) in ("sm_90", "sm_100"):  # spills
            return tiles[0], tiles[1]._replace(num_stages=tiles[1].num_stages - 1)
        return tiles
    row = table_arch(arch)
    few, many = _HALF[row, head_dim > 64]
    if TRITON_3_6 and (row, head_dim > 64) == ("sm_80", True):
        few = many = Tiles(32, 64, 4, 2), few[1]
    if TRITON_3_6 and head_dim == 32 and row in ("sm_80", "sm_100"):
        many = many[0], many[1]._replace(num_stages=2)
    if biased and (row, head_dim > 64) == ("sm_90", False):  # biases need a few registers more
        many = many[0], few[1]
    if biased and (row, head_dim) == ("gfx942", 32):
        many = few[0], many[1]
    queries, keys = (fills(seq_len, rows, heads, processors) for rows in (many[0].block_m, many[1].block_n))
    return (many if queries else few)[0], (many if keys else few)[1]


def attention_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """Gradient of ``qkv``, ``(B, N, 3, H, D)``, contiguous. A ``grad_out`` whose last stride is not 1 is copied."""
    check(qkv)
    b, n, _, heads, dim = qkv.shape
    grad_qkv = qkv.new_empty(qkv.shape)
    if grad_qkv.numel() == 0:
        return grad_qkv
    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    delta = torch.empty_like(lse)
    arch = device_arch(qkv)
    queries, keys = launch_config(dim, n, qkv.dtype, arch, b * heads, processors(qkv), bias is not None)
    shared = dict(
        grad_out_ptr=grad_out,
        qkv_ptr=qkv,
        lse_ptr=lse,
        bias_ptr=bias,
        delta_ptr=delta,
        grad_qkv_ptr=grad_qkv,
        stride_grad_b=grad_out.stride(0),
        stride_grad_n=grad_out.stride(1),
        stride_grad_h=grad_out.stride(2),
        **qkv_strides(qkv),
        seq_len=n,
        heads=heads,
        scale=scale,
        scale_log2=scale * LOG2_E.value,
        HEAD_DIM=dim,
        PAD_DIM=next_power_of_2(dim),
        PRECISION=dot_precision(qkv.dtype, arch),
    )
    attention_backward_queries_kernel[programs(cdiv(n, queries.block_m) * b * heads, qkv=qkv.shape)](
        **shared,
        out_ptr=out,
        TAIL_N=tail(n, queries.block_n),
        **launch_arguments(queries),
    )
    attention_backward_keys_kernel[programs(cdiv(n, keys.block_n) * b * heads, qkv=qkv.shape)](
        **shared,
        TAIL_M=TAIL,
        **launch_arguments(keys),
    )
    return grad_qkv
