"""Cross-entropy of bilinearly upsampled masks in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference


def upsample_cross_entropy(
    masks: Tensor,
    target: Tensor,
    size: Sequence[int],
    ignore_index: int,
    weight: Tensor | None,
    label_smoothing: float,
    reduction: str,
    align_corners: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Loss and, where asked for, the gradient of the masks for a loss gradient of 1; else an empty tensor."""
    statistics = torch.float64 if masks.dtype == torch.float64 else torch.float32
    masks = masks.detach().to(statistics).requires_grad_(with_grad)
    with torch.set_grad_enabled(with_grad):
        loss = reference.upsample_cross_entropy(
            masks, target, tuple(size), ignore_index, weight, label_smoothing, reduction, align_corners
        )
    grad = torch.autograd.grad(loss, masks)[0].contiguous() if with_grad else masks.new_empty(0)
    return loss.detach(), grad


def scale_gradient(grad_loss: Tensor, grad_masks: Tensor, masks: Tensor) -> Tensor:
    """``grad_masks`` of the forward pass times the gradient of the loss, in the dtype of the masks."""
    return (grad_masks * grad_loss).to(masks.dtype)


def pixel_backward(
    grad_loss: Tensor,
    masks: Tensor,
    target: Tensor,
    size: Sequence[int],
    ignore_index: int,
    weight: Tensor | None,
    label_smoothing: float,
    align_corners: bool,
) -> Tensor:
    """Gradient of the masks for a loss gradient per pixel (reduction "none")."""
    statistics = torch.float64 if masks.dtype == torch.float64 else torch.float32
    leaf = masks.detach().to(statistics).requires_grad_()
    with torch.enable_grad():
        loss = reference.upsample_cross_entropy(
            leaf, target, tuple(size), ignore_index, weight, label_smoothing, "none", align_corners
        )
    return torch.autograd.grad(loss, leaf, grad_loss)[0].to(masks.dtype).contiguous()
