"""``mask_scores``: argument checks, registration, derivatives."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..cpu import mask_scores as cpu
from ..registry import define, differentiable_gradients, refuse_forward_mode


def mask_scores(patches: Tensor, classes: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Class scores of patches: cosine similarity with the class embeddings, then LayerNorm over the classes.

    Args:
        patches: ``(B, N, D)`` projected patch embeddings.
        classes: ``(B, K, D)`` projected class embeddings.
        weight, bias: ``(K,)`` of the LayerNorm.
        eps: of the LayerNorm. The L2 norms have none: a zero vector gives NaN, as in the official program.

    Returns:
        ``(B, N, K)`` in the wider dtype of ``patches`` and ``weight``: with low-precision embeddings and a float32
        LayerNorm, as under autocast, the scores are float32 and never rounded.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit together.
        NotImplementedError: forward-mode differentiation.
    """
    ranks = (patches.ndim, classes.ndim)
    if ranks != (3, 3) or patches.shape[0] != classes.shape[0] or patches.shape[2] != classes.shape[2]:
        raise ValueError(
            f"patches (B, N, D) and classes (B, K, D) must share B and D, got {tuple(patches.shape)} and "
            f"{tuple(classes.shape)}"
        )
    k = classes.shape[1]
    if weight.shape != (k,) or bias.shape != (k,):
        raise ValueError(f"weight and bias must be ({k},), got {tuple(weight.shape)} and {tuple(bias.shape)}")
    if patches.dtype != classes.dtype or weight.dtype != bias.dtype:
        given = ", ".join(str(tensor.dtype) for tensor in (patches, classes, weight, bias))
        raise TypeError(f"patches and classes must share a dtype, and weight and bias, got {given}")
    refuse_forward_mode("mask_scores", patches, classes, weight, bias)
    return torch.ops.segmenter_fast.mask_scores(patches, classes, weight, bias, eps)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        return *differentiable_gradients(partial(reference.mask_scores, eps=ctx.eps), grad, *ctx.saved_tensors), None
    return *torch.ops.segmenter_fast.mask_scores_backward(grad, *ctx.saved_tensors, ctx.eps), None


define(
    "mask_scores(Tensor patches, Tensor classes, Tensor weight, Tensor bias, float eps) -> Tensor",
    triton=".gpu.mask_scores:mask_scores",
    plain=cpu.mask_scores,
    fake=lambda patches, classes, weight, bias, eps: patches.new_empty(
        (*patches.shape[:2], classes.shape[1]), dtype=torch.promote_types(patches.dtype, weight.dtype)
    ),
    setup_context=_setup_context,
    backward=_backward,
)
define(
    "mask_scores_backward(Tensor grad, Tensor patches, Tensor classes, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    triton=".gpu.mask_scores:mask_scores_backward",
    plain=cpu.mask_scores_backward,
    fake=lambda grad, *tensors: tuple(tensor.new_empty(tensor.shape) for tensor in tensors[:4]),
)
