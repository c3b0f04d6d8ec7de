"""Arguments of the C++ kernels of ``src/resize.h``: scores and the geometry of their resize."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..bilinear import Axis, shape_on_grid
from .groups import used_groups
from .native import function

_TYPES = {
    "upsample_cross_entropy": "pp" + "i" + "p" + "i" + "ppp" + "i" + "fff" + "ppp" + "i",
    "target_classes": "p" + "iii" + "p" + "i" + "pp" + "i",
}


def kernel(scores: Tensor, name: str) -> Callable[..., Any] | None:
    """The C++ function for these scores; None for a device or dtype that PyTorch's operators serve."""
    if scores.device.type != "cpu" or scores.dtype not in (torch.float32, torch.bfloat16):
        return None
    return function(name if name != "target_classes" else "upsample_cross_entropy", name, _TYPES[name])


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def geometry(masks: Tensor, index: Tensor | None, size: Sequence[int], kept: Sequence[int], align: bool) -> Tensor:
    """The numbers of ``Masks`` in ``src/resize.h``; checks the index."""
    batch, classes, *grid = shape_on_grid(masks, index)
    if index is not None:
        used_groups(index, masks.shape[2])
    axes = [Axis.make(*axis, align) for axis in zip(grid, size, kept, strict=True)]
    strides = masks.stride() if index is None else (*masks.stride()[:2], 0, masks.stride(2))
    return torch.tensor([batch, classes, *strides, *axes[0], *axes[1]])
