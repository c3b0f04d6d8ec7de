"""Cross-entropy of bilinearly upsampled masks in plain PyTorch, strip by strip.

With logits l, z = l - max_k l, S = sum_k exp z_k, target t, class weights v, smoothing e and V = sum_k v_k, the loss
of a pixel and its gradient, both zero for an ignored pixel, are

    (1 - e) v_t (log S - z_t) + e / K (V log S - sum_k v_k z_k)
    ((1 - e) v_t + e V / K) exp(z_k) / S - (1 - e) v_t [k = t] - e v_k / K

Each strip's gradient passes through the transpose of the resize at once, so the forward pass keeps no logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..loss_options import LossOptions
from ..registry import statistics_dtype, widest
from .strips import Resize, Transpose


def upsample_cross_entropy(
    masks: Tensor, target: Tensor, options: LossOptions, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """Loss, and the gradient of the masks for a loss gradient of 1; an empty tensor if not ``with_grad``."""
    dtype = statistics_dtype(masks.dtype)
    total = _target_weight(target, masks.shape[1], options)
    divisor = total if options.reduction == "mean" else torch.ones_like(total)
    grad_loss = (1 / divisor).to(dtype).expand(target.shape) if with_grad else None
    loss, grad = _by_strips(masks, target, options, grad_loss)
    if options.reduction != "none":
        loss = (loss / divisor).where(divisor != 0, torch.nan).to(dtype)  # NaN as in PyTorch, also with smoothing
    return loss, grad


def scale_gradient(grad_loss: Tensor, grad_masks: Tensor, masks: Tensor, index: Tensor | None = None) -> Tensor:
    """``grad_masks`` of the forward pass times the gradient of the loss, in the dtype of the masks."""
    return (grad_masks * grad_loss).to(masks.dtype)


def pixel_backward(grad_loss: Tensor, masks: Tensor, target: Tensor, options: LossOptions) -> Tensor:
    """Gradient of the masks for a loss gradient per pixel (reduction "none")."""
    return _by_strips(masks, target, options, grad_loss)[1].to(masks.dtype)


def _by_strips(masks: Tensor, target: Tensor, options: LossOptions, grad_loss: Tensor | None) -> tuple[Tensor, Tensor]:
    """Loss, per pixel or summed in the widest dtype, and the masks' gradient for ``grad_loss`` ``(B, H', W')``."""
    dtype, per_pixel = statistics_dtype(masks.dtype), options.reduction == "none"
    loss = masks.new_zeros(target.shape if per_pixel else (), dtype=dtype if per_pixel else widest(masks.device))
    grad = masks.new_zeros((0,) if grad_loss is None else masks.shape, dtype=dtype)
    resize = Resize(masks, options.size, target.shape[1:], options.align_corners, dtype, options.groups)
    strip_loss = _StripLoss(masks.shape[1], options, dtype)
    for image in range(masks.shape[0]):
        transpose = None if grad_loss is None else Transpose(resize, image, grad)
        for strip, logits in resize.rows(image):
            losses = strip_loss.forward(logits, target[image, strip.rows])
            if per_pixel:
                loss[image, strip.rows] = losses
            else:
                loss += losses.sum()
            if grad_loss is not None and transpose:
                transpose.add(strip, strip_loss.backward(logits, grad_loss[image, strip.rows].to(dtype)))
        if transpose:
            transpose.finish()
    return loss, grad


class _StripLoss:
    """Loss and gradient of one strip; ``backward`` continues from what ``forward`` left in the logits' buffer."""

    def __init__(self, classes: int, options: LossOptions, dtype: torch.dtype) -> None:
        self.ignore_index, self.weight = options.ignore_index, options.weight
        self.hard, self.soft = 1 - options.label_smoothing, options.label_smoothing / classes
        self.total = float(classes) if self.weight is None else float(self.weight.sum())
        self.dtype = dtype

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Losses ``(rows, W')`` of ``(rows, K, W')`` logits, which are overwritten by exp(z)."""
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

    def backward(self, exp: Tensor, grad_loss: Tensor) -> Tensor:
        """Turn exp(z) into the gradient of the logits for a loss gradient ``(rows, W')``, in place."""
        grad_loss = torch.where(self.valid, grad_loss, 0)
        hard = grad_loss * self.hard_weight
        both = hard + grad_loss * (self.soft * self.total) if self.soft else hard
        exp.mul_((both / self.sum).unsqueeze(1)).scatter_add_(1, self.target, -hard.unsqueeze(1))
        if self.soft:
            weight = exp.new_ones(1) if self.weight is None else self.weight
            exp.addcmul_(weight[:, None], grad_loss.unsqueeze(1), value=-self.soft)
        return exp


def _target_weight(target: Tensor, classes: int, options: LossOptions) -> Tensor:
    """Summed class weights of all pixels that count, in the widest dtype; IndexError for one that is no class."""
    ignore_index, weight = options.ignore_index, options.weight
    total = torch.zeros((), dtype=widest(target.device), device=target.device)
    for image in target:
        image = image.long()  # uint8 would wrap the value that it is compared with
        counts = image != ignore_index
        classes_seen = image.where(counts, 0)
        smallest, largest = torch.stack(classes_seen.aminmax()).tolist()
        if smallest < 0 or largest >= classes:
            raise IndexError(
                f"target must be in [0, {classes}) or ignore_index {ignore_index}, got "
                f"{smallest if smallest < 0 else largest}; set ignore_index to the value of pixels without a class"
            )
        total += counts.sum() if weight is None else weight[classes_seen].where(counts, 0).sum(dtype=total.dtype)
    return total
