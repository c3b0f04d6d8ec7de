"""Best match of rows in Triton.

For each row of ``a (B, S, D)``: value = max_t a . b_t and the lowest t that has it, over the first ``lengths`` rows of
``b (B, T, D)``. One program owns BLOCK_M rows and visits the rows of ``b`` in tiles of BLOCK_N, each product summed
over D in steps of BLOCK_K; the ``(S, T)`` products never exist. Every element of the tile keeps the best of its tiles,
so that one reduction at the end finds value and row. A NaN is larger than nothing and never matches.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_forward import add_product
from .common import TRITON_3_6, cdiv, device_arch, dot_precision, launch_arguments, processors, programs, refuse_float64

_FAR: tl.constexpr = tl.constexpr(2147483647)


@triton.jit
def _visit(
    best, tile, a_ptrs, b_ptrs, mask_m, left, start, offs_k,
    DIM: tl.constexpr, BLOCK_K: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keep what is better in a tile of ``b``; at the EDGE, the tile after the last whole one, only ``left`` rows.

    A maximum, which drops NaN, takes 2 instructions of an element less than a second choice by ``better``.
    """
    scores = tl.zeros(best.shape, tl.float32)
    for k in tl.range(0, DIM, BLOCK_K):
        mask_k = (k + offs_k < DIM)[None, :] if DIM % BLOCK_K else True
        a = tl.load(a_ptrs + k, mask=mask_m[:, None] & mask_k, other=0.0)
        if EDGE:
            b = tl.load(b_ptrs + k, mask=left[:, None] & mask_k, other=0.0)
        elif DIM % BLOCK_K:
            b = tl.load(b_ptrs + k, mask=mask_k, other=0.0)
        else:
            b = tl.load(b_ptrs + k)
        scores = add_product(scores, a, b.T, PRECISION)
    better = scores > best
    if EDGE:
        better = better & left[None, :]
        scores = tl.where(left[None, :], scores, -float("inf"))
    return tl.maximum(best, scores), tl.where(better, start, tile)


@triton.jit(do_not_specialize=["rows_a", "rows_b"])
def best_match_kernel(
    a_ptr,  # (B, S, D), last stride 1
    b_ptr,  # (B, T, D), last stride 1
    lengths_ptr,  # (B,) or None
    value_ptr,  # (B, S), contiguous
    match_ptr,  # (B, S), contiguous
    stride_ab: tl.int64, stride_as: tl.int64, stride_bb: tl.int64, stride_bt: tl.int64,
    rows_a, rows_b,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(rows_a, BLOCK_M)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    offs_m = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n, offs_k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    mask_m = offs_m < rows_a
    end = rows_b if lengths_ptr is None else tl.minimum(tl.load(lengths_ptr + image).to(tl.int32), rows_b)
    a_ptrs = a_ptr + image * stride_ab + offs_m.to(tl.int64)[:, None] * stride_as + offs_k[None, :]
    b_ptrs = b_ptr + image * stride_bb + offs_n.to(tl.int64)[:, None] * stride_bt + offs_k[None, :]
    best = tl.full((BLOCK_M, BLOCK_N), -float("inf"), tl.float32)
    tile = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)  # where the best of an element was
    full = end // BLOCK_N * BLOCK_N
    for start in tl.range(0, full, BLOCK_N):
        best, tile = _visit(best, tile, a_ptrs, b_ptrs, mask_m, mask_m, start, offs_k, DIM, BLOCK_K, False, PRECISION)
        b_ptrs += BLOCK_N * stride_bt
    if full < end:
        left = full + offs_n < end
        best, tile = _visit(best, tile, a_ptrs, b_ptrs, mask_m, left, full, offs_k, DIM, BLOCK_K, True, PRECISION)
    value = tl.max(best, 1)
    match = tl.min(tl.where(best == value[:, None], tile + offs_n[None, :], _FAR), 1)
    tl.store(value_ptr + image * rows_a + offs_m, value, mask=mask_m)
    tl.store(match_ptr + image * rows_a + offs_m, match.to(tl.int64), mask=mask_m)


class Tiles(NamedTuple):
    """Rows of ``a`` and ``b`` and columns of a product, warps and pipeline stages of a program."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@lru_cache
def launch_config(dtype: torch.dtype, arch: str, rows: int, dim: int, processors: int) -> Tiles:
    """Tiles of a launch for ``rows`` rows of all images; none is measured."""
    stages = 2 if arch.startswith("gfx") or arch == "sm_120" else 3
    if dtype == torch.float32:
        return Tiles(32, 32, 32, 8, 2 if TRITON_3_6 else stages)
    if arch == "sm_75":  # larger tiles spill
        return Tiles(32, 32, 32, 8, 2)
    if arch != "sm_90":  # products take registers there: with 4 warps the tile spills
        return Tiles(64, 64, 64, 8, stages)
    block_k = 128 if 64 < dim <= 128 else 64  # a loop over columns costs more than it loads
    return Tiles(128, 64, block_k, 8, 3) if 2 * cdiv(rows, 128) >= processors else Tiles(64, 64, block_k, 4, 3)


def best_match(a: Tensor, b: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(B, S, D), (B, T, D)`` -> the largest scalar product of each row of ``a`` and its row of ``b``, ``(B, S)``."""
    refuse_float64("best_match", a)
    images, rows, dim = a.shape
    value = a.new_empty((images, rows), dtype=torch.float32)
    match = a.new_empty((images, rows), dtype=torch.int64)
    if value.numel() == 0:
        return value, match
    arch = device_arch(a)
    tiles = launch_config(a.dtype, arch, images * rows, dim, processors(a))
    best_match_kernel[programs(images * cdiv(rows, tiles.block_m), a=a.shape)](
        a_ptr=a,
        b_ptr=b,
        lengths_ptr=None if lengths is None else lengths.contiguous(),
        value_ptr=value,
        match_ptr=match,
        stride_ab=a.stride(0),
        stride_as=a.stride(1),
        stride_bb=b.stride(0),
        stride_bt=b.stride(1),
        rows_a=rows,
        rows_b=b.shape[1],
        DIM=dim,
        PRECISION=dot_precision(a.dtype, arch),
        **launch_arguments(tiles),
    )
    return value, match
