"""Cross-entropy of bilinearly upsampled masks in plain PyTorch, strip by strip.

With logits l, z = l - max_k l, S = sum_k exp z_k, target t, class weights v, smoothing e and V = sum_k v_k, the loss
of a pixel and its gradient, both zero for an ignored pixel, are

    (1 - e) v_t (log S - z_t) + e / K (V log S - sum_k v_k z_k)
    ((1 - e) v_t + e V / K) exp(z_k) / S - (1 - e) v_t [k = t] - e v_k / K

The gradient leaves each strip through the transpose of the resize at once, so the forward pass keeps no logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..loss_options import LossOptions
from ..registry import statistics_dtype
from .strips import Resize, Transpose


def upsample_cross_entropy(
    masks: Tensor, target: Tensor, options: LossOptions, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """Loss and, where asked for, the gradient of the masks for a loss gradient of 1; else an empty tensor."""
    dtype = statistics_dtype(masks.dtype)
    reduction = options.reduction
    total = _check_target(target, masks.shape[1], options)
    grad = masks.new_zeros(masks.shape if with_grad else (0,), dtype=dtype)
    per_pixel = masks.new_empty(target.shape if reduction == "none" else (0,), dtype=dtype)
    scale = (1 / total).to(dtype) if reduction == "mean" else total.new_ones((), dtype=dtype)
    loss = total.new_zeros(())
    resize = Resize(masks, options.size, target.shape[1:], options.align_corners, dtype)
    pixel = _Pixels(masks.shape[1], options, dtype)
    for image in range(masks.shape[0]):
        transpose = Transpose(resize, grad[image]) if with_grad else None
        for strip, logits in resize.rows(masks[image]):
            rows = slice(strip.start, strip.stop)
            strip_loss = pixel.loss(logits, target[image, rows])
            if reduction == "none":
                per_pixel[image, rows] = strip_loss
            else:
                loss += strip_loss.sum()
            if transpose:
                transpose.add(strip, pixel.gradient(logits, scale))
        if transpose:
            transpose.finish()
    if reduction == "none":
        return per_pixel, grad
    return (loss / total if reduction == "mean" else loss).to(dtype), grad


def scale_gradient(grad_loss: Tensor, grad_masks: Tensor, masks: Tensor) -> Tensor:
    """``grad_masks`` of the forward pass times the gradient of the loss, in the dtype of the masks."""
    return (grad_masks * grad_loss).to(masks.dtype)


def pixel_backward(grad_loss: Tensor, masks: Tensor, target: Tensor, options: LossOptions) -> Tensor:
    """Gradient of the masks for a loss gradient per pixel (reduction "none")."""
    dtype = statistics_dtype(masks.dtype)
    grad = masks.new_zeros(masks.shape, dtype=dtype)
    resize = Resize(masks, options.size, target.shape[1:], options.align_corners, dtype)
    pixel = _Pixels(masks.shape[1], options, dtype)
    for image in range(masks.shape[0]):
        transpose = Transpose(resize, grad[image])
        for strip, logits in resize.rows(masks[image]):
            rows = slice(strip.start, strip.stop)
            pixel.loss(logits, target[image, rows])
            transpose.add(strip, pixel.gradient(logits, grad_loss[image, rows].to(dtype)))
        transpose.finish()
    return grad.to(masks.dtype)


class _Pixels:
    """Loss and gradient of one strip; ``gradient`` continues from what ``loss`` left in the logits' buffer."""

    def __init__(self, classes: int, options: LossOptions, dtype: torch.dtype) -> None:
        self.ignore_index, self.weight = options.ignore_index, options.weight
        self.hard, self.soft = 1 - options.label_smoothing, options.label_smoothing / classes
        self.total = float(classes) if self.weight is None else float(self.weight.sum())
        self.dtype = dtype

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """``(rows, W')`` losses of ``(rows, K, W')`` logits, which become exp(z)."""
        target = target.long()
        self.valid = target != self.ignore_index
        self.target = target.where(self.valid, 0).unsqueeze(1)  # (rows, 1, W')
        weight = torch.ones((), dtype=self.dtype) if self.weight is None else self.weight[self.target.squeeze(1)]
        self.hard_weight = self.hard * weight
        z = logits.sub_(logits.amax(1, keepdim=True))
        z_target = z.gather(1, self.target).squeeze(1)
        weighted: Tensor | float = 0.0
        if self.soft:
            weighted = z.sum(1) if self.weight is None else (z * self.weight[:, None]).sum(1)
        self.sum = z.exp_().sum(1)
        log_sum = self.sum.log()
        loss = self.hard_weight * (log_sum - z_target)
        if self.soft:
            loss += self.soft * (self.total * log_sum - weighted)
        return loss.where(self.valid, 0)

    def gradient(self, exp: Tensor, grad_loss: Tensor) -> Tensor:
        """Turn the buffer that ``loss`` left into the gradient of the logits, for a ``(rows, W')`` or scalar one."""
        grad_loss = torch.where(self.valid, grad_loss, 0)
        hard = grad_loss * self.hard_weight
        both = hard + grad_loss * (self.soft * self.total) if self.soft else hard
        exp.mul_((both / self.sum).unsqueeze(1)).scatter_add_(1, self.target, -hard.unsqueeze(1))
        if self.soft:
            weight = exp.new_ones(1) if self.weight is None else self.weight
            exp.addcmul_(weight[:, None], grad_loss.unsqueeze(1), value=-self.soft)
        return exp


def _check_target(target: Tensor, classes: int, options: LossOptions) -> Tensor:
    """The summed class weights of all pixels that count (float64); IndexError for a target that is no class."""
    ignore_index, weight = options.ignore_index, options.weight
    total = torch.zeros((), dtype=torch.float64, device=target.device)
    for image in target:
        image = image.long()  # a uint8 tensor would wrap what it is compared with
        counts = image != ignore_index
        classes_seen = image.where(counts, 0)
        smallest, largest = torch.stack(classes_seen.aminmax()).tolist()
        if smallest < 0 or largest >= classes:
            raise IndexError(
                f"target must be in [0, {classes}) or ignore_index {ignore_index}, got "
                f"{smallest if smallest < 0 else largest}; set ignore_index to the value of pixels without a class"
            )
        total += counts.sum() if weight is None else weight[classes_seen].where(counts, 0).sum(dtype=torch.float64)
    return total
