"""Cells of a bilinear resize in Triton: geometry, corner values, and the sum of the gradients that cells leave.

Cell (cy, cx) of ``h x w`` holds the outputs that mix inputs (cy, cx), (cy, cx + 1), (cy + 1, cx), (cy + 1, cx + 1),
its corners, clamped at the far border. Outputs before the first centre belong to cell 0, where their upper weight is
clamped to 0, as in PyTorch. A backward kernel leaves each cell's share of its corners' gradients in a float scratch
``(splits, B, h, w, 4, K)``; ``sum_corners`` adds up what meets at an input, always in the same order: no atomics.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..bilinear import Axis
from .common import LOG2_E, Specialization, cell_start

SAFE_SPREAD = tl.constexpr(32.0)  # exp(-32) is far from underflow
PADDING = tl.constexpr(-3e38)  # of classes that do not exist; finite, because 0 * inf is NaN

GEOMETRY = ["height", "width", "step_y", "offset_y", "denominator_y", "kept_y"]
GEOMETRY += ["step_x", "offset_x", "denominator_x", "kept_x"]


def geometry(ys: Axis, xs: Axis) -> dict[str, int]:
    """The launch arguments named in ``GEOMETRY``."""
    values: dict[str, int] = {"height": ys.size_in, "width": xs.size_in}
    for name, axis in (("y", ys), ("x", xs)):
        values |= {f"{field}_{name}": getattr(axis, field) for field in ("step", "offset", "denominator", "kept")}
    return values


def strides(prefix: str, axes: str, tensor: Tensor) -> dict[str, int]:
    """The launch arguments ``prefix`` + axis, a letter for each axis."""
    return {prefix + axis: stride for axis, stride in zip(axes, tensor.stride(), strict=True)}


class Launch(NamedTuple):
    """Outputs and classes of a tile, classes of a walk along the corners alone, and how a program runs them."""

    block_y: int
    block_x: int
    block_k: int
    block_c: int
    num_warps: int
    num_stages: int

    def blocks(self) -> dict[str, int]:
        """The launch arguments BLOCK_Y, BLOCK_X, BLOCK_K and BLOCK_C."""
        return {f"BLOCK_{axis}": getattr(self, f"block_{axis.lower()}") for axis in "YXKC"}

    def options(self) -> dict[str, int]:
        """The launch options."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def fit_tile(num_classes: int, longest_y: int, longest_x: int, most: int) -> Launch:
    """Tiles of at most ``most`` logits, 8 to a thread (one warp takes 512), and the widest block that pads little."""
    block_y, block_x = (min(triton.next_power_of_2(longest), 16) for longest in (longest_y, longest_x))
    pixels, padded = block_y * block_x, max(triton.next_power_of_2(num_classes), 8)
    least, widest = min(512 // pixels, padded), min(most // pixels, 256)
    choices = [block for block in (8, 16, 32, 64, 128, 256) if least <= block <= widest]
    taken = {block: -(-num_classes // block) * block for block in choices}
    block_k = max(block for block in choices if 10 * taken[block] <= 11 * min(taken.values()))
    num_warps = pixels * block_k // 256 if pixels * block_k > 512 else 1
    return Launch(block_y, block_x, block_k, min(padded, 256), num_warps, num_stages=1)


def splits_of(ys: Axis, xs: Axis, batch: int, block_y: int, block_x: int) -> int:
    """Into how many programs to split a cell: one, unless the cells are too few to fill a device."""
    cell_tiles = -(-ys.longest_cell // block_y) * -(-xs.longest_cell // block_x)
    return min(cell_tiles, -(-512 // max(batch * ys.size_in * xs.size_in, 1)))


@triton.jit
def cell_outputs(cell, step, offset, denominator, kept):
    """First kept output of ``cell`` and one past its last."""
    first = tl.where(cell == 0, 0, cell_start(cell, step, offset, denominator, kept))
    return first, cell_start(cell + 1, step, offset, denominator, kept)


@triton.jit
def upper_weights(outputs, end, cell, step, offset, denominator, dtype: tl.constexpr):
    """Weight of input ``cell + 1`` at ``outputs`` of ``cell``; past its ``end``, that of its last one."""
    numerator = tl.minimum(outputs, end - 1) * step + offset - cell * denominator
    return tl.maximum(numerator, 0).to(dtype) / denominator


@triton.jit
def bounds(corner_ptrs, offs_c, stride_k, num_classes, dtype: tl.constexpr, BLOCK_C: tl.constexpr):
    """The largest corner of all classes, and the largest of the classes' smallest ones: no pixel's maximum is lower."""
    highest = tl.full((BLOCK_C,), -float("inf"), dtype)
    lowest = tl.full((BLOCK_C,), -float("inf"), dtype)
    for start in range(0, num_classes, BLOCK_C):
        k = start + offs_c
        mask = k < num_classes
        offsets = k.to(tl.int64) * stride_k
        c00 = tl.load(corner_ptrs[0] + offsets, mask=mask, other=-float("inf")).to(dtype)
        c01 = tl.load(corner_ptrs[1] + offsets, mask=mask, other=-float("inf")).to(dtype)
        c10 = tl.load(corner_ptrs[2] + offsets, mask=mask, other=-float("inf")).to(dtype)
        c11 = tl.load(corner_ptrs[3] + offsets, mask=mask, other=-float("inf")).to(dtype)
        highest = tl.maximum(highest, tl.maximum(tl.maximum(c00, c01), tl.maximum(c10, c11)))
        lowest = tl.maximum(lowest, tl.minimum(tl.minimum(c00, c01), tl.minimum(c10, c11)))
    return tl.max(highest, 0), tl.max(lowest, 0)


@triton.jit
def corner_logits(corner_ptrs, offsets, mask, base, scale: tl.constexpr, dtype: tl.constexpr):
    """The four corners minus ``base``, times ``scale``; PADDING where ``mask`` is false."""
    c00 = (tl.load(corner_ptrs[0] + offsets, mask=mask, other=0.0).to(dtype) - base) * scale
    c01 = (tl.load(corner_ptrs[1] + offsets, mask=mask, other=0.0).to(dtype) - base) * scale
    c10 = (tl.load(corner_ptrs[2] + offsets, mask=mask, other=0.0).to(dtype) - base) * scale
    c11 = (tl.load(corner_ptrs[3] + offsets, mask=mask, other=0.0).to(dtype) - base) * scale
    return (
        tl.where(mask, c00, PADDING),
        tl.where(mask, c01, PADDING),
        tl.where(mask, c10, PADDING),
        tl.where(mask, c11, PADDING),
    )


@triton.jit
def mix(lower, upper, weight, EXACT: tl.constexpr):
    """``(1 - weight) * lower + weight * upper``; EXACT: rounded as PyTorch's, else one multiply-add, by the rise.

    Where ``lower`` is -inf the rise is ``upper`` itself, which keeps -inf and, at weight 0, PyTorch's 0 * inf = NaN.
    """
    if EXACT:
        return (1 - weight) * lower + weight * upper
    else:
        return lower + weight * tl.where(lower == -float("inf"), upper, upper - lower)


@triton.jit
def logits(corner_ptrs, k, stride_k, num_classes, base, weight_y, weight_x, FAR: tl.constexpr, dtype: tl.constexpr):
    """``(BLOCK_Y, BLOCK_X, BLOCK_K)`` logits minus ``base``; unless FAR, in units of log 2."""
    scale: tl.constexpr = 1.0 if FAR else LOG2_E
    c00, c01, c10, c11 = corner_logits(corner_ptrs, k.to(tl.int64) * stride_k, k < num_classes, base, scale, dtype)
    # Along x first: a thread holds a column of pixels, for which that is one pair of values.
    top = mix(c00[None, :], c01[None, :], weight_x[:, None], FAR)
    bottom = mix(c10[None, :], c11[None, :], weight_x[:, None], FAR)
    return mix(top[None, :, :], bottom[None, :, :], weight_y[:, None, None], FAR)


@triton.jit
def log_sum_exp(
    corner_ptrs,
    stride_k,
    num_classes,
    base,
    far,
    weight_y,
    weight_x,
    dtype: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``(BLOCK_Y, BLOCK_X)`` shift and log2 sum_k exp(logit - base - shift); the shift is 0 unless ``far``."""
    offs_k = tl.arange(0, BLOCK_K)
    exp_sum = tl.zeros((BLOCK_Y, BLOCK_X, BLOCK_K), dtype)
    if far:
        largest = tl.full((BLOCK_Y, BLOCK_X, BLOCK_K), -float("inf"), dtype)
        for start in range(0, num_classes, BLOCK_K):
            logit = logits(corner_ptrs, start + offs_k, stride_k, num_classes, base, weight_y, weight_x, True, dtype)
            largest = tl.maximum(largest, logit)
        shift = tl.max(largest, 2)
        for start in range(0, num_classes, BLOCK_K):
            logit = logits(corner_ptrs, start + offs_k, stride_k, num_classes, base, weight_y, weight_x, True, dtype)
            exp_sum += tl.exp2((logit - shift[:, :, None]) * LOG2_E)
    else:
        shift = tl.zeros((BLOCK_Y, BLOCK_X), dtype)
        for start in range(0, num_classes, BLOCK_K):
            logit = logits(corner_ptrs, start + offs_k, stride_k, num_classes, base, weight_y, weight_x, False, dtype)
            exp_sum += tl.exp2(logit)
    return shift, tl.log2(tl.sum(exp_sum, 2))


@triton.jit
def probabilities(
    corner_ptrs, k, stride_k, num_classes, base, far, shift, log_sum, weight_y, weight_x, dtype: tl.constexpr
):
    """``(BLOCK_Y, BLOCK_X, BLOCK_K)`` softmax; far logits take more operations and fewer roundings."""
    if far:
        logit = logits(corner_ptrs, k, stride_k, num_classes, base, weight_y, weight_x, True, dtype)
        p = tl.exp2((logit - shift[:, :, None]) * LOG2_E - log_sum[:, :, None])
    else:
        logit = logits(corner_ptrs, k, stride_k, num_classes, base, weight_y, weight_x, False, dtype)
        p = tl.exp2(logit - log_sum[:, :, None])
    return p


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def to_corners(grad, weight_y, weight_x):
    """The transpose of the resize: ``(BLOCK_Y, BLOCK_X, BLOCK_K)`` -> ``(BLOCK_K,)`` for each corner."""
    bottom = tl.sum(grad * weight_y[:, None, None], 0)  # (BLOCK_X, BLOCK_K)
    top = tl.sum(grad, 0) - bottom
    right = weight_x[:, None]
    # One reduction of four values: it synchronises the warps once.
    return tl.reduce((top * (1 - right), top * right, bottom * (1 - right), bottom * right), 0, _add4)


@triton.jit
def add_corners(scratch_ptr, corners, k, num_classes, again):
    """Store ``(BLOCK_K,)`` for each corner in a cell's ``(4, K)`` scratch, or ``again``: add."""
    mask = k < num_classes
    for corner in tl.static_range(4):
        ptrs = scratch_ptr + num_classes.to(tl.int64) * corner + k
        before = tl.load(ptrs, mask=mask & again, other=0.0)
        tl.store(ptrs, before + corners[corner], mask=mask)


@triton.jit(do_not_specialize=["num_classes", "height", "width", "batch", "splits"])
def sum_corners_kernel(
    scratch_ptr,  # (splits, B, h, w, 4, K)
    grad_ptr,  # (B, K, h, w)
    num_classes,
    height,
    width,
    batch,
    splits,
    BLOCK_K: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """BLOCK_X inputs of one row, BLOCK_K classes."""
    blocks_x = tl.cdiv(width, BLOCK_X)
    blocks_k = tl.cdiv(num_classes, BLOCK_K)
    pid = tl.program_id(0).to(tl.int64)
    row = pid // (blocks_x * blocks_k) % height
    b = pid // (blocks_x * blocks_k) // height
    offs_x = pid // blocks_k % blocks_x * BLOCK_X + tl.arange(0, BLOCK_X)
    offs_k = pid % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < num_classes
    mask_x = offs_x < width
    image = num_classes.to(tl.int64) * 4 * width * height
    acc = tl.zeros((BLOCK_X, BLOCK_K), scratch_ptr.dtype.element_ty)
    for split in range(splits):
        base = scratch_ptr + (split * batch.to(tl.int64) + b) * image
        for lower in tl.static_range(2):  # the corner of its cell that this row is: 1 is the lower edge
            for right in tl.static_range(2):
                # The last row is both edges of the last cell, the last column likewise.
                for last_row in tl.static_range(lower + 1):
                    for last_col in tl.static_range(right + 1):
                        cell_y = row - lower + last_row
                        cell_x = offs_x - right + last_col
                        inside_y = (cell_y >= 0) & ((last_row == 0) | (row == height - 1))
                        inside_x = (cell_x >= 0) & ((last_col == 0) | (offs_x == width - 1)) & mask_x
                        cell = (cell_y * width + cell_x) * 4 + 2 * lower + right
                        ptrs = base + cell[:, None] * num_classes + offs_k[None, :]
                        acc += tl.load(ptrs, mask=(inside_x & inside_y)[:, None] & mask_k[None, :], other=0.0)
    ptrs = grad_ptr + ((b * num_classes + offs_k[None, :]) * height + row) * width + offs_x[:, None]
    tl.store(ptrs, acc.to(grad_ptr.dtype.element_ty), mask=mask_x[:, None] & mask_k[None, :])


def sum_corners(scratch: Tensor, grad: Tensor) -> Tensor:
    """``(splits, B, h, w, 4, K)`` -> contiguous ``(B, K, h, w)`` ``grad``, which is written and returned."""
    batch, num_classes, height, width = grad.shape
    block_k, block_x = 32, min(32, triton.next_power_of_2(width))
    grid = batch * height * -(-width // block_x) * -(-num_classes // block_k)
    sum_corners_kernel[(grid,)](
        scratch_ptr=scratch,
        grad_ptr=grad,
        num_classes=num_classes,
        height=height,
        width=width,
        batch=batch,
        splits=scratch.shape[0],
        BLOCK_K=block_k,
        BLOCK_X=block_x,
        num_warps=4,
    )
    return grad


def specializations(arch: str) -> Iterator[Specialization]:
    """The builds that ``aot`` checks."""
    for dtype in ("bf16", "fp32"):
        yield Specialization(
            f"sum_corners {dtype}",
            sum_corners_kernel,
            {"scratch_ptr": "*fp32", "grad_ptr": f"*{dtype}"}
            | dict.fromkeys(("num_classes", "height", "width", "batch", "splits"), "i32"),
            {"BLOCK_K": 32, "BLOCK_X": 32},
            {"num_warps": 4},
        )
