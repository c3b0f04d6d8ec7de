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

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LOG2_E, launch_arguments

SIZES = ["num_classes", "lattices", "height", "width"]


@triton.jit
def tile_outputs(size, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """Rows and columns of the program, int64, and masks of those that exist."""
    height, width = size
    tiles_x = tl.cdiv(width, BLOCK_X)
    pid = tl.program_id(0).to(tl.int64)
    offs_y = pid // tiles_x * BLOCK_Y + tl.arange(0, BLOCK_Y)
    offs_x = pid % tiles_x * BLOCK_X + tl.arange(0, BLOCK_X)
    return offs_y, offs_x, offs_y < height, offs_x < width


@triton.jit
def point_pair(index_ptr, weights_ptr, s, offs, mask, size):
    """Both points of outputs ``offs`` of one axis, and the weight of the second."""
    index_ptr += s * 2 * size
    first = tl.load(index_ptr + offs, mask=mask, other=0)
    second = tl.load(index_ptr + size + offs, mask=mask, other=0)
    return first, second, tl.load(weights_ptr + s * size + offs, mask=mask, other=0.0)


@triton.jit
def lattice_logits(lattice_ptrs, s, k, tile, num_classes, size):
    """``(BLOCK_Y, BLOCK_X, BLOCK_K)`` logits of lattice ``s``; -inf for classes that do not exist."""
    scores_ptr, rows_ptr, row_weights_ptr, cols_ptr, col_weights_ptr = lattice_ptrs
    offs_y, offs_x, mask_y, mask_x = tile
    r0, r1, v = point_pair(rows_ptr, row_weights_ptr, s, offs_y, mask_y, size[0])
    c0, c1, u = point_pair(cols_ptr, col_weights_ptr, s, offs_x, mask_x, size[1])
    mask = (mask_y[:, None] & mask_x[None, :])[:, :, None] & (k < num_classes)[None, None, :]
    v, u = v[:, None, None], u[None, :, None]
    p00 = scores_ptr + ((r0[:, None] + c0[None, :]) * num_classes)[:, :, None] + k[None, None, :]
    p01 = scores_ptr + ((r0[:, None] + c1[None, :]) * num_classes)[:, :, None] + k[None, None, :]
    top = tl.load(p00, mask=mask, other=0.0) * (1 - u) + tl.load(p01, mask=mask, other=0.0) * u
    p10 = scores_ptr + ((r1[:, None] + c0[None, :]) * num_classes)[:, :, None] + k[None, None, :]
    p11 = scores_ptr + ((r1[:, None] + c1[None, :]) * num_classes)[:, :, None] + k[None, None, :]
    bottom = tl.load(p10, mask=mask, other=0.0) * (1 - u) + tl.load(p11, mask=mask, other=0.0) * u
    return tl.where((k < num_classes)[None, None, :], top * (1 - v) + bottom * v, -float("inf"))


@triton.jit(do_not_specialize=SIZES)
def lattice_log_sum_kernel(
    lattice_ptrs,  # scores (N, K), rows (S, 2, H), row weights (S, H), columns (S, 2, W), column weights (S, W)
    out_ptr,  # (S, 2, H, W)
    num_classes, lattices, height, width,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Largest logit, and log2 of the sum of the exponentials, of one tile of one lattice."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    size = height, width
    tile = tile_outputs(size, BLOCK_Y, BLOCK_X)
    offs_y, offs_x, mask_y, mask_x = tile
    s = tl.program_id(1).to(tl.int64)
    largest = tl.full((BLOCK_Y, BLOCK_X, BLOCK_K), -float("inf"), dtype)
    for start in range(0, num_classes, BLOCK_K):
        logit = lattice_logits(lattice_ptrs, s, start + tl.arange(0, BLOCK_K), tile, num_classes, size)
        largest = tl.maximum(largest, logit)
    shift = tl.max(largest, 2)
    exp_sum = tl.zeros((BLOCK_Y, BLOCK_X, BLOCK_K), dtype)
    for start in range(0, num_classes, BLOCK_K):
        logit = lattice_logits(lattice_ptrs, s, start + tl.arange(0, BLOCK_K), tile, num_classes, size)
        exp_sum += tl.exp2((logit - shift[:, :, None]) * LOG2_E)
    mask = mask_y[:, None] & mask_x[None, :]
    out_ptrs = out_ptr + (s * 2 * height + offs_y[:, None]) * width + offs_x[None, :]
    tl.store(out_ptrs, shift, mask=mask)
    tl.store(out_ptrs + height.to(tl.int64) * width, tl.log2(tl.sum(exp_sum, 2)), mask=mask)


@triton.jit
def lattice_votes(lattice_ptrs, log_sum_ptr, k, tile, num_classes, lattices, size):
    """``(BLOCK_Y, BLOCK_X, BLOCK_K)`` sum over the lattices of the softmaxes."""
    offs_y, offs_x, mask_y, mask_x = tile
    height, width = size
    votes = tl.zeros((offs_y.shape[0], offs_x.shape[0], k.shape[0]), log_sum_ptr.dtype.element_ty)
    mask = mask_y[:, None] & mask_x[None, :]
    ptrs = log_sum_ptr + offs_y[:, None] * width + offs_x[None, :]
    plane = height.to(tl.int64) * width
    for s in range(lattices):
        logit = lattice_logits(lattice_ptrs, s, k, tile, num_classes, size)
        shift = tl.load(ptrs + 2 * s * plane, mask=mask, other=0.0)
        log_sum = tl.load(ptrs + (2 * s + 1) * plane, mask=mask, other=0.0)
        votes += tl.exp2((logit - shift[:, :, None]) * LOG2_E - log_sum[:, :, None])
    return votes


@triton.jit(do_not_specialize=SIZES)
def lattice_argmax_kernel(
    lattice_ptrs,
    log_sum_ptr,  # (S, 2, H, W), unused by a single lattice
    labels_ptr,  # (H, W)
    num_classes, lattices, height, width,
    SINGLE: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Labels of one tile, by the logits of a SINGLE lattice or by the votes of all."""
    size = height, width
    tile = tile_outputs(size, BLOCK_Y, BLOCK_X)
    offs_y, offs_x, mask_y, mask_x = tile
    best = tl.full((BLOCK_Y, BLOCK_X, BLOCK_K), -float("inf"), log_sum_ptr.dtype.element_ty)
    # Each lane holds the best of its classes; the first one, until another exceeds it.
    label = tl.zeros((BLOCK_Y, BLOCK_X, BLOCK_K), tl.int32) + tl.arange(0, BLOCK_K)[None, None, :]
    for start in range(0, num_classes, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if SINGLE:
            value = lattice_logits(lattice_ptrs, 0, k, tile, num_classes, size)
        else:
            value = lattice_votes(lattice_ptrs, log_sum_ptr, k, tile, num_classes, lattices, size)
        # A NaN wins against every number, and nothing against a NaN.
        wins = ~(value <= best) & (best == best) & (k < num_classes)[None, None, :]
        best = tl.where(wins, value, best)
        label = tl.where(wins, k[None, None, :], label)
    lanes_nan = tl.sum((best != best).to(tl.int32), 2)
    largest = tl.max(tl.where(best == best, best, -float("inf")), 2)
    first = tl.where((lanes_nan > 0)[:, :, None], best != best, best == largest[:, :, None])
    label = tl.min(tl.where(first, label, num_classes), 2)
    ptrs = labels_ptr + offs_y[:, None] * size[1] + offs_x[None, :]
    tl.store(ptrs, label.to(labels_ptr.dtype.element_ty), mask=mask_y[:, None] & mask_x[None, :])


@triton.jit(do_not_specialize=SIZES)
def lattice_softmax_kernel(
    lattice_ptrs,
    log_sum_ptr,  # (S, 2, H, W)
    out_ptr,  # (K, H, W)
    num_classes, lattices, height, width,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Mean probabilities of one tile."""
    size = height, width
    tile = tile_outputs(size, BLOCK_Y, BLOCK_X)
    offs_y, offs_x, mask_y, mask_x = tile
    mask = mask_y[:, None] & mask_x[None, :]
    for start in range(0, num_classes, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        votes = lattice_votes(lattice_ptrs, log_sum_ptr, k, tile, num_classes, lattices, size) / lattices
        offs_r = k.to(tl.int64)[:, None] * size[0] + offs_y[None, :]
        ptrs = out_ptr + offs_r[:, :, None] * size[1] + offs_x[None, None, :]
        tl.store(ptrs, votes.permute(2, 0, 1), mask=(k < num_classes)[:, None, None] & mask[None, :, :])


class Tiles(NamedTuple):
    """Pixels of a tile, classes of a step, warps of a program."""

    block_y: int
    block_x: int
    block_k: int
    num_warps: int


def launch_config(num_classes: int) -> Tiles:
    """Tiles of 32 pixels, 4 logits to a thread: with 8 the softmax spills on sm_100."""
    block_k = min(triton.next_power_of_2(num_classes), 32)
    return Tiles(4, 8, block_k, num_warps=max(32 * block_k // 128, 1))


def _launch(kernel: Any, lattice: Sequence[Tensor], programs: int = 1, **arguments: Any) -> None:
    """Launch ``kernel`` on all tiles, with ``programs`` for each. ``lattice`` is what the ops take."""
    scores, rows, _, cols, _ = lattice
    tiles = launch_config(scores.shape[1])
    height, width = rows.shape[2], cols.shape[2]
    kernel[(-(-height // tiles.block_y) * -(-width // tiles.block_x), programs)](
        lattice_ptrs=lattice,
        num_classes=scores.shape[1],
        lattices=len(rows),
        height=height,
        width=width,
        **arguments,
        **launch_arguments(tiles),
    )


def _log_sum(lattice: Sequence[Tensor]) -> Tensor:
    scores, rows, _, cols, _ = lattice
    out = scores.new_empty((len(rows), 2, rows.shape[2], cols.shape[2]))
    _launch(lattice_log_sum_kernel, lattice, programs=len(rows), out_ptr=out)
    return out


def lattice_argmax(scores: Tensor, rows: Tensor, row_weights: Tensor, cols: Tensor, col_weights: Tensor) -> Tensor:
    """``(H, W)`` labels, uint8 where K <= 256 and int32 otherwise."""
    lattice = scores, rows, row_weights, cols, col_weights
    single = len(rows) == 1
    log_sum = scores if single else _log_sum(lattice)
    dtype = torch.uint8 if scores.shape[1] <= 256 else torch.int32
    labels = scores.new_empty((rows.shape[2], cols.shape[2]), dtype=dtype)
    _launch(lattice_argmax_kernel, lattice, log_sum_ptr=log_sum, labels_ptr=labels, SINGLE=single)
    return labels


def lattice_softmax(scores: Tensor, rows: Tensor, row_weights: Tensor, cols: Tensor, col_weights: Tensor) -> Tensor:
    """``(K, H, W)``: the mean over S of the softmaxes."""
    lattice = scores, rows, row_weights, cols, col_weights
    out = scores.new_empty((scores.shape[1], rows.shape[2], cols.shape[2]))
    _launch(lattice_softmax_kernel, lattice, log_sum_ptr=_log_sum(lattice), out_ptr=out)
    return out
