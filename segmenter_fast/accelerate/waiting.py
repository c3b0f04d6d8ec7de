"""State of a resized tensor that waits, and the node that stands for it in the graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .full_size import FullSizeCalls
from .upsampling import Upsampling


@dataclass
class State:
    """A resized tensor that waits."""

    upsampling: Upsampling
    meta: Tensor
    """Shape, strides and dtype."""
    root: Tensor
    """The scores, where its graph starts."""
    rebuild: Callable[[Tensor], Tensor]
    """The tensor from the root, by PyTorch's own functions."""
    calls: FullSizeCalls
    parent: Tensor | None = None
    """The tensor that this is a view of, by the function ``view``; a copy has none."""
    view: Callable[[Tensor], Tensor] | None = None
    full: Tensor | None = None
    node: Any = None
    """The graph node of the tensor without storage."""
    version: int | None = None
    used: bool = False
    frozen: bool = False
    """True for a view that was made without gradients of a tensor with: a leaf for PyTorch."""

    def empty(self, cls: type[Tensor]) -> Tensor:
        """A tensor of the class with the metadata and no storage."""
        meta, device = self.meta, self.upsampling.scores.device
        return Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), storage_offset=0, dtype=meta.dtype, device=device
        )


class Birth(torch.autograd.Function):
    """The node of a tensor without storage: gradients that reach it pass through PyTorch's own functions."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, state: State, cls: type[Tensor]) -> Tensor:
        ctx.root, ctx.rebuild = root.detach(), state.rebuild
        return state.empty(cls)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        with torch.enable_grad():
            root = ctx.root.detach().requires_grad_()
            return torch.autograd.grad(ctx.rebuild(root), root, grad)[0], None, None
