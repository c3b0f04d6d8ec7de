"""Class scores of patches in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import statistics_dtype


def mask_scores(patches: Tensor, classes: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``(B, N, D), (B, K, D), (K,), (K,)`` -> ``(B, N, K)``."""
    scores = _cosines(patches, classes)[0]
    scores = F.layer_norm(scores, weight.shape, weight.to(scores.dtype), bias.to(scores.dtype), eps)
    return scores.to(torch.promote_types(patches.dtype, weight.dtype))


def mask_scores_backward(
    grad: Tensor, patches: Tensor, classes: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of patches, classes, weight and bias. The scores are recomputed: they are one matrix product."""
    scores, wide_patches, wide_classes, inverse_patches, inverse_classes = _cosines(patches, classes)
    grad = grad.to(scores.dtype)
    centred = scores - scores.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed = centred * rstd  # (B, N, K)
    grad_weight, grad_bias = (grad * normed).sum((0, 1)), grad.sum((0, 1))
    grad = grad * weight.to(grad.dtype)
    grad = rstd * (grad - grad.mean(-1, keepdim=True) - normed * (grad * normed).mean(-1, keepdim=True))
    along = grad * scores  # the part along a vector, which its norm removes
    grad = grad.mul_(inverse_patches).mul_(inverse_classes)
    grad_patches = (grad @ wide_classes).addcmul_(
        wide_patches, along.sum(2, keepdim=True) * inverse_patches.square(), value=-1
    )
    grad_classes = (grad.mT @ wide_patches).addcmul_(
        wide_classes, (along.sum(1, keepdim=True) * inverse_classes.square()).mT, value=-1
    )
    grads = (grad_patches, grad_classes, grad_weight, grad_bias)
    return tuple(g.to(t.dtype) for g, t in zip(grads, (patches, classes, weight, bias), strict=True))  # type: ignore


def _cosines(patches: Tensor, classes: Tensor) -> tuple[Tensor, ...]:
    """Cosines ``(B, N, K)``, patches and classes in the dtype of statistics, inverse norms ``(B, N, 1), (B, 1, K)``.

    The norms divide the product, which is smaller than the vectors.
    """
    dtype = statistics_dtype(patches.dtype)
    patches, classes = patches.to(dtype), classes.to(dtype)
    inverse_patches = patches.norm(dim=-1, keepdim=True).reciprocal()
    inverse_classes = classes.norm(dim=-1, keepdim=True).reciprocal().mT
    cosines = (patches @ classes.mT).mul_(inverse_patches).mul_(inverse_classes)
    return cosines, patches, classes, inverse_patches, inverse_classes
