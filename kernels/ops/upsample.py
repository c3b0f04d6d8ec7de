"""``upsample_argmax``, ``upsample_softmax``, ``upsample_cross_entropy``: argument checks, registration, derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..bilinear import shape_on_grid
from ..cpu import upsample_argmax as cpu_argmax
from ..cpu import upsample_cross_entropy as cpu_cross_entropy
from ..cpu import upsample_softmax as cpu_softmax
from ..loss_options import LossOptions, size_of_parts
from ..registry import (
    FLOATS,
    autocast_dtype,
    define,
    differentiable_gradients,
    label_dtype,
    refuse_forward_mode,
    require_dtype,
    require_one_device,
    runs_triton,
    statistics_dtype,
)

_TARGETS = (torch.int64, torch.int32, torch.int16, torch.uint8)
_REDUCTIONS = ("mean", "sum", "none")
Size = Sequence[int]


def _checked_sizes(
    masks: Tensor, index: Tensor | None, size: Size, crop: Size | None, crop_name: str = "crop"
) -> tuple[Size, Size]:
    """Check the arguments that all three ops have; return ``size`` and the size that is kept."""
    given = tuple(masks.shape)
    if index is None and masks.ndim != 4:
        raise ValueError(f"masks must be (B, K, h, w), got {given}; those of groups (B, K, M) need an index")
    if index is not None and masks.ndim != 3:
        raise ValueError(f"masks must be those of groups (B, K, M) where an index is given, got {given}")
    require_dtype("masks", masks, *FLOATS)
    if min(masks.shape[1:]) < 1:
        raise ValueError(f"masks must have at least one class, row and column, got {given}")
    if index is not None:
        require_dtype("index", index, torch.int64)
        if index.ndim != 3 or len(index) != len(masks) or min(index.shape[1:]) < 1:
            raise ValueError(f"index must be ({len(masks)}, h, w) for masks {given}, got {tuple(index.shape)}")
        require_one_device(masks=masks, index=index)
    size = list(size)
    crop = size if crop is None else list(crop)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be two positive integers (H, W), got {size}")
    if len(crop) != 2 or min(crop) < 1 or crop[0] > size[0] or crop[1] > size[1]:
        raise ValueError(f"{crop_name} must be two positive integers of at most size {size}, got {crop}")
    return size, crop


def upsample_argmax(
    masks: Tensor, size: Size, crop: Size | None = None, align_corners: bool = False, index: Tensor | None = None
) -> Tensor:
    """``interpolate(masks, size, mode="bilinear")[..., :crop].argmax(1)`` without the interpolated logits.

    Args:
        masks: ``(B, K, h, w)`` floating point scores, any strides. With an ``index`` ``(B, K, groups)``.
        size: ``(H, W)`` to resize to, any ratio.
        crop: ``(H', W')``, the top-left part that is kept; all of it if not given.
        align_corners: as in ``torch.nn.functional.interpolate``.
        index: ``(B, h, w)`` int64, the group of each patch, in [0, groups). A group's patches share its scores; the
            results are those of the gathered ``(B, K, h, w)``, which never exist.

    Returns:
        ``(B, H', W')`` labels, uint8 where K <= 256 and int32 otherwise. Ties go to the lowest class; a class that
        is NaN at a pixel wins there, as in ``torch.argmax``. Not differentiable.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is allowed.
        IndexError: an ``index`` outside [0, groups), on the CPU. A GPU does not check it.
    """
    size, crop = _checked_sizes(masks, index, size, crop)
    return torch.ops.segmenter_fast.upsample_argmax(masks.detach(), size, crop, align_corners, index)


define(
    "upsample_argmax(Tensor masks, SymInt[] size, SymInt[] crop, bool align_corners, Tensor? index=None) -> Tensor",
    triton=".gpu.upsample_argmax:upsample_argmax",
    plain=cpu_argmax.upsample_argmax,
    fake=lambda masks, size, crop, align_corners, index=None: masks.new_empty(
        (masks.shape[0], *crop), dtype=label_dtype(masks.shape[1])
    ),
)


def upsample_softmax(
    masks: Tensor, size: Size, crop: Size | None = None, align_corners: bool = False, index: Tensor | None = None
) -> Tensor:
    """``interpolate(masks, size, mode="bilinear")[..., :crop].softmax(1)`` in one pass; differentiable.

    Arguments and errors are those of ``upsample_argmax``. Returns ``(B, K, H', W')`` probabilities in the dtype of
    ``masks``; float32 under autocast, as ``torch.softmax``.
    """
    size, crop = _checked_sizes(masks, index, size, crop)
    refuse_forward_mode("upsample_softmax", masks)
    if autocast_dtype(masks):
        masks = masks.float()
    return torch.ops.segmenter_fast.upsample_softmax(masks, size, crop, align_corners, index)


def _setup_softmax(ctx: Any, inputs: Any, output: Tensor) -> None:
    masks, ctx.size, ctx.crop, ctx.align_corners, index = inputs
    ctx.save_for_backward(masks, output, index)


def _softmax_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    masks, probabilities, index = ctx.saved_tensors
    if torch.is_grad_enabled():
        options = {"size": ctx.size, "crop": ctx.crop, "align_corners": ctx.align_corners, "index": index}
        return *differentiable_gradients(partial(reference.upsample_softmax, **options), grad, masks), *[None] * 4
    arguments = (grad, probabilities, masks.shape[2:], ctx.size, ctx.align_corners, index)
    return torch.ops.segmenter_fast.upsample_softmax_backward(*arguments), *[None] * 4


define(
    "upsample_softmax(Tensor masks, SymInt[] size, SymInt[] crop, bool align_corners, Tensor? index=None) -> Tensor",
    triton=".gpu.upsample_softmax:upsample_softmax",
    plain=cpu_softmax.upsample_softmax,
    fake=lambda masks, size, crop, align_corners, index=None: masks.new_empty((*masks.shape[:2], *crop)),
    setup_context=_setup_softmax,
    backward=_softmax_backward,
)
define(
    "upsample_softmax_backward(Tensor grad, Tensor probabilities, SymInt[] grid, SymInt[] size, bool align_corners,"
    " Tensor? index=None) -> Tensor",
    triton=".gpu.upsample_softmax_backward:upsample_softmax_backward",
    plain=cpu_softmax.upsample_softmax_backward,
    fake=lambda grad, p, grid, size, align_corners, index=None: p.new_empty((*p.shape[:2], *grid)),
)


def upsample_cross_entropy(
    masks: Tensor,
    target: Tensor,
    size: Size | None = None,
    ignore_index: int = 255,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    align_corners: bool = False,
    index: Tensor | None = None,
) -> Tensor:
    """``cross_entropy(interpolate(masks, size, mode="bilinear"), target)`` without the interpolated logits.

    Args:
        masks: ``(B, K, h, w)`` floating point scores, any strides. With an ``index`` ``(B, K, groups)``.
        target: ``(B, H', W')`` class indices: int64, int32, int16 or uint8.
        size: ``(H, W)`` to resize to; the target's if not given. A smaller target is its top-left crop.
        ignore_index: target value that contributes neither loss nor gradient.
        weight: ``(K,)`` class weights, as in ``torch.nn.functional.cross_entropy``.
        label_smoothing: in [0, 1], as there.
        reduction: "mean", "sum" or "none".
        align_corners: as in ``torch.nn.functional.interpolate``.
        index: as for ``upsample_argmax``.

    Returns:
        A scalar, or ``(B, H', W')`` for "none": float32 (float64 for float64 masks). The mean over no pixel is NaN,
        as PyTorch's. Differentiable with respect to ``masks``.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is allowed.
        IndexError: a target outside [0, K) other than ``ignore_index``, on the CPU. On a GPU, where looking would
            stall the device, such a target makes the loss and its gradient NaN.
    """
    if target.ndim != 3 or target.shape[:1] != masks.shape[:1] or min(target.shape[1:]) < 1:
        given = f"{tuple(target.shape)} and {tuple(masks.shape)}"
        raise ValueError(f"target (B, H, W) and masks (B, K, h, w) must share B and not be empty, got {given}")
    require_dtype("target", target, *_TARGETS)
    crop = target.shape[1:]
    size, _ = _checked_sizes(masks, index, crop if size is None else size, crop, "target")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    require_one_device(masks=masks, target=target, weight=weight)
    if weight is not None:
        if weight.shape != (masks.shape[1],):
            raise ValueError(f"weight must be ({masks.shape[1]},), got {tuple(weight.shape)}")
        weight = weight.detach().to(statistics_dtype(masks.dtype)).contiguous()
    refuse_forward_mode("upsample_cross_entropy", masks)
    with_grad = torch.is_grad_enabled() and masks.requires_grad and reduction != "none"
    options = (size, ignore_index, weight, label_smoothing, reduction, align_corners)
    return torch.ops.segmenter_fast.upsample_cross_entropy(masks, target, *options, with_grad, index)[0]


def _pack(masks: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor, LossOptions, bool]:
    return masks, target, LossOptions(*options[:6], *options[7:]), options[6]


def _pack_pixel_backward(
    grad_loss: Tensor, masks: Tensor, target: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, LossOptions]:
    loss_options = *options[:4], "none", *options[4:]
    return grad_loss, masks, target, LossOptions(*loss_options)


def _fake_cross_entropy(masks: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    _, _, loss_options, with_grad = _pack(masks, target, *options)
    dtype = statistics_dtype(masks.dtype)
    loss = masks.new_empty(target.shape if loss_options.reduction == "none" else (), dtype=dtype)
    if with_grad and not runs_triton(masks):
        return loss, _channels_last(masks).to(dtype)
    parts = size_of_parts(*shape_on_grid(masks, loss_options.groups)) if with_grad else 0
    return loss, masks.new_empty(parts, dtype=dtype)


def _fake_gradient(masks: Tensor, index: Tensor | None = None) -> Tensor:
    if not runs_triton(masks):  # whatever the layout of the masks, which differs in compiled code
        return _channels_last(masks)
    return torch.empty_like(masks) if index is None else masks.new_empty(masks.shape)


def _channels_last(masks: Tensor) -> Tensor:
    return masks.new_empty(masks.shape[0], *masks.shape[2:], masks.shape[1]).movedim(-1, 1)


def _setup_cross_entropy(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    masks, target, options, _ = _pack(*inputs)
    ctx.options = options._replace(weight=None, groups=None)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the second output
    ctx.save_for_backward(masks, options.groups, target, options.weight, output[1])


def _cross_entropy_backward(ctx: Any, grad_loss: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 10
    masks, index, target, weight, gradient = ctx.saved_tensors
    if torch.is_grad_enabled():
        options = ctx.options._replace(weight=weight, groups=index)

        def plain(masks: Tensor) -> Tensor:
            return reference.upsample_cross_entropy(masks, target, *options)

        return *differentiable_gradients(plain, grad_loss, masks), *[None] * 9
    if ctx.options.reduction == "none":
        size, ignore_index, _, label_smoothing, _, align_corners, _ = ctx.options
        grad_masks = torch.ops.segmenter_fast.upsample_cross_entropy_pixel_backward(
            grad_loss, masks, target, size, ignore_index, weight, label_smoothing, align_corners, index
        )
    else:
        grad_masks = torch.ops.segmenter_fast.upsample_cross_entropy_backward(grad_loss, gradient, masks, index)
    return grad_masks, *[None] * 9


define(
    "upsample_cross_entropy(Tensor masks, Tensor target, SymInt[] size, int ignore_index, Tensor? weight,"
    " float label_smoothing, str reduction, bool align_corners, bool with_grad, Tensor? index=None)"
    " -> (Tensor, Tensor)",
    triton=".gpu.upsample_cross_entropy:upsample_cross_entropy",
    plain=cpu_cross_entropy.upsample_cross_entropy,
    fake=_fake_cross_entropy,
    pack=_pack,
    setup_context=_setup_cross_entropy,
    backward=_cross_entropy_backward,
)
define(
    "upsample_cross_entropy_backward(Tensor grad_loss, Tensor grad_masks, Tensor masks, Tensor? index=None) -> Tensor",
    triton=".gpu.upsample_cross_entropy:scale_gradient",
    plain=cpu_cross_entropy.scale_gradient,
    fake=lambda grad_loss, grad_masks, masks, index=None: _fake_gradient(masks, index),
)
define(
    "upsample_cross_entropy_pixel_backward(Tensor grad_loss, Tensor masks, Tensor target, SymInt[] size,"
    " int ignore_index, Tensor? weight, float label_smoothing, bool align_corners, Tensor? index=None) -> Tensor",
    triton=".gpu.upsample_cross_entropy:pixel_backward",
    plain=cpu_cross_entropy.pixel_backward,
    fake=lambda grad_loss, masks, target, *options: _fake_gradient(masks, *options[5:]),
    pack=_pack_pixel_backward,
)
