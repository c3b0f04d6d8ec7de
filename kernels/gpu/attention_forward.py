"""Attention forward in Triton.

For each head of ``qkv (B, N, 3, H, D)``, with s = q k^T * scale of shape (N, N):
    lse_i = log sum_j exp(s_ij)        out_i = sum_j exp(s_ij - lse_i) v_j
A bias ``(B, N)`` of the keys adds to s; without one nothing of it is compiled in.
One program owns BLOCK_M queries of one head and visits the keys with an online softmax in base 2: the statistics are
in units of log 2, so that ``exp2(q k^T * (scale * log2 e) - max)`` is one fused multiply-add and one exponential.
Full key blocks run without masks, after the one masked block that the rest of a ragged sequence needs: TAIL_N keys,
at 2^k + 1 tokens TAIL = 16, the smallest size of a matrix product. Its loads share the latency of the queries' load.

Saved for the backward, only where a gradient is needed: ``lse (B, H, N)``, float32. It stays in units of log 2 to avoid
two roundings: the last place of a log-sum-exp of 1e4 is a thousandth of p.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..registry import HEAD_SIZES
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
    refuse_float64,
)

TAIL = 16
_LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def locate(qkv_ptr, stride_b, stride_s, stride_h, seq_len, heads, BLOCK: tl.constexpr):
    """First row, image, head and their common index of a program, and pointers to the queries, keys and values.

    Neighbouring programs share a head, whose keys the cache then holds.
    """
    blocks = tl.cdiv(seq_len, BLOCK)
    start = (tl.program_id(0) % blocks) * BLOCK
    head_index = tl.program_id(0) // blocks
    b, h = (head_index // heads).to(tl.int64), (head_index % heads).to(tl.int64)
    q_ptr = qkv_ptr + b * stride_b + h * stride_h
    k_ptr = q_ptr + stride_s
    return start, b, h, head_index.to(tl.int64), q_ptr, k_ptr, k_ptr + stride_s


@triton.jit
def row_pointers(ptr, start, stride_n, ROWS: tl.constexpr, PAD: tl.constexpr):
    """Pointers to the rows ``start`` to ``start + ROWS`` of one head, ``(ROWS, PAD)``."""
    return ptr + start * stride_n + tl.arange(0, ROWS).to(tl.int64)[:, None] * stride_n + tl.arange(0, PAD)[None, :]


@triton.jit
def load_at(ptrs, start, seq_len, ROWS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, EDGE: tl.constexpr):
    """Load by ``row_pointers`` of ``start``; zeros past DIM and, at an EDGE, past the end of the sequence."""
    cols = tl.arange(0, PAD)[None, :]
    if EDGE:
        return tl.load(ptrs, mask=(start + tl.arange(0, ROWS) < seq_len)[:, None] & (cols < DIM), other=0.0)
    elif DIM == PAD:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=cols < DIM, other=0.0)


@triton.jit
def load_rows(
    ptr, start, stride_n, seq_len, ROWS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, EDGE: tl.constexpr
):
    """Load rows ``start`` to ``start + ROWS`` of one head as ``load_at`` does."""
    return load_at(row_pointers(ptr, start, stride_n, ROWS, PAD), start, seq_len, ROWS, DIM, PAD, EDGE)


@triton.jit
def store_rows(ptr, tile, start, stride_n, seq_len, ROWS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr):
    """Store what ``load_rows`` loads at an edge, in the dtype of ``ptr``."""
    mask = (start + tl.arange(0, ROWS) < seq_len)[:, None] & (tl.arange(0, PAD)[None, :] < DIM)
    tl.store(row_pointers(ptr, start, stride_n, ROWS, PAD), tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_bias(bias_ptr, start, seq_len, ROWS: tl.constexpr, EDGE: tl.constexpr):
    """Biases of ROWS keys in units of log 2, ``(ROWS,)``."""
    offs = start + tl.arange(0, ROWS)
    if EDGE:
        return tl.load(bias_ptr + offs, mask=offs < seq_len, other=0.0) * LOG2_E
    return tl.load(bias_ptr + offs) * LOG2_E


@triton.jit
def add_product(acc, a, b, PRECISION: tl.constexpr):
    """``acc + a b``; in float32 ``a b`` is summed by itself, because one long chain of additions rounds too often."""
    if a.dtype == tl.float32:  # as an fma, which Triton does not turn into a product that starts from acc
        return tl.fma(tl.dot(a, b, input_precision=PRECISION), 1.0, acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _attend(
    q, acc, row_max, row_sum, k_ptr, v_ptr, bias_ptr, start, stride_n, seq_len, scale_log2,
    ROWS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add ROWS keys to the online softmax. ``row_max`` is scaled once, so that all exponents round it alike.

    The maximum drops NaN on a GPU: a NaN score still makes p, and with it the sum and the output of its row, NaN.
    """
    k = load_rows(k_ptr, start, stride_n, seq_len, ROWS, DIM, PAD, EDGE)
    if ROWS <= 16:  # few enough to load both before the first wait
        v = load_rows(v_ptr, start, stride_n, seq_len, ROWS, DIM, PAD, EDGE)
    scores = tl.dot(q, k.T, input_precision=PRECISION)  # (BLOCK_M, ROWS)
    if bias_ptr is not None:
        scores = scores * scale_log2 + load_bias(bias_ptr, start, seq_len, ROWS, EDGE)[None, :]
        if EDGE:
            scores = tl.where(start + tl.arange(0, ROWS)[None, :] < seq_len, scores, -float("inf"))
    elif EDGE:
        scores = tl.where(start + tl.arange(0, ROWS)[None, :] < seq_len, scores * scale_log2, -float("inf"))
    if EDGE or bias_ptr is not None:
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        p = tl.exp2(scores - new_max[:, None])
    else:
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        p = tl.exp2(scores * scale_log2 - new_max[:, None])
    shrink = tl.exp2(row_max - new_max)
    if ROWS > 16:
        v = load_rows(v_ptr, start, stride_n, seq_len, ROWS, DIM, PAD, EDGE)
    acc = add_product(acc * shrink[:, None], p.to(v.dtype), v, PRECISION)
    return acc, new_max, row_sum * shrink + tl.sum(p, 1)


@triton.jit(do_not_specialize=["seq_len", "heads"])
def attention_forward_kernel(
    qkv_ptr,  # (B, N, 3, H, D)
    out_ptr,  # (B, N, H, D), contiguous
    lse_ptr,  # (B, H, N), contiguous
    bias_ptr,  # (B, N), contiguous, or None
    stride_b: tl.int64, stride_n: tl.int64, stride_s: tl.int64, stride_h: tl.int64,
    seq_len, heads,
    scale_log2,  # |scale| * log2(e)
    NEGATIVE: tl.constexpr,  # the scale is negative; the maximum of the scaled scores needs a positive factor
    WITH_LSE: tl.constexpr,
    HEAD_DIM: tl.constexpr, PAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    stride_n = stride_n.to(tl.int64)
    start_m, b, h, head_index, q_ptr, k_ptr, v_ptr = locate(
        qkv_ptr, stride_b, stride_s, stride_h, seq_len, heads, BLOCK_M
    )
    stride_out = heads.to(tl.int64) * HEAD_DIM
    out_ptr += b * seq_len * stride_out + h * HEAD_DIM
    lse_ptr += head_index * seq_len
    if bias_ptr is not None:
        bias_ptr += b * seq_len
    q = load_rows(q_ptr, start_m, stride_n, seq_len, BLOCK_M, HEAD_DIM, PAD_DIM, True)
    if NEGATIVE:
        q = -q
    acc = tl.zeros((BLOCK_M, PAD_DIM), tl.float32)
    row_max = tl.full((BLOCK_M,), _LOWEST, tl.float32)  # finite: a block of scores -inf adds zeros, not NaN
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    full = seq_len // BLOCK_N * BLOCK_N
    if TAIL_N > 0:
        acc, row_max, row_sum = _attend(
            q, acc, row_max, row_sum, k_ptr, v_ptr, bias_ptr, full, stride_n, seq_len, scale_log2,
            TAIL_N, HEAD_DIM, PAD_DIM, True, PRECISION,
        )  # fmt: skip
    for start in tl.range(0, full, BLOCK_N):
        acc, row_max, row_sum = _attend(
            q, acc, row_max, row_sum, k_ptr, v_ptr, bias_ptr, start, stride_n, seq_len, scale_log2,
            BLOCK_N, HEAD_DIM, PAD_DIM, False, PRECISION,
        )  # fmt: skip

    row_sum = tl.where(row_sum == 0, float("inf"), row_sum)  # all scores are -inf: zeros, as PyTorch gives
    store_rows(out_ptr, acc / row_sum[:, None], start_m, stride_out, seq_len, BLOCK_M, HEAD_DIM, PAD_DIM)
    if WITH_LSE:
        offs_m = start_m + tl.arange(0, BLOCK_M)
        tl.store(lse_ptr + offs_m, row_max + tl.log2(row_sum), mask=offs_m < seq_len)


class Tiles(NamedTuple):
    """Queries and keys of a tile, warps and pipeline stages of a program."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    maxnreg: int = 0  # registers of a thread; 0: as many as the compiler takes


# 16-bit types: tiles for few programs and for many, by architecture and by whether a head is wider than 64. On NVIDIA
# two stages prefetch nothing: the head of the loop waits for the tile that it has just asked for.
_HALF = {
    ("sm_80", False): (Tiles(64, 64, 4, 3), Tiles(64, 128, 4, 3)),
    ("sm_80", True): (Tiles(64, 64, 4, 2), Tiles(128, 64, 8, 3)),
    ("sm_86", False): (Tiles(64, 64, 4, 3), Tiles(128, 64, 8, 3)),
    ("sm_86", True): (Tiles(64, 64, 4, 2), Tiles(128, 32, 8, 3)),
    ("sm_90", False): (Tiles(64, 64, 4, 3), Tiles(128, 64, 8, 3)),
    ("sm_90", True): (Tiles(64, 64, 4, 2), Tiles(128, 64, 8, 3)),
    ("sm_100", False): (Tiles(64, 128, 4, 3), Tiles(128, 128, 8, 3)),
    ("sm_100", True): (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3)),
    ("gfx942", False): (Tiles(64, 64, 4, 2), Tiles(128, 64, 4, 2)),
    ("gfx942", True): (Tiles(64, 64, 4, 2), Tiles(128, 64, 8, 2)),
}
# float32, by padded head size: without TF32 the products run on the FMA units, and their operands fill the registers.
_FLOAT = {16: Tiles(64, 32, 8, 3), 32: Tiles(32, 32, 4, 3), 64: Tiles(32, 32, 4, 3), 128: Tiles(16, 16, 8, 3)}


@lru_cache
def launch_config(
    head_dim: int, seq_len: int, dtype: torch.dtype, arch: str, heads: int, processors: int, biased: bool = False
) -> Tiles:
    """Tiles of a launch for ``heads`` heads of all images; measured are sm_90's for 16-bit types and heads of 64."""
    if dtype == torch.float32:
        tiles = _FLOAT[next_power_of_2(head_dim)]
        fewer = arch.startswith("gfx") or (biased and TRITON_3_6 and head_dim == 16)  # three stages spill there
        return tiles._replace(num_stages=2) if fewer else tiles
    few, many = _HALF[table_arch(arch), head_dim > 64]
    if biased and head_dim > 64 and arch.startswith("gfx"):  # wide heads leave no registers for biases
        many = few
    return many if fills(seq_len, many.block_m, heads, processors) else few


def fills(seq_len: int, rows: int, heads: int, processors: int) -> bool:
    """True where blocks of ``rows`` make four programs a processor and leave at most a tenth of their rows empty.

    Fewer programs end in a wave that is nearly empty; 1025 tokens in blocks of 128 leave 11 % empty.
    """
    blocks = cdiv(seq_len, rows)
    return 10 * (blocks * rows - seq_len) <= blocks * rows and blocks * heads >= 4 * processors


def tail(seq_len: int, block: int) -> int:
    """Rows of the masked block for what full blocks leave over, or 0."""
    rest = seq_len % block
    return TAIL if 0 < rest <= TAIL else block if rest else 0


def table_arch(arch: str) -> str:
    """Row of the launch tables for any chip; sm_86's serves those with 99 KB of shared memory."""
    if arch.startswith("gfx"):
        return "gfx942"
    if arch in ("sm_86", "sm_89", "sm_120", "sm_121"):
        return "sm_86"
    return "sm_100" if arch.startswith("sm_10") else arch if arch == "sm_90" else "sm_80"


def check(qkv: Tensor) -> None:
    """Refuse what the Triton kernels do not take."""
    refuse_float64("attention", qkv)
    if qkv.shape[-1] not in HEAD_SIZES:
        raise ValueError(
            f"attention on this device takes head sizes {HEAD_SIZES}, got {qkv.shape[-1]} in qkv of shape "
            f"{tuple(qkv.shape)}; use segmenter_fast.kernels.reference.attention for other head sizes"
        )


def qkv_strides(qkv: Tensor) -> dict[str, int]:
    """Launch arguments: int64 scalars, because a tuple's int32 elements spill (sm_90, float32, D = 16, backward)."""
    return dict(zip(("stride_b", "stride_n", "stride_s", "stride_h"), qkv.stride()[:4], strict=True))


def attention_forward(qkv: Tensor, scale: float, with_lse: bool, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``(B, N, 3, H, D)`` -> ``(B, N, H, D)`` and the log-sum-exp ``(B, H, N)`` to base 2, empty unless asked for.

    ``bias`` is ``(B, N)``, float32 and contiguous.
    """
    check(qkv)
    b, n, _, heads, dim = qkv.shape
    out = qkv.new_empty((b, n, heads, dim))
    lse = qkv.new_empty((b, heads, n) if with_lse else (0,), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    arch = device_arch(qkv)
    tiles = launch_config(dim, n, qkv.dtype, arch, b * heads, processors(qkv), bias is not None)
    attention_forward_kernel[programs(cdiv(n, tiles.block_m) * b * heads, qkv=qkv.shape)](
        qkv_ptr=qkv,
        out_ptr=out,
        lse_ptr=lse,
        bias_ptr=bias,
        **qkv_strides(qkv),
        seq_len=n,
        heads=heads,
        scale_log2=abs(scale) * LOG2_E.value,
        NEGATIVE=scale < 0,
        WITH_LSE=with_lse,
        HEAD_DIM=dim,
        PAD_DIM=next_power_of_2(dim),
        TAIL_N=tail(n, tiles.block_n),
        PRECISION=dot_precision(qkv.dtype, arch),
        **launch_arguments(tiles),
    )
    return out, lse
