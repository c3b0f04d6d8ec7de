"""Cross-entropy of bilinearly upsampled masks: the C++ kernel of ``src/``, or plain PyTorch strip by strip.

With logits l, z = l - max_k l, S = sum_k exp z_k, target t, class weights v, smoothing e and V = sum_k v_k, the loss
of a pixel and its gradient, both zero for an ignored pixel, are

    (1 - e) v_t (log S - z_t) + e / K (V log S - sum_k v_k z_k)
    ((1 - e) v_t + e V / K) exp(z_k) / S - (1 - e) v_t [k = t] - e v_k / K

Each strip's gradient passes through the transpose of the resize at once, so the forward pass keeps no logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bilinear import shape_on_grid
from ..loss_options import LossOptions
from ..registry import statistics_dtype, widest
from .native import kernel, pointer
from .resize import geometry
from .strips import Resize

_CHUNK = 1 << 15  # pixels of a chunk of targets in the C++ source


def upsample_cross_entropy(
    masks: Tensor, target: Tensor, options: LossOptions, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """Loss, and the gradient of the masks for a loss gradient of 1, channels last; empty if not ``with_grad``."""
    classes, total = _target_classes(target, masks, options)
    divisor = total if options.reduction == "mean" else torch.ones_like(total)
    loss, grad = _loss(masks, classes, options, 1 / divisor if with_grad else None)
    if options.reduction != "none":
        loss = (loss / divisor).where(divisor != 0, torch.nan)  # NaN as in PyTorch, also with smoothing
    return loss.to(statistics_dtype(masks.dtype)), grad


def scale_gradient(grad_loss: Tensor, grad_masks: Tensor, masks: Tensor, index: Tensor | None = None) -> Tensor:
    """``grad_masks`` of the forward pass times the gradient of the loss, in the dtype of the masks, channels last."""
    return (grad_masks * grad_loss).to(masks.dtype)


def pixel_backward(grad_loss: Tensor, masks: Tensor, target: Tensor, options: LossOptions) -> Tensor:
    """Gradient of the masks for a loss gradient per pixel (reduction "none"), channels last."""
    classes = _target_classes(target, masks, options)[0]
    return _loss(masks, classes, options, grad_loss)[1].to(masks.dtype)


def _loss(masks: Tensor, classes: Tensor, options: LossOptions, grad_loss: Tensor | None) -> tuple[Tensor, Tensor]:
    """Loss, per pixel or summed in the widest dtype, and the masks' gradient for ``grad_loss``.

    ``classes`` ``(B, H', W')`` are int32, -1 where ignored; ``grad_loss`` is a scalar, or one for each of them.
    """
    per_pixel, dtype = options.reduction == "none", statistics_dtype(masks.dtype)
    losses = masks.new_zeros(classes.shape if per_pixel else 0, dtype=dtype)
    grad = masks.new_empty(0, dtype=dtype)
    if grad_loss is not None:
        grad = masks.new_empty(masks.shape[0], *masks.shape[2:], masks.shape[1], dtype=dtype).movedim(-1, 1)
        grad_loss = grad_loss.to(dtype)
    run = kernel(masks, "upsample_cross_entropy")
    if run is None or not masks.numel():
        return _by_strips(masks, classes, options, grad_loss, losses, grad), grad
    index, weight, count = options.groups, options.weight, masks.shape[1]
    sizes = geometry(masks, index, options.size, classes.shape[1:], options.align_corners)
    total = torch.zeros(masks.shape[0], shape_on_grid(masks, index)[2], dtype=torch.float64)
    index, grad_loss = (None if tensor is None else tensor.contiguous() for tensor in (index, grad_loss))
    run(
        sizes.data_ptr(), masks.data_ptr(), masks.dtype == torch.bfloat16, pointer(index), masks.shape[2],
        classes.data_ptr(), pointer(weight), pointer(grad_loss), grad_loss is not None and grad_loss.ndim,
        1 - options.label_smoothing, options.label_smoothing / count, count if weight is None else float(weight.sum()),
        losses.data_ptr() if per_pixel else None, total.data_ptr(), grad.data_ptr() if grad.numel() else None,
        torch.get_num_threads(),
    )  # fmt: skip
    return losses if per_pixel else total.sum(), grad


def _by_strips(
    masks: Tensor, classes: Tensor, options: LossOptions, grad_loss: Tensor | None, losses: Tensor, grad: Tensor
) -> Tensor:
    """``_loss`` in plain PyTorch: writes ``losses`` if they have a size, and ``grad``; returns the loss."""
    total, weight, smoothing = masks.new_zeros((), dtype=widest(masks.device)), options.weight, options.label_smoothing
    weights = grad.new_ones(masks.shape[1]) if weight is None else weight
    grad.zero_()
    resize = Resize(masks, options.size, classes.shape[1:], options.align_corners, grad.dtype, options.groups)
    for image in range(masks.shape[0]):
        for strip, logits in resize.rows(image):  # (rows, K, W')
            target = classes[image, strip].long()
            log_p = logits.log_softmax(1)
            found = F.nll_loss(log_p, target, weight, None, -1, reduction="none") * (1 - smoothing)
            if smoothing:
                found -= ((log_p * weights[:, None]).sum(1) * (smoothing / masks.shape[1])).where(target >= 0, 0)
            if losses.ndim > 1:
                losses[image, strip] = found
            else:
                total += found.sum()
            if grad_loss is not None:
                own, target = grad_loss.expand(classes.shape)[image, strip].where(target >= 0, 0), target.clamp(min=0)
                hard, soft = own * weights[target] * (1 - smoothing), own * (smoothing / masks.shape[1])
                found = log_p.exp_().mul_((hard + soft * weights.sum())[:, None])
                found.scatter_add_(1, target[:, None], -hard[:, None])
                if smoothing:
                    found.addcmul_(weights[:, None], soft[:, None], value=-1)
                resize.add_gradient(image, strip, found, grad)
    return losses if losses.ndim > 1 else total


def _target_classes(target: Tensor, masks: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """Int32 classes, -1 where ignored, and their summed weights in the widest dtype; IndexError if one is no class."""
    ignore_index, weight, classes = options.ignore_index, options.weight, masks.shape[1]
    target = target.contiguous()
    found, run = torch.empty_like(target, dtype=torch.int32), kernel(masks, "target_classes")
    if run is not None and target.numel():
        sums = torch.empty(-(-target.numel() // _CHUNK), 3, dtype=torch.float64)
        run(
            target.data_ptr(), target.itemsize, target.numel(), ignore_index, pointer(weight), classes,
            found.data_ptr(), sums.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        total, smallest, largest = sums[:, 0].sum(), int(sums[:, 1].min()), int(sums[:, 2].max())
    else:
        run, target = None, target.long()  # uint8 would wrap the value that it is compared with
        counts = target != ignore_index
        zeros = target.where(counts, 0)
        smallest, largest = torch.stack(zeros.aminmax()).tolist() if target.numel() else (0, 0)
        found.copy_(target.where(counts, -1))
    if smallest < 0 or largest >= classes:
        raise IndexError(
            f"target must be in [0, {classes}) or ignore_index {ignore_index}, got "
            f"{smallest if smallest < 0 else largest}; set ignore_index to the value of pixels without a class"
        )
    if run is None:
        dtype = widest(target.device)
        total = counts.sum(dtype=dtype) if weight is None else weight[zeros].where(counts, 0).sum(dtype=dtype)
    return found, total
