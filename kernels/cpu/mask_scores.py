"""Class scores of patches in plain PyTorch, statistics in float32 (float64 for float64 input)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import statistics_dtype


def mask_scores(patches: Tensor, classes: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``(B, N, D), (B, K, D), (K,), (K,)`` -> ``(B, N, K)``."""
    scores = _cosines(*_widened(patches, classes))[0]
    scores = F.layer_norm(scores, weight.shape, weight.to(scores.dtype), bias.to(scores.dtype), eps)
    return scores.to(torch.promote_types(patches.dtype, weight.dtype))


def mask_scores_backward(
    grad: Tensor, patches: Tensor, classes: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of patches, classes, weight and bias. The scores are computed again: they are one matrix product."""
    wide_patches, wide_classes = _widened(patches, classes)
    scores, inverse_patches, inverse_classes = _cosines(wide_patches, wide_classes)
    grad = grad.to(scores.dtype)
    centred = scores - scores.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed = centred * rstd  # (B, N, K)
    grad_weight, grad_bias = (grad * normed).sum((0, 1)), grad.sum((0, 1))
    grad = grad * weight.to(grad.dtype)
    grad = rstd * (grad - grad.mean(-1, keepdim=True) - normed * (grad * normed).mean(-1, keepdim=True))
    along = grad * scores  # what the norms take back
    grad = grad.mul_(inverse_patches).mul_(inverse_classes)
    grad_patches = (grad @ wide_classes).addcmul_(
        wide_patches, along.sum(2, keepdim=True) * inverse_patches.square(), value=-1
    )
    grad_classes = (grad.mT @ wide_patches).addcmul_(
        wide_classes, (along.sum(1, keepdim=True) * inverse_classes.square()).mT, value=-1
    )
    grads = (grad_patches, grad_classes, grad_weight, grad_bias)
    return tuple(g.to(t.dtype) for g, t in zip(grads, (patches, classes, weight, bias), strict=True))  # type: ignore


def _widened(patches: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    dtype = statistics_dtype(patches.dtype)
    return patches.to(dtype), classes.to(dtype)


def _cosines(patches: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines ``(B, N, K)``, and the inverse norms ``(B, N, 1)`` and ``(B, 1, K)`` that follow the matrix product."""
    inverse_patches = patches.norm(dim=-1, keepdim=True).reciprocal()
    inverse_classes = classes.norm(dim=-1, keepdim=True).reciprocal().mT
    return (patches @ classes.mT).mul_(inverse_patches).mul_(inverse_classes), inverse_patches, inverse_classes
