"""Cells of a bilinear resize in Triton: geometry, and the exponentials of their logits.

Cell (cy, cx) of ``h x w`` holds the outputs that mix inputs (cy, cx), (cy, cx + 1), (cy + 1, cx), (cy + 1, cx + 1),
its corners, clamped at the far border. Outputs before the first centre belong to cell 0, where their upper weight is
clamped to 0, as in PyTorch.

Tiles are ``(BLOCK_Y, BLOCK_K, BLOCK_X)``: lanes hold columns and classes, warps hold classes, a thread holds all rows.
The logits of a class and a column then are one multiply-add each from the same two values, its ``edges``, and no loop
over the classes needs a barrier. The largest corner is a safe shift of all exponentials of a cell, unless the cell is
``far``: its logits are so far apart that exponentials could underflow, or not finite. Far pixels are shifted by their
own maximum.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl

from ..bilinear import Axis
from .common import LOG2_E

SAFE_SPREAD = tl.constexpr(32.0)  # exp(-32) is far from underflow
MOST_OFFSET = 1 << 30  # of offsets and products, in 32 bits
DEEP = tl.constexpr(1e30)  # corners below its negative need PyTorch's roundings, and -inf its NaNs
PADDING = tl.constexpr(-3e38)  # of classes that do not exist; finite, because 0 * inf is NaN

GEOMETRY = [f"{field}_{axis}" for axis in "yx" for field in Axis._fields]


def geometry(ys: Axis, xs: Axis) -> dict[str, int]:
    """Launch arguments named in ``GEOMETRY``: scalars, because Triton compiles again for new values in a tuple."""
    return dict(zip(GEOMETRY, (*ys, *xs), strict=True))


class Tiles(NamedTuple):
    """Outputs and classes of a tile, classes of a step along the corners alone, warps and stages of a program."""

    block_y: int
    block_x: int
    block_k: int
    block_c: int
    num_warps: int
    num_stages: int


def aligned(*values: int) -> int:
    """Largest power of two, up to 16, that divides all values: neighbours that one access may take."""
    return math.gcd(16, *values)


def tiles_of(axis: Axis, blocks: int, block: int) -> tuple[int, int]:
    """Tiles before the first centre, and all, of an axis whose cells have up to ``blocks`` tiles of ``block``."""
    first = -(-axis.cell_starts[1] // block)
    return first, first + axis.size_in * blocks


def wide(ys: Axis, xs: Axis, *offsets: int) -> bool:
    """Geometry or offsets within a tile need 64 bits."""
    products = [(a.size_in + 1) * a.denominator + (a.kept + 1) * a.step + abs(a.offset) for a in (ys, xs)]
    return max(*products, *offsets) >= MOST_OFFSET


@triton.jit
def cell_start(cell, axis):
    """First kept output of ``cell``, as in ``Axis.cell_starts``, in the integers of ``cell``."""
    step = tl.maximum(axis.step, 1)
    return tl.minimum((tl.maximum(cell * axis.denominator - axis.offset, 0) + step - 1) // step, axis.kept)


@triton.jit
def tile_weights(index, begin, end, cell, axis, dtype: tl.constexpr):
    """Weight of input ``cell + 1`` at outputs ``begin + index`` of ``cell``; past its ``end``, that of its last one.

    Outputs before the first centre take theirs from cell 0, as in PyTorch: clamped to 0.
    """
    origin = axis.offset - cell * axis.denominator
    first = (begin * axis.step + origin).to(dtype)
    last = ((end - 1) * axis.step + origin).to(dtype)
    numerator = tl.minimum(first + index.to(dtype) * axis.step.to(dtype), last)
    return tl.maximum(numerator, 0.0) * (1.0 / axis.denominator.to(dtype))


@triton.jit
def tile_of(index, blocks, axis, BLOCK: tl.constexpr):
    """Cell, first output and end of tile ``index`` of an axis whose cells have up to ``blocks`` tiles each.

    The first tiles are those of cell -1, whose outputs lie before the first centre and count as cell 0's; it has no
    empty tiles. The end is that of the cell.
    """
    first = tl.cdiv(cell_start(0, axis), BLOCK)
    cell = tl.where(index < first, -1, (index - first) // blocks)
    tile = tl.where(index < first, index, (index - first) % blocks)
    end = cell_start(cell + 1, axis)
    begin = tl.where(cell < 0, 0, cell_start(cell, axis)) + tile * BLOCK
    return tl.maximum(cell, 0), tl.minimum(begin, end), end


@triton.jit
def upper_weight(output, cell, axis, dtype: tl.constexpr):
    """Weight of input ``cell + 1`` at an output of ``cell``; 0 before the first centre, as in PyTorch."""
    numerator = tl.maximum(output * axis.step + axis.offset - cell * axis.denominator, 0)
    return numerator.to(dtype) * (1.0 / axis.denominator.to(dtype))


@triton.jit
def open_tile(tile, rows, cols, ys, xs, dtype: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """Outputs of a tile, which of them exist ``(BLOCK_Y, BLOCK_X)``, and their upper weights along y and x."""
    cell_y, first_y, end_y = rows
    cell_x, first_x, end_x = cols
    tiles_x = tl.cdiv(end_x - first_x, BLOCK_X)
    begin_y = first_y + tile // tiles_x * BLOCK_Y
    begin_x = first_x + tile % tiles_x * BLOCK_X
    index_y, index_x = tl.arange(0, BLOCK_Y), tl.arange(0, BLOCK_X)
    offs_y, offs_x = begin_y + index_y, begin_x + index_x
    mask = (offs_y < end_y)[:, None] & (offs_x < end_x)[None, :]
    weight_y = tile_weights(index_y, begin_y, end_y, cell_y, ys, dtype)
    weight_x = tile_weights(index_x, begin_x, end_x, cell_x, xs, dtype)
    return offs_y, offs_x, mask, (weight_y, weight_x)


@triton.jit
def load_corners(cell, k, dtype: tl.constexpr):
    """The four corners of classes ``k``; classes past the last one repeat it."""
    ptrs, stride_k, num_classes, _ = cell
    offsets = tl.minimum(k, num_classes - 1) * stride_k
    return (
        tl.load(ptrs[0] + offsets).to(dtype),
        tl.load(ptrs[1] + offsets).to(dtype),
        tl.load(ptrs[2] + offsets).to(dtype),
        tl.load(ptrs[3] + offsets).to(dtype),
    )


@triton.jit
def _largest3(a0, a1, a2, b0, b1, b2):
    return tl.maximum(a0, b0), tl.maximum(a1, b1), tl.maximum(a2, b2)


@triton.jit
def corner_ptrs(masks_ptr, masks_strides, index_ptr, b, top, left, ys, xs):
    """Pointers to class 0 of a cell's corners: the upper left, upper right, lower left and lower right one.

    ``index_ptr``, or None: contiguous ``(B, h, w)`` groups of the inputs, which the last stride counts.
    """
    stride_mb, _, stride_mh, stride_mw = masks_strides
    # Without a change of size there is no second input, as in PyTorch: 0 * inf would be NaN.
    bottom = tl.minimum(top + tl.cast(ys.step != ys.denominator, tl.int32), ys.size_in - 1)
    right = tl.minimum(left + tl.cast(xs.step != xs.denominator, tl.int32), xs.size_in - 1)
    if index_ptr is not None:
        masks_ptr += b * stride_mb
        upper_row = index_ptr + (b * ys.size_in + top) * xs.size_in
        lower_row = index_ptr + (b * ys.size_in + bottom) * xs.size_in
        ptrs = (
            masks_ptr + tl.load(upper_row + left) * stride_mw, masks_ptr + tl.load(upper_row + right) * stride_mw,
            masks_ptr + tl.load(lower_row + left) * stride_mw, masks_ptr + tl.load(lower_row + right) * stride_mw,
        )  # fmt: skip
    else:
        upper_row = masks_ptr + b * stride_mb + top.to(tl.int64) * stride_mh
        lower_row = masks_ptr + b * stride_mb + bottom.to(tl.int64) * stride_mh
        west, east = left.to(tl.int64) * stride_mw, right.to(tl.int64) * stride_mw
        ptrs = upper_row + west, upper_row + east, lower_row + west, lower_row + east
    return ptrs


@triton.jit
def open_corners(
    masks_ptr, masks_strides, index_ptr, num_classes, b, cell_y, cell_x, ys, xs, offs_c, dtype: tl.constexpr
):  # fmt: skip
    """A cell's corner pointers, stride of the classes, their number and the base; and whether the cell is far.

    The base is the largest corner, which no logit exceeds; 0 where the cell is far. The largest of the classes'
    smallest corners bounds every pixel's maximum from below; the cell is far where it lies far below the base, where a
    corner is below -DEEP, and where the only class has probability 1 exactly. A NaN makes all pixels of a cell NaN,
    far or not. ``offs_c`` are the classes of a step, with 64 bits where offsets need them.
    """
    stride_mk = masks_strides[1]
    ptrs = corner_ptrs(masks_ptr, masks_strides, index_ptr, b, cell_y, cell_x, ys, xs)
    BLOCK_C: tl.constexpr = offs_c.shape[0]
    highest = tl.full((BLOCK_C,), -float("inf"), dtype)
    lowest = tl.full((BLOCK_C,), -float("inf"), dtype)
    depth = tl.full((BLOCK_C,), -float("inf"), dtype)
    for start in range(0, num_classes, BLOCK_C):
        c00, c01, c10, c11 = load_corners((ptrs, stride_mk, num_classes, 0.0), start + offs_c, dtype)
        smallest = tl.minimum(tl.minimum(c00, c01), tl.minimum(c10, c11))
        highest = tl.maximum(highest, tl.maximum(tl.maximum(c00, c01), tl.maximum(c10, c11)))
        lowest = tl.maximum(lowest, smallest)
        depth = tl.maximum(depth, -smallest)
    highest, lowest, depth = tl.reduce((highest, lowest, depth), 0, _largest3)
    far = (highest - lowest > SAFE_SPREAD) | (depth > DEEP) | (num_classes == 1)
    return (ptrs, stride_mk, num_classes, tl.where(far, 0.0, highest)), far


@triton.jit
def edges(cell, k, weight_x, dtype: tl.constexpr):
    """``(BLOCK_K, BLOCK_X)`` logits of a near cell on its upper edge, minus the base, and their rise to the lower one.

    Both are in units of log 2. The logit at an upper weight w along y is ``top + w * rise``.
    """
    c00, c01, c10, c11 = load_corners(cell, k, dtype)
    top = c00[:, None] + weight_x[None, :] * (c01 - c00)[:, None]
    bottom = c10[:, None] + weight_x[None, :] * (c11 - c10)[:, None]
    return tl.where((k < cell[2])[:, None], (top - cell[3]) * LOG2_E, PADDING), (bottom - top) * LOG2_E


@triton.jit
def mix(lower, upper, weight):
    """``(1 - weight) * lower + weight * upper``, with PyTorch's roundings, NaNs and infinities."""
    return (1 - weight) * lower + weight * upper


@triton.jit
def far_logits(cell, k, weights, dtype: tl.constexpr):
    """``(BLOCK_Y, BLOCK_K, BLOCK_X)`` logits; -inf for classes that do not exist."""
    weight_y, weight_x = weights
    c00, c01, c10, c11 = load_corners(cell, k, dtype)
    top = mix(c00[:, None], c01[:, None], weight_x[None, :])
    bottom = mix(c10[:, None], c11[:, None], weight_x[None, :])
    logit = mix(top[None, :, :], bottom[None, :, :], weight_y[:, None, None])
    return tl.where((k < cell[2])[None, :, None], logit, -float("inf"))


@triton.jit
def exponentials(cell, k, shift, weights, FAR: tl.constexpr, dtype: tl.constexpr):
    """``(BLOCK_Y, BLOCK_K, BLOCK_X)`` exp(logit - base), in FAR cells exp(logit - shift); 0 past the last class."""
    if FAR:
        e = tl.exp2((far_logits(cell, k, weights, dtype) - shift[:, None, :]) * LOG2_E)
    else:
        top, rise = edges(cell, k, weights[1], dtype)
        e = tl.exp2(top[None, :, :] + weights[0][:, None, None] * rise[None, :, :])
    return e


@triton.jit
def sum_exponentials(cell, offs_k, weights, FAR: tl.constexpr, dtype: tl.constexpr):
    """``(BLOCK_Y, BLOCK_X)`` shift, the pixels' maxima in FAR cells and else 0, and sums of the exponentials.

    A maximum drops NaN on a GPU. The sum does not.
    """
    num_classes = cell[2]
    BLOCK_Y: tl.constexpr = weights[0].shape[0]
    BLOCK_X: tl.constexpr = weights[1].shape[0]
    BLOCK_K: tl.constexpr = offs_k.shape[0]
    shift = tl.zeros((BLOCK_Y, BLOCK_X), dtype)
    if FAR:
        largest = tl.full((BLOCK_Y, BLOCK_K, BLOCK_X), -float("inf"), dtype)
        for start in range(0, num_classes, BLOCK_K):
            largest = tl.maximum(largest, far_logits(cell, start + offs_k, weights, dtype))
        shift = tl.max(largest, 1)
    exp_sum = tl.zeros((BLOCK_Y, BLOCK_K, BLOCK_X), dtype)
    for start in range(0, num_classes, BLOCK_K):
        exp_sum += exponentials(cell, start + offs_k, shift, weights, FAR, dtype)
    return shift, tl.sum(exp_sum, 1)
