"""Labels and mean probabilities of pixels that mix four lattice points, in Triton; the logits are never written.

With S lattices of points (N, K), of which pixel (y, x) mixes four in each, the weights separable in y and x:
    l_s(y, x) = sum over i, j of  v_si(y) u_sj(x) scores[rows_si(y) + cols_sj(x)]
    votes = 1 / S sum_s softmax_k(l_s)       label = argmax_k votes, of one lattice argmax_k l
A first kernel stores the softmax's shift max_k l_s and log2 sum_k 2^((l_s - shift) / ln 2) of each pixel and lattice,
(S, 2, H, W). The second one visits blocks of classes, all lattices for each, and keeps the best class or stores the
probabilities. Labels of one lattice need no first kernel. One program owns BLOCK_Y x BLOCK_X pixels; neighbours share
points, so that most loads hit the first-level cache. Not differentiable, nothing is saved.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LOG2_E, TRITON_3_6, cdiv, launch_arguments, programs

Lattice = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]  # what the ops take
SIZES = ["num_classes", "lattices", "height", "width"]


@triton.jit
def open_tile(size, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, WIDE: tl.constexpr):
    """Rows ``(BLOCK_Y,)`` and columns ``(BLOCK_X,)`` of the program; past the end they repeat the last one."""
    height, width = size
    tiles_x = tl.cdiv(width, BLOCK_X)
    pid = tl.program_id(0).to(tl.int64 if WIDE else tl.int32)
    offs_y = tl.minimum(pid // tiles_x * BLOCK_Y + tl.arange(0, BLOCK_Y), height - 1)
    offs_x = tl.minimum(pid % tiles_x * BLOCK_X + tl.arange(0, BLOCK_X), width - 1)
    return offs_y, offs_x


@triton.jit
def axis_points(index_ptr, weights_ptr, s, offs, size, stride):
    """Both points of outputs ``offs`` of one axis, times ``stride``, and the weight of the second."""
    index_ptr += size.to(tl.int64) * 2 * s
    first = tl.load(index_ptr + offs).to(offs.dtype) * stride
    second = tl.load(index_ptr + size + offs).to(offs.dtype) * stride
    return first, second, tl.load(weights_ptr + size.to(tl.int64) * s + offs)


@triton.jit
def point_stride(groups_ptr, num_classes):
    """Scores from a point to the next one; 1 where points count their groups first."""
    if groups_ptr is not None:
        num_classes = 1
    return num_classes


@triton.jit
def tile_points(lattice_ptrs, s, tile, num_classes, size):
    """``axis_points`` of a tile's rows and columns in lattice ``s``."""
    _, rows_ptr, row_weights_ptr, cols_ptr, col_weights_ptr, groups_ptr = lattice_ptrs
    stride = point_stride(groups_ptr, num_classes)
    rows = axis_points(rows_ptr, row_weights_ptr, s, tile[0], size[0], stride)
    return rows, axis_points(cols_ptr, col_weights_ptr, s, tile[1], size[1], stride)


@triton.jit
def step_classes(BLOCK_K: tl.constexpr):
    """Classes of a step. Were they known to be neighbours, lanes would hold them, and not pixels."""
    return tl.max_contiguous(tl.arange(0, BLOCK_K), 1)


@triton.jit
def of_groups(groups_ptr, points, num_classes):
    """Offsets in the scores of points that are offsets already, or have groups."""
    if groups_ptr is not None:
        points = tl.load(groups_ptr + points).to(points.dtype) * num_classes
    return points


@triton.jit
def lattice_logits(scores_ptr, groups_ptr, points, offs_k, num_classes):
    """``(BLOCK_Y, BLOCK_K, BLOCK_X)`` logits of a tile, for classes ``offs_k`` behind ``scores_ptr``."""
    rows, cols = points
    r0, r1, v = rows
    c0, c1, u = cols
    r0, r1, v = r0[:, None, None], r1[:, None, None], v[:, None, None]
    c0, c1, u = c0[None, None, :], c1[None, None, :], u[None, None, :]
    k = offs_k[None, :, None]
    p00, p01 = of_groups(groups_ptr, r0 + c0, num_classes), of_groups(groups_ptr, r0 + c1, num_classes)
    p10, p11 = of_groups(groups_ptr, r1 + c0, num_classes), of_groups(groups_ptr, r1 + c1, num_classes)
    top = tl.load(scores_ptr + p00 + k) * (1 - u) + tl.load(scores_ptr + p01 + k) * u
    bottom = tl.load(scores_ptr + p10 + k) * (1 - u) + tl.load(scores_ptr + p11 + k) * u
    return top * (1 - v) + bottom * v


@triton.jit(do_not_specialize=SIZES)
def lattice_log_sum_kernel(
    # Scores (N, K), rows (S, 2, H), row weights (S, H), columns (S, 2, W), column weights (S, W), and None or
    # groups (N,) of the points, whose scores are then (groups, K).
    lattice_ptrs,
    out_ptr,  # (S, 2, H, W)
    num_classes, lattices, height, width,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Largest logit, and log2 of the sum of the exponentials, of one tile of one lattice."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    size = height, width
    tile = open_tile(size, BLOCK_Y, BLOCK_X, WIDE)
    s = tl.program_id(1)
    points = tile_points(lattice_ptrs, s, tile, num_classes, size)
    offs_k = step_classes(BLOCK_K)
    shift = tl.full((BLOCK_Y, BLOCK_X), -float("inf"), dtype)
    exp_sum = tl.zeros((BLOCK_Y, BLOCK_X), dtype)
    for begin in range(0, num_classes, BLOCK_K):
        start = tl.minimum(begin, num_classes - BLOCK_K)
        logit = lattice_logits(lattice_ptrs[0] + start, lattice_ptrs[5], points, offs_k, num_classes)
        if start < begin:
            logit = tl.where((start + offs_k >= begin)[None, :, None], logit, -float("inf"))
        before, shift = shift, tl.maximum(shift, tl.max(logit, 1))  # without NaNs on a GPU; the sum has them
        base = tl.where(shift == -float("inf"), 0.0, shift)  # where all classes yet are -inf, the sum stays 0
        exp_sum *= tl.exp2((before - base) * LOG2_E)
        exp_sum += tl.sum(tl.exp2((logit - base[:, None, :]) * LOG2_E), 1)
    plane = height.to(tl.int64) * width
    ptrs = out_ptr + 2 * plane * s + (tile[0][:, None] * width + tile[1][None, :])
    tl.store(ptrs, shift)
    tl.store(ptrs + plane, tl.log2(exp_sum))


@triton.jit
def lattice_votes(lattice_ptrs, log_sum_ptr, start, offs_k, tile, num_classes, lattices, size):
    """``(BLOCK_Y, BLOCK_K, BLOCK_X)`` sum over the lattices of the softmaxes, for classes ``start + offs_k``."""
    offs_y, offs_x = tile
    votes = tl.zeros((offs_y.shape[0], offs_k.shape[0], offs_x.shape[0]), log_sum_ptr.dtype.element_ty)
    plane = size[0].to(tl.int64) * size[1]
    ptrs = log_sum_ptr + (offs_y[:, None] * size[1] + offs_x[None, :])
    for s in range(lattices):
        points = tile_points(lattice_ptrs, s, tile, num_classes, size)
        shift, log_sum = tl.load(ptrs), tl.load(ptrs + plane)
        logit = lattice_logits(lattice_ptrs[0] + start, lattice_ptrs[5], points, offs_k, num_classes)
        votes += tl.exp2((logit - shift[:, None, :]) * LOG2_E - log_sum[:, None, :])
        ptrs += 2 * plane
    return votes


@triton.jit(do_not_specialize=SIZES)
def lattice_softmax_kernel(
    lattice_ptrs,
    log_sum_ptr,  # (S, 2, H, W)
    out_ptr,  # (K, H, W)
    num_classes, lattices, height, width,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Mean probabilities of one tile."""
    size = height, width
    tile = open_tile(size, BLOCK_Y, BLOCK_X, WIDE)
    offs_k = step_classes(BLOCK_K)
    share = 1.0 / lattices.to(out_ptr.dtype.element_ty)
    plane = height.to(tl.int64) * width
    out_ptrs = out_ptr + (tile[0] * width)[:, None, None] + tile[1][None, None, :]
    for begin in range(0, num_classes, BLOCK_K):
        start = tl.minimum(begin, num_classes - BLOCK_K)
        votes = lattice_votes(lattice_ptrs, log_sum_ptr, start, offs_k, tile, num_classes, lattices, size) * share
        tl.store(out_ptrs + start * plane + (offs_k * plane)[None, :, None], votes)


class Tiles(NamedTuple):
    """Pixels of a tile, classes of a step, warps of a program."""

    block_y: int
    block_x: int
    block_k: int
    num_warps: int


@lru_cache(maxsize=64)
def launch_config(num_classes: int, dtype: torch.dtype = torch.float32) -> Tiles:
    """Tiles of 32 columns of a row, one warp: a thread holds the classes of a step, at constant distances in memory.

    No step is wider than the classes. The last one ends at the last class and repeats some of the step before.
    """
    most = 8 if TRITON_3_6 and dtype == torch.float64 else 16
    return Tiles(1, 32, min(1 << num_classes.bit_length() - 1, most), num_warps=1)


def launch(kernel: Any, lattice: Lattice, tiles: Tiles, of_a_tile: int = 1, **arguments: Any) -> None:
    """Launch ``kernel`` on all tiles, with ``of_a_tile`` programs for each."""
    scores, rows, _, cols, *_ = lattice
    height, width = rows.shape[2], cols.shape[2]
    count = cdiv(height, tiles.block_y) * cdiv(width, tiles.block_x)
    kernel[programs(count, of_a_tile, rows=rows.shape, cols=cols.shape)](
        lattice_ptrs=lattice,
        num_classes=scores.shape[1],
        lattices=len(rows),
        height=height,
        width=width,
        WIDE=max(scores.numel(), height * width) >= 1 << 31,
        **arguments,
        **launch_arguments(tiles),
    )


def log_sum(lattice: Lattice) -> Tensor:
    """Shift and log2 of the sum of the exponentials of each pixel and lattice, ``(S, 2, H, W)``."""
    scores, rows, _, cols, *_ = lattice
    out = scores.new_empty((len(rows), 2, rows.shape[2], cols.shape[2]))
    tiles = launch_config(scores.shape[1], scores.dtype)
    launch(lattice_log_sum_kernel, lattice, tiles, of_a_tile=len(rows), out_ptr=out)
    return out


def lattice_softmax(
    scores: Tensor, rows: Tensor, row_weights: Tensor, cols: Tensor, col_weights: Tensor, index: Tensor | None = None
) -> Tensor:
    """``(K, H, W)``: the mean over S of the softmaxes."""
    lattice = scores, rows, row_weights, cols, col_weights, index
    out = scores.new_empty((scores.shape[1], rows.shape[2], cols.shape[2]))
    launch(lattice_softmax_kernel, lattice, launch_config(scores.shape[1]), log_sum_ptr=log_sum(lattice), out_ptr=out)
    return out
