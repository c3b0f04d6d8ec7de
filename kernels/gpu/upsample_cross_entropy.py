"""Cross-entropy of bilinearly upsampled masks in Triton; the forward pass leaves the gradient of the masks.

With logits l (B, K, H', W'), target t, class weights v, smoothing e, V = sum_k v_k and a loss gradient g per pixel:
    loss = (1 - e) v_t (lse - l_t) + e / K (V lse - sum_k v_k l_k)
    grad_k = g (f softmax_k - (1 - e) v_t [k = t] - e v_k / K),  f = (1 - e) v_t + e V / K      both 0 where ignored
The mean divides by the sum of v_t over the pixels that count. A target that is no class makes it NaN, and so loss and
gradient. Nothing waits for the device, so that a CUDA graph can hold the launches.
One program owns a segment of a row of cells (cells.py). Of each tile, a first pass over the classes sums the
exponentials, a second computes them again for the gradient of the corners, sum_y u e_k and sum_y w_y u e_k with
u = g f / sum_k e_k. Linear terms, sum_k v_k l_k and its gradient, are rank one and stay outside the tile.

Saved for the backward, "mean" and "sum": parts ``(B, h, columns, 2, K)``, the gradients that each row of cells leaves
for the inputs above and below it, and after them one scale, 1 / the mean's divisor. The backward adds up to four parts
for each input, always in the same order. "none" has one gradient per pixel: its backward runs the same kernel again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bilinear import Axis, shape_on_grid
from ..loss_options import SEGMENT, LossOptions, size_of_parts
from ..registry import statistics_dtype
from .cells import GEOMETRY, Tiles, cell_start, geometry, open_corners, open_tile
from .common import TRITON_3_6, cdiv, device_arch, launch_arguments, next_power_of_2, programs
from .corners import sum_parts
from .cross_entropy_tile import IGNORED, linear_terms, load_tile, read_target, tile_loss
from .groups import contiguous, strides_on_grid


@triton.jit(do_not_specialize=["batch", "num_classes", "ignore_index", "splits", *GEOMETRY])
def cross_entropy_kernel(
    masks_ptr,  # (B, K, h, w), or with an index (B, K, groups)
    index_ptr,  # (B, h, w) groups of the inputs, contiguous, or None
    target_ptr,  # (B, H', W')
    weight_ptr,  # (K,) or None
    grad_loss_ptr,  # (B, H', W'), or None: all 1
    loss_ptr,  # (B, H', W') contiguous; or (3, programs): sums of losses and weights, and pixels that count; or None
    parts_ptr,  # (splits, B, h, columns, 2, K), or None: no gradient
    masks_strides, target_strides, grad_loss_strides,
    batch, num_classes, ignore_index, splits,
    size_in_y, size_out_y, kept_y, step_y, offset_y, denominator_y,
    size_in_x, size_out_x, kept_x, step_x, offset_x, denominator_x,
    SMOOTHING: tl.constexpr, PER_PIXEL: tl.constexpr, SEGMENT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if masks_ptr.dtype.element_ty == tl.float64 else tl.float32
    integer: tl.constexpr = tl.int64 if WIDE else tl.int32
    ys = Axis(size_in_y, size_out_y, kept_y, step_y, offset_y, denominator_y)
    xs = Axis(size_in_x, size_out_x, kept_x, step_x, offset_x, denominator_x)
    segments = tl.cdiv(size_in_x, SEGMENT)
    pid = tl.program_id(0).to(integer)
    segment = pid % segments
    line = pid // segments  # (splits, B, h)
    cell_y = line % size_in_y
    b = (line // size_in_y % batch).to(tl.int64)
    split = line // size_in_y // batch
    rows = cell_y, tl.where(cell_y == 0, 0, cell_start(cell_y, ys)), cell_start(cell_y + 1, ys)
    first_cell = segment * SEGMENT
    cells = tl.minimum(size_in_x - first_cell, SEGMENT)
    offs_k, offs_c = tl.arange(0, BLOCK_K).to(integer), tl.arange(0, BLOCK_C).to(integer)
    apart_y = (cell_y + 1 < size_in_y) & (step_y != denominator_y)  # else both rows of corners are the same inputs
    if parts_ptr is not None:
        columns = size_in_x + segments - 1
        parts_ptr += (line.to(tl.int64) * columns + first_cell + segment) * 2 * num_classes
        elements = (cells + (first_cell + cells < size_in_x)) * 2 * num_classes
        for start in range(0, elements, BLOCK_C):
            tl.store(parts_ptr + start + offs_c, tl.zeros((BLOCK_C,), dtype), mask=start + offs_c < elements)
        tl.debug_barrier()  # other threads add to them

    loss_sum = tl.zeros((BLOCK_X,), dtype)
    weight_sum = tl.zeros((BLOCK_X,), dtype)
    count = tl.zeros((BLOCK_X,), dtype)
    for index in range(0, cells):
        cell_x = first_cell + index
        cols = cell_x, tl.where(cell_x == 0, 0, cell_start(cell_x, xs)), cell_start(cell_x + 1, xs)
        tiles = tl.cdiv(rows[2] - rows[1], BLOCK_Y) * tl.cdiv(cols[2] - cols[1], BLOCK_X)
        if split < tiles:
            cell, far = open_corners(
                masks_ptr, masks_strides, index_ptr, num_classes, b, cell_y, cell_x, ys, xs, offs_c, dtype
            )
            apart = apart_y, (cell_x + 1 < size_in_x) & (step_x != denominator_x)
            linear = 0.0, 0.0, 0.0, 0.0, 0.0
            if SMOOTHING > 0:
                linear = linear_terms(cell, weight_ptr, offs_c, dtype)
            for tile in range(split, tiles, splits):
                offs_y, offs_x, mask, weights = open_tile(tile, rows, cols, ys, xs, dtype, BLOCK_Y, BLOCK_X)
                target = load_tile(target_ptr, target_strides, b, offs_y, offs_x, mask).to(tl.int64)
                target, weight = read_target(target, mask, weight_ptr, num_classes, ignore_index, dtype)
                counts = target != IGNORED
                grad_loss = counts.to(dtype)
                if grad_loss_ptr is not None:
                    grad_loss *= load_tile(grad_loss_ptr, grad_loss_strides, b, offs_y, offs_x, counts)
                pixels = target, weight, grad_loss
                if not PER_PIXEL:
                    weight_sum += tl.sum(weight, 0)
                    if weight_ptr is not None:
                        count += tl.sum(counts.to(dtype), 0)
                if far:
                    loss = tile_loss(
                        cell, linear, pixels, weights, apart, offs_k, parts_ptr, weight_ptr, True, SMOOTHING, PER_PIXEL
                    )
                else:
                    loss = tile_loss(
                        cell, linear, pixels, weights, apart, offs_k, parts_ptr, weight_ptr, False, SMOOTHING, PER_PIXEL
                    )
                if PER_PIXEL:
                    loss_ptrs = loss_ptr + (b * kept_y + offs_y[:, None]) * kept_x + offs_x[None, :]
                    tl.store(loss_ptrs, loss, mask=(offs_y < rows[2])[:, None] & (offs_x < cols[2])[None, :])
                else:
                    loss_sum += loss
                if parts_ptr is not None:
                    tl.debug_barrier()  # the next tile adds to what other threads stored
        if parts_ptr is not None:
            parts_ptr += 2 * num_classes
        split = (split + 1) % splits
    if loss_ptr is not None and not PER_PIXEL:
        loss_ptr += pid
        tl.store(loss_ptr, tl.sum(loss_sum, 0))
        tl.store(loss_ptr + tl.num_programs(0), tl.sum(weight_sum, 0))
        if weight_ptr is None:
            count = weight_sum
        tl.store(loss_ptr + 2 * tl.num_programs(0), tl.sum(count, 0))


@triton.jit(do_not_specialize=["programs", "elements"])
def reduce_loss_kernel(
    sums_ptr,  # (3, programs): losses, weights, pixels that count
    loss_ptr,  # ()
    parts_ptr,  # (elements + 1,), or None: the scale is not wanted
    programs, elements,
    MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss, and 1 / divisor of the mean behind the parts; 0 where no pixel counts: then the parts are 0, too."""
    loss = tl.zeros((BLOCK,), tl.float64)
    weight = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, programs, BLOCK):
        offs = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = offs < programs
        loss += tl.load(sums_ptr + offs, mask=mask, other=0.0)
        weight += tl.load(sums_ptr + programs + offs, mask=mask, other=0.0)
        count += tl.load(sums_ptr + 2 * programs.to(tl.int64) + offs, mask=mask, other=0.0)
    total, divisor = tl.sum(loss, 0), tl.sum(weight, 0)
    scale = tl.where(tl.sum(count, 0) == 0, 0.0, float("nan")).to(tl.float64)
    if MEAN:
        scale = tl.where(divisor == 0, scale, 1 / divisor)
        total = tl.where(divisor == 0, float("nan"), total / divisor)
    else:
        scale = 1.0
    tl.store(loss_ptr, total)
    if parts_ptr is not None:
        tl.store(parts_ptr + elements, scale)


class Plan(NamedTuple):
    """Launch for one problem: programs of a segment, programs of all, and arguments that depend on sizes alone."""

    splits: int
    programs: int
    arguments: dict[str, Any]


def launch_config(num_classes: int, longest_y: int, longest_x: int, arch: str) -> Tiles:
    """16 logits to a thread, which holds all rows; lanes hold columns and classes, up to four warps more classes."""
    block_y, block_x = (min(next_power_of_2(longest), 16) for longest in (longest_y, longest_x))
    padded, pixels = next_power_of_2(num_classes), block_y * block_x
    block_k = min(max(512 // pixels, 8), padded, 256)
    if arch == "sm_90" and not TRITON_3_6:  # one warp, which needs no barriers; Triton 3.6 spills there
        block_k = min(block_k, max(512 // pixels, 1))
    lanes = 32 if arch.startswith("sm_") else 64
    return Tiles(block_y, block_x, block_k, min(padded, 256), max(pixels * block_k // (16 * lanes), 1), num_stages=1)


@lru_cache(maxsize=256)
def plan(
    shape: Sequence[int], kept: Sequence[int], strides: Sequence[Sequence[int]], size: Sequence[int],
    align_corners: bool, arch: str, lean: bool, double: bool,
) -> Plan:  # fmt: skip
    """Tiles, and programs: one for a segment, unless the segments are too few to fill a device.

    ``strides`` are those of the masks, of the target and of other tensors like it. ``lean``: the kernel fits the
    registers of twelve warps a multiprocessor. ``double``: float64, of which a thread holds fewer rows.
    """
    batch, num_classes, *grid = shape
    ys, xs = (Axis.make(*axis, align_corners) for axis in zip(grid, size, kept, strict=True))
    shapes = (shape, *[(batch, *kept)] * (len(strides) - 1))
    pairs = (zip(of[1:], steps[1:], strict=True) for of, steps in zip(shapes, strides, strict=True))
    offsets = [sum((n - 1) * step for n, step in one) for one in pairs]  # the largest within an image
    tiles = launch_config(num_classes, ys.longest_cell, xs.longest_cell, arch)
    if double:
        tiles = tiles._replace(block_y=min(tiles.block_y, 8))
    segments = batch * ys.size_in * cdiv(xs.size_in, SEGMENT)
    cell_tiles = cdiv(ys.longest_cell, tiles.block_y) * cdiv(xs.longest_cell, tiles.block_x)
    splits = min(cell_tiles * min(SEGMENT, xs.size_in), cdiv(256, max(segments, 1)))
    (launched,) = programs(segments * splits, masks=shape)
    products = [axis.size_in * axis.denominator + (axis.kept + 16) * axis.step + abs(axis.offset) for axis in (ys, xs)]
    arguments: dict[str, Any] = geometry(ys, xs) | launch_arguments(tiles)
    arguments |= {"batch": batch, "num_classes": num_classes, "splits": splits, "SEGMENT": SEGMENT}
    arguments["WIDE"] = max(*products, *offsets, 10 * num_classes) >= 1 << 31
    if arch.startswith("sm_"):
        # Triton 3.6 needs more for 16 x 16 pixels of few classes, and on sm_80 of many.
        wider = TRITON_3_6 and tiles.block_y * tiles.block_x == 256 and (tiles.block_c < 256 or arch == "sm_80")
        arguments["maxnreg"] = 255 if not lean or arguments["WIDE"] else 224 if wider else 168
    return Plan(splits, launched, arguments)


def upsample_cross_entropy(
    masks: Tensor, target: Tensor, options: LossOptions, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """Loss and, where asked for, the parts of the gradient of the masks with their scale; else an empty tensor."""
    dtype, per_pixel = statistics_dtype(masks.dtype), options.reduction == "none"
    cells = _plan(masks, target, options)
    elements = size_of_parts(*shape_on_grid(masks, options.groups)) if with_grad else 0
    parts = masks.new_empty((elements,), dtype=dtype)
    losses = masks.new_empty(target.shape if per_pixel else (3, cells.programs), dtype=dtype)
    _launch(cells, masks, target, None, losses, parts if with_grad else None, options)
    if per_pixel:
        return losses, parts
    loss = masks.new_empty((), dtype=dtype)
    reduce_loss_kernel[(1,)](
        sums_ptr=losses,
        loss_ptr=loss,
        parts_ptr=parts if with_grad else None,
        programs=cells.programs,
        elements=parts.numel() - 1,
        MEAN=options.reduction == "mean",
        BLOCK=1024,
        num_warps=8,
    )
    return loss, parts


def scale_gradient(grad_loss: Tensor, parts: Tensor, masks: Tensor, index: Tensor | None = None) -> Tensor:
    """Gradient of the masks for a gradient of the loss, from what the forward pass left."""
    return sum_parts(parts, grad_loss, masks, index)


def pixel_backward(grad_loss: Tensor, masks: Tensor, target: Tensor, options: LossOptions) -> Tensor:
    """Gradient of the masks for a loss gradient per pixel (reduction "none")."""
    elements = size_of_parts(*shape_on_grid(masks, options.groups))
    parts = masks.new_empty(elements, dtype=statistics_dtype(masks.dtype))
    _launch(_plan(masks, target, options, grad_loss), masks, target, grad_loss, None, parts, options)
    return sum_parts(parts, None, masks, options.groups)


def _plan(masks: Tensor, target: Tensor, options: LossOptions, *others: Tensor) -> Plan:
    double = masks.dtype == torch.float64
    lean = not double and options.weight is None and not options.label_smoothing
    lean = lean and (options.reduction != "none" or bool(others))  # losses of pixels take more registers to store
    lean = lean and (options.groups is None or device_arch(masks) == "sm_90")  # groups take more registers
    strides = (strides_on_grid(masks, options.groups), target.stride(), *(other.stride() for other in others))
    shape, size, kept = shape_on_grid(masks, options.groups), tuple(options.size), target.shape[1:]
    return plan(shape, kept, strides, size, options.align_corners, device_arch(masks), lean, double)


def _launch(
    cells: Plan,
    masks: Tensor,
    target: Tensor,
    grad_loss: Tensor | None,
    losses: Tensor | None,
    parts: Tensor | None,
    options: LossOptions,
) -> None:
    """Write the losses, per pixel or as sums of each program, and the parts, where they are given."""
    if not cells.programs:
        return
    scratch = parts
    if parts is not None and cells.splits > 1:
        scratch = parts.new_empty((cells.splits, parts.numel() - 1))
    cross_entropy_kernel[(cells.programs,)](
        masks_ptr=masks,
        index_ptr=contiguous(options.groups),
        target_ptr=target,
        weight_ptr=options.weight,
        grad_loss_ptr=grad_loss,
        loss_ptr=losses,
        parts_ptr=scratch,
        masks_strides=strides_on_grid(masks, options.groups),
        target_strides=target.stride(),
        grad_loss_strides=None if grad_loss is None else grad_loss.stride(),
        ignore_index=options.ignore_index,
        SMOOTHING=options.label_smoothing,
        PER_PIXEL=losses is not None and options.reduction == "none",
        **cells.arguments,
    )
    if parts is not None and scratch is not None and scratch is not parts:
        torch.sum(scratch, 0, out=parts[:-1])
