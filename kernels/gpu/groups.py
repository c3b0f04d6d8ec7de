"""Gather of the scores of groups of patches, and its transpose."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import on_grid as on_grid


def sum_groups(grad: Tensor, index: Tensor, groups: int) -> Tensor:
    """Sum of the gradients ``(B, K, h, w)`` of the patches of each group, ``(B, K, groups)``, in a fixed order."""
    batch, classes = grad.shape[:2]
    out = grad.new_zeros((batch, groups, classes))
    images = torch.arange(batch, device=grad.device)[:, None]
    return out.index_put_((images, index.flatten(1)), grad.flatten(2).mT, accumulate=True).mT.contiguous()
