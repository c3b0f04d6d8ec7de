"""Geometry of a resize for the C++ kernels of ``src/resize.h``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..bilinear import Axis, shape_on_grid
from .groups import used_groups


def geometry(masks: Tensor, index: Tensor | None, size: Sequence[int], kept: Sequence[int], align: bool) -> Tensor:
    """The numbers of ``Masks`` in ``src/resize.h``; checks the index."""
    batch, classes, *grid = shape_on_grid(masks, index)
    if index is not None:
        used_groups(index, masks.shape[2])
    axes = [Axis.make(*axis, align) for axis in zip(grid, size, kept, strict=True)]
    strides = masks.stride() if index is None else (*masks.stride()[:2], 0, masks.stride(2))
    return torch.tensor([batch, classes, *strides, *axes[0], *axes[1]])
