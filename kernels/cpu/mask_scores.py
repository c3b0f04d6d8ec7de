"""Class scores of patches in plain PyTorch, statistics in float32 (float64 for float64 input)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mask_scores(patches: Tensor, classes: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``(B, N, D), (B, K, D), (K,), (K,)`` -> ``(B, N, K)``."""
    scores = _scores(patches, classes)[0]
    scores = F.layer_norm(scores, weight.shape, weight.to(scores.dtype), bias.to(scores.dtype), eps)
    return scores.to(torch.promote_types(patches.dtype, weight.dtype))


def mask_scores_backward(
    grad: Tensor, patches: Tensor, classes: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of patches, classes, weight and bias. The scores are computed again: they are one matrix product."""
    scores, unit_patches, unit_classes, inverse_patches, inverse_classes = _scores(patches, classes)
    grad = grad.to(scores.dtype)
    centred = scores - scores.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed = centred * rstd  # (B, N, K)
    grad_weight, grad_bias = (grad * normed).sum((0, 1)), grad.sum((0, 1))
    grad = grad * weight.to(grad.dtype)
    grad = rstd * (grad - grad.mean(-1, keepdim=True) - normed * (grad * normed).mean(-1, keepdim=True))
    grad_patches = _normalize_backward(grad @ unit_classes, unit_patches, inverse_patches)
    grad_classes = _normalize_backward(grad.mT @ unit_patches, unit_classes, inverse_classes)
    grads = (grad_patches, grad_classes, grad_weight, grad_bias)
    return tuple(g.to(t.dtype) for g, t in zip(grads, (patches, classes, weight, bias), strict=True))  # type: ignore


def _scores(patches: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    statistics = torch.promote_types(patches.dtype, torch.float32)
    patches, classes = patches.to(statistics), classes.to(statistics)
    inverse_patches = patches.norm(dim=-1, keepdim=True).reciprocal()
    inverse_classes = classes.norm(dim=-1, keepdim=True).reciprocal()
    unit_patches, unit_classes = patches * inverse_patches, classes * inverse_classes
    return unit_patches @ unit_classes.mT, unit_patches, unit_classes, inverse_patches, inverse_classes


def _normalize_backward(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    return (grad - unit * (grad * unit).sum(-1, keepdim=True)) * inverse
