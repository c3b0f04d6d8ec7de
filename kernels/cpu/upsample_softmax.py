"""Probabilities of bilinearly upsampled masks in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference


def upsample_softmax(masks: Tensor, size: Sequence[int], crop: Sequence[int], align_corners: bool) -> Tensor:
    """``(B, K, h, w)`` -> ``(B, K, H, W)``."""
    return reference.upsample_softmax(masks, tuple(size), tuple(crop), align_corners).contiguous()


def upsample_softmax_backward(
    grad: Tensor, probabilities: Tensor, grid: Sequence[int], size: Sequence[int], align_corners: bool
) -> Tensor:
    """Gradient of the masks ``(B, K, h, w)``."""
    b, k, height, width = probabilities.shape
    grad_logits = torch._softmax_backward_data(grad, probabilities, 1, probabilities.dtype)
    full = grad_logits.new_zeros((b, k, *size))
    full[..., :height, :width] = grad_logits
    return torch.ops.aten.upsample_bilinear2d_backward(full, list(size), [b, k, *grid], align_corners, None, None)
