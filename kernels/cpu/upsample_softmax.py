"""Probabilities of bilinearly upsampled masks: the C++ kernel of ``src/``, or plain PyTorch strip by strip.

Only the result has the full size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..registry import statistics_dtype
from .native import kernel, pointer
from .resize import geometry
from .strips import Resize


def upsample_softmax(
    masks: Tensor, size: Sequence[int], crop: Sequence[int], align_corners: bool, index: Tensor | None = None
) -> Tensor:
    """``(B, K, h, w)``, or ``(B, K, groups)`` with an index ``(B, h, w)`` -> ``(B, K, H', W')``."""
    out = masks.new_empty((*masks.shape[:2], *crop))
    run = kernel(masks, "upsample_softmax")
    if run is not None and out.numel():
        sizes, index = geometry(masks, index, size, crop, align_corners), None if index is None else index.contiguous()
        pointers = sizes.data_ptr(), masks.data_ptr(), masks.dtype == torch.bfloat16, pointer(index), out.data_ptr()
        run(*pointers, torch.get_num_threads())
        return out
    resize = Resize(masks, size, crop, align_corners, statistics_dtype(masks.dtype), index)
    for image in range(masks.shape[0]):
        for strip, logits in resize.rows(image):
            exp = logits.sub_(logits.amax(1, keepdim=True)).exp_()
            torch.div(exp, exp.sum(1, keepdim=True), out=out[image, :, strip].transpose(0, 1))  # (rows, K, W')
    return out


def upsample_softmax_backward(
    grad: Tensor,
    probabilities: Tensor,
    grid: Sequence[int],
    size: Sequence[int],
    align_corners: bool,
    index: Tensor | None = None,
) -> Tensor:
    """Gradient of the masks ``(B, K, *grid)``: p (g - sum_k p g) through the transpose of the resize."""
    dtype, (batch, classes, *kept) = statistics_dtype(probabilities.dtype), probabilities.shape
    run = kernel(probabilities, "upsample_softmax_backward")
    if run is not None and grad.numel():
        found = probabilities.new_empty(batch, *grid, classes, dtype=dtype).movedim(-1, 1)
        sizes, index = geometry(found, index, size, kept, align_corners), None if index is None else index.contiguous()
        strides = torch.tensor([*grad.stride(), *probabilities.stride()])
        run(
            sizes.data_ptr(), grad.data_ptr(), probabilities.data_ptr(), strides.data_ptr(),
            grad.dtype == torch.bfloat16, pointer(index), found.shape[2], found.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return probabilities.new_empty(found.shape).copy_(found)
    grad_masks = probabilities.new_zeros((batch, classes, *grid), dtype=dtype)
    resize = Resize(grad_masks, size, kept, align_corners, dtype, index)
    for image in range(grad_masks.shape[0]):
        for strip in resize.strips:
            p, grad_p = (tensor[image, :, strip].transpose(0, 1) for tensor in (probabilities, grad))
            grad_logits = p.to(dtype) * grad_p  # (rows, K, W')
            grad_logits.addcmul_(p.to(dtype), grad_logits.sum(1, keepdim=True), value=-1)
            resize.add_gradient(image, strip, grad_logits, grad_masks)
    return grad_masks.to(probabilities.dtype)
