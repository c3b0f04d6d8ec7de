"""``upsample_argmax``, ``upsample_softmax``, ``upsample_cross_entropy``: checks, registration, first derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cpu import upsample_argmax as cpu_argmax
from ..cpu import upsample_cross_entropy as cpu_cross_entropy
from ..cpu import upsample_softmax as cpu_softmax
from ..loss_options import LossOptions
from ..registry import (
    autocast_dtype,
    define,
    differentiable,
    once_differentiable,
    refuse_forward_mode,
    statistics_dtype,
)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TARGETS = (torch.int64, torch.int32, torch.int16, torch.uint8)
_REDUCTIONS = ("mean", "sum", "none")
Size = Sequence[int]


def _check_masks(masks: Tensor) -> None:
    if masks.ndim != 4:
        raise ValueError(f"masks must be (B, K, h, w), got {tuple(masks.shape)}")
    if masks.dtype not in _FLOATS:
        raise TypeError(f"masks must be float32, bfloat16, float16 or float64, got {masks.dtype}")
    if min(masks.shape[1:]) < 1:
        raise ValueError(f"masks must have at least one class, row and column, got {tuple(masks.shape)}")


def _check_sizes(size: Size, crop: Size | None) -> tuple[list[int], list[int]]:
    size = list(size)
    crop = size if crop is None else list(crop)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be two positive integers (H, W), got {size}")
    if len(crop) != 2 or min(crop) < 1 or crop[0] > size[0] or crop[1] > size[1]:
        raise ValueError(f"crop must be two positive integers of at most size {size}, got {crop}")
    return size, crop


def upsample_argmax(masks: Tensor, size: Size, crop: Size | None = None, align_corners: bool = False) -> Tensor:
    """``interpolate(masks, size, mode="bilinear")[..., :crop].argmax(1)`` without the interpolated logits.

    Args:
        masks: ``(B, K, h, w)`` floating point scores, any strides.
        size: ``(H, W)`` to resize to, any ratio.
        crop: ``(H', W')``, the top-left part that is kept; all of it if not given.
        align_corners: as in ``torch.nn.functional.interpolate``.

    Returns:
        ``(B, H', W')`` labels, uint8 where K <= 256 and int32 otherwise. Ties go to the lowest class; a class that
        is NaN at a pixel wins there, as in ``torch.argmax``. Not differentiable.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is allowed.
    """
    _check_masks(masks)
    size, crop = _check_sizes(size, crop)
    return torch.ops.segmenter_fast.upsample_argmax(masks.detach(), size, crop, align_corners)


def upsample_softmax(masks: Tensor, size: Size, crop: Size | None = None, align_corners: bool = False) -> Tensor:
    """``interpolate(masks, size, mode="bilinear")[..., :crop].softmax(1)`` in one pass; differentiable once.

    Arguments and errors are those of ``upsample_argmax``. Returns ``(B, K, H', W')`` probabilities in the dtype of
    ``masks``; float32 under autocast, as ``torch.softmax``.
    """
    _check_masks(masks)
    size, crop = _check_sizes(size, crop)
    if autocast_dtype(masks) is not None and masks.dtype != torch.float64:
        masks = masks.float()
    refuse_forward_mode("upsample_softmax", masks)
    return torch.ops.segmenter_fast.upsample_softmax(masks, size, crop, align_corners)


def upsample_cross_entropy(
    masks: Tensor,
    target: Tensor,
    size: Size | None = None,
    ignore_index: int = 255,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    align_corners: bool = False,
) -> Tensor:
    """``cross_entropy(interpolate(masks, size, mode="bilinear"), target)`` without the interpolated logits.

    Args:
        masks: ``(B, K, h, w)`` floating point scores, any strides.
        target: ``(B, H', W')`` class indices: int64, int32, int16 or uint8.
        size: ``(H, W)`` to resize to; the target's if not given. A smaller target is its top-left crop.
        ignore_index: target value that contributes neither loss nor gradient.
        weight: ``(K,)`` class weights, as in ``torch.nn.functional.cross_entropy``.
        label_smoothing: in [0, 1], as there.
        reduction: "mean", "sum" or "none".
        align_corners: as in ``torch.nn.functional.interpolate``.

    Returns:
        A scalar, or ``(B, H', W')`` for "none": float32 (float64 for float64 masks). The mean over no pixel is NaN,
        as PyTorch's. Differentiable once, with respect to ``masks``.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is allowed.
        IndexError: a target outside [0, K) other than ``ignore_index``, on the CPU. On a GPU, where looking would
            stall the device, such a target makes the loss and its gradient NaN.
    """
    _check_masks(masks)
    if target.ndim != 3 or target.shape[0] != masks.shape[0] or min(target.shape[1:]) < 1:
        raise ValueError(f"target must be ({masks.shape[0]}, H, W), got {tuple(target.shape)}")
    if target.dtype not in _TARGETS:
        raise TypeError(f"target must be int64, int32, int16 or uint8, got {target.dtype}")
    if target.device != masks.device:
        raise ValueError(f"masks and target must be on one device, got {masks.device} and {target.device}")
    size, _ = _check_sizes(target.shape[1:] if size is None else size, target.shape[1:])
    if weight is not None and weight.shape != (masks.shape[1],):
        raise ValueError(f"weight must be ({masks.shape[1]},), got {tuple(weight.shape)}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    if weight is not None:
        if weight.device != masks.device:
            raise ValueError(f"masks and weight must be on one device, got {masks.device} and {weight.device}")
        weight = weight.detach().to(statistics_dtype(masks.dtype)).contiguous()
    with_grad = torch.is_grad_enabled() and masks.requires_grad and reduction != "none"
    refuse_forward_mode("upsample_cross_entropy", masks)
    return torch.ops.segmenter_fast.upsample_cross_entropy(
        masks, target, size, ignore_index, weight, label_smoothing, reduction, align_corners, with_grad
    )[0]


def _fake_argmax(masks: Tensor, size: Size, crop: Size, align_corners: bool) -> Tensor:
    labels = torch.uint8 if masks.shape[1] <= 256 else torch.int32
    return masks.new_empty((masks.shape[0], *crop), dtype=labels)


def _fake_softmax(masks: Tensor, size: Size, crop: Size, align_corners: bool) -> Tensor:
    return masks.new_empty((*masks.shape[:2], *crop))


def _fake_softmax_backward(grad: Tensor, probabilities: Tensor, grid: Size, size: Size, align: bool) -> Tensor:
    return probabilities.new_empty((*probabilities.shape[:2], *grid))


def _pack(masks: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor, LossOptions, bool]:
    """Arguments of ``upsample_cross_entropy``'s backends from those of its schema."""
    return masks, target, LossOptions(*options[:-1]), options[-1]


def _pack_pixel_backward(
    grad_loss: Tensor, masks: Tensor, target: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, LossOptions]:
    *others, align_corners = options
    return grad_loss, masks, target, LossOptions(*others, "none", align_corners)


def _fake_cross_entropy(masks: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    _, _, loss_options, with_grad = _pack(masks, target, *options)
    dtype = statistics_dtype(masks.dtype)
    loss = masks.new_empty(target.shape if loss_options.reduction == "none" else (), dtype=dtype)
    return loss, masks.new_empty(masks.shape if with_grad else (0,), dtype=dtype)


def _fake_scale(grad_loss: Tensor, grad_masks: Tensor, masks: Tensor) -> Tensor:
    return masks.new_empty(masks.shape)


def _fake_pixel_backward(grad_loss: Tensor, masks: Tensor, target: Tensor, *options: Any) -> Tensor:
    return masks.new_empty(masks.shape)


def _setup_softmax(ctx: Any, inputs: Any, output: Tensor) -> None:
    masks, ctx.size, _, ctx.align_corners = inputs
    ctx.grid = masks.shape[2:]
    ctx.save_for_backward(output)


def _softmax_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (probabilities,) = ctx.saved_tensors
    grad_masks = torch.ops.segmenter_fast.upsample_softmax_backward(
        grad, probabilities, ctx.grid, ctx.size, ctx.align_corners
    )
    return grad_masks, None, None, None


def _setup_cross_entropy(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    masks, target, options, _ = _pack(*inputs)
    ctx.options = options._replace(weight=None)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(masks, *((target, options.weight) if options.reduction == "none" else (output[1],)))


def _cross_entropy_backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    masks, *saved = ctx.saved_tensors
    if ctx.options.reduction == "none":
        target, weight = saved
        size, ignore_index, _, label_smoothing, _, align_corners = ctx.options
        grad_masks = torch.ops.segmenter_fast.upsample_cross_entropy_pixel_backward(
            grad_loss, masks, target, size, ignore_index, weight, label_smoothing, align_corners
        )
    else:
        grad_masks = torch.ops.segmenter_fast.upsample_cross_entropy_backward(grad_loss, *saved, masks)
    return grad_masks, *[None] * 8


define(
    "upsample_argmax(Tensor masks, SymInt[] size, SymInt[] crop, bool align_corners) -> Tensor",
    triton=".gpu.upsample_argmax:upsample_argmax",
    plain=cpu_argmax.upsample_argmax,
    fake=_fake_argmax,
)
define(
    "upsample_softmax(Tensor masks, SymInt[] size, SymInt[] crop, bool align_corners) -> Tensor",
    triton=".gpu.upsample_softmax:upsample_softmax",
    plain=cpu_softmax.upsample_softmax,
    fake=_fake_softmax,
)
define(
    "upsample_softmax_backward(Tensor grad, Tensor probabilities, SymInt[] grid, SymInt[] size, bool align_corners)"
    " -> Tensor",
    triton=".gpu.upsample_softmax:upsample_softmax_backward",
    plain=cpu_softmax.upsample_softmax_backward,
    fake=_fake_softmax_backward,
)
define(
    "upsample_cross_entropy(Tensor masks, Tensor target, SymInt[] size, int ignore_index, Tensor? weight,"
    " float label_smoothing, str reduction, bool align_corners, bool with_grad) -> (Tensor, Tensor)",
    triton=".gpu.upsample_cross_entropy:upsample_cross_entropy",
    plain=cpu_cross_entropy.upsample_cross_entropy,
    fake=_fake_cross_entropy,
    pack=_pack,
)
define(
    "upsample_cross_entropy_backward(Tensor grad_loss, Tensor grad_masks, Tensor masks) -> Tensor",
    triton=None,
    plain=cpu_cross_entropy.scale_gradient,
    fake=_fake_scale,
)
define(
    "upsample_cross_entropy_pixel_backward(Tensor grad_loss, Tensor masks, Tensor target, SymInt[] size,"
    " int ignore_index, Tensor? weight, float label_smoothing, bool align_corners) -> Tensor",
    triton=".gpu.upsample_cross_entropy:pixel_backward",
    plain=cpu_cross_entropy.pixel_backward,
    fake=_fake_pixel_backward,
    pack=_pack_pixel_backward,
)
differentiable("upsample_softmax", _softmax_backward, _setup_softmax)
differentiable("upsample_cross_entropy", _cross_entropy_backward, _setup_cross_entropy)
once_differentiable(
    "upsample_softmax_backward", "upsample_cross_entropy_backward", "upsample_cross_entropy_pixel_backward"
)
