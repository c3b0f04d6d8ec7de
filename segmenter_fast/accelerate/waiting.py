"""State of a resized tensor that waits, and the node that stands for it in the graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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
    source: State | None = None
    """The state of the tensor that this is ``view`` of, a copy's also."""
    results: list[tuple[Any, Callable[[Tensor], Any]]] = field(default_factory=list)
    """Edges of the graph to results of the fused ops, and PyTorch's functions that give them from the tensor."""
    node: Any = None
    """The graph node of the tensor without storage."""
    version: int | None = None
    used: bool = False
    frozen: bool = False
    """True for a view that was made without gradients of a tensor with: a leaf for PyTorch."""

    def note(self, edge: Any, function: Callable[[Tensor], Any]) -> None:
        """Remember how a result, an edge of the graph, comes from this tensor and from the source of this one."""
        self.results.append((edge, function))
        if self.source is not None and self.view is not None:
            view = self.view
            self.source.note(edge, lambda full: function(view(full)))

    def gradient(self, tensor: Tensor, grads: dict[Any, Tensor | None], **options: bool) -> Tensor | None:
        """The gradient by this tensor, from those by its results, and by the resized tensor; None without any."""
        found = [grad for grad in [grads.get(self.full)] if grad is not None]
        with torch.enable_grad():
            for edge, function in self.results:
                if grads.get(edge) is not None:
                    own = tensor.view_as(tensor)
                    found += torch.autograd.grad(function(own), own, grads[edge], **options)
        return sum(found[1:], found[0]) if found else None

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
        ctx.root, ctx.rebuild = root.detach(), state.rebuild  # linear, so derivatives by the root end here
        return state.empty(cls)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            root = ctx.root.detach().requires_grad_()
            return torch.autograd.grad(ctx.rebuild(root), root, grad, create_graph=create_graph)[0], None, None


class Follow(torch.autograd.Function):
    """The resized tensor, in the graph that somebody gave to the tensor without storage."""

    @staticmethod
    def forward(ctx: Any, waiting: Any) -> Tensor:
        return waiting.values()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad


def gradients(waiting: dict[int, State], outputs: Any, inputs: tuple[Any, ...], **options: Any) -> tuple[Any, ...]:
    """``torch.autograd.grad``, where the inputs at the indices ``waiting`` have results of the fused ops.

    Those do not depend on their logits in the graph: PyTorch's functions give the same results once more, from these.

    Raises:
        RuntimeError: as ``torch.autograd.grad``.
    """
    unused = options.pop("allow_unused", None)
    edges = dict.fromkeys(edge for state in waiting.values() for edge, _ in state.results)
    edges |= {state.full: None for state in waiting.values() if state.full is not None}
    others = [x for i, x in enumerate(inputs) if i not in waiting]
    zeros = options.pop("materialize_grads", False)
    found = torch.autograd.grad(outputs, [*others, *edges], allow_unused=True, **options)
    rest, grads = iter(found), dict(zip(edges, found[len(others) :], strict=True))
    same = {name: options[name] for name in ("create_graph", "is_grads_batched") if options.get(name)}
    result = [waiting[i].gradient(x, grads, **same) if i in waiting else next(rest) for i, x in enumerate(inputs)]
    for i, (x, grad) in enumerate(zip(inputs, result, strict=True)):
        if grad is None and zeros:
            result[i] = torch.zeros_like(x)
        elif grad is None and not unused:
            raise RuntimeError(f"input {i} was not used in the graph; allow_unused=True gives None for it")
    return tuple(result)
