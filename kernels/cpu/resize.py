"""Arguments of the C++ kernels of ``src/resize.h``: scores and the geometry of their resize."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..bilinear import Axis, shape_on_grid
from .groups import used_groups
from .native import function

# Source and types of the arguments of each function.
_FUNCTIONS = {
    "upsample_argmax": ("upsample_argmax", "ppppp" + "ppp" + "iiiii" + "iiiiiii"),
    "upsample_cross_entropy": ("upsample_cross_entropy", "ppipi" + "pppi" + "fff" + "pppi"),
    "target_classes": ("upsample_cross_entropy", "pii" + "ipi" + "ppi"),
    "upsample_softmax": ("upsample_softmax", "ppip" + "pi"),
    "upsample_softmax_backward": ("upsample_softmax", "pppp" + "ipi" + "pi"),
    "lattice_softmax": ("upsample_softmax", "ppppppp" + "iiiii"),
}


def kernel(scores: Tensor, name: str) -> Callable[..., Any] | None:
    """The C++ function for these scores; None for a device or dtype that PyTorch's operators serve."""
    if scores.device.type != "cpu" or scores.dtype not in (torch.float32, torch.bfloat16):
        return None
    source, types = _FUNCTIONS[name]
    return function(source, name, types)


def geometry(masks: Tensor, index: Tensor | None, size: Sequence[int], kept: Sequence[int], align: bool) -> Tensor:
    """The numbers of ``Masks`` in ``src/resize.h``; checks the index."""
    batch, classes, *grid = shape_on_grid(masks, index)
    if index is not None:
        used_groups(index, masks.shape[2])
    axes = [Axis.make(*axis, align) for axis in zip(grid, size, kept, strict=True)]
    strides = masks.stride() if index is None else (*masks.stride()[:2], 0, masks.stride(2))
    return torch.tensor([batch, classes, *strides, *axes[0], *axes[1]])
