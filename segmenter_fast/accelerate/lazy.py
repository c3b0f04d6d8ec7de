"""Tensors whose bilinear resize waits until its use is known.

``PatchScores`` are ordinary scores ``(B, K, h, w)``; ``interpolate`` of them returns an ``Upsampled``, which has the
shape, strides, dtype, device and gradient of the resized tensor but no storage. Labels, maxima, probabilities and the
cross-entropy are computed by the fused ops. Everything else computes the resized tensor first, once, and goes on with
that, so that each result is PyTorch's. PyTorch's Python functions reach ``__torch_function__``; what calls operators
below them (autograd functions, extensions, compiled code) reaches ``__torch_dispatch__``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils._pytree import tree_map_only

from .full_size import FullSizeCalls
from .lazy_functions import (
    COPIES,
    METADATA,
    SHAPES,
    VIEWS,
    destination,
    has_kernel,
    is_transformed,
    keeps_size,
    may_pay,
    outlined,
    pays,
    positional,
    untraced,
    without_resize,
)
from .upsampling import Upsampling
from .waiting import Birth, Follow, State, gradients


def patch_scores(scores: Tensor, calls: FullSizeCalls) -> Tensor:
    """Mark ``(B, K, h, w)`` or ``(B, N, K)`` scores as ``PatchScores``, unless a subclass would be in the way."""
    if (
        type(scores) is not Tensor
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or scores.ndim not in (3, 4)
        or not scores.is_floating_point()
        or not has_kernel(scores.device, scores.dtype)
        or is_transformed()
    ):
        return scores
    return _marked(scores, calls)


def _marked(scores: Tensor, calls: FullSizeCalls) -> PatchScores:
    marked = scores.as_subclass(PatchScores)
    marked.calls = calls
    return marked


class PatchScores(Tensor):
    """Scores per patch whose bilinear resize waits."""

    calls: FullSizeCalls

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = positional(args, kwargs)
        first = args[0] if args else None
        if func is F.interpolate and isinstance(first, PatchScores):
            return _interpolate(first, *args[1:], **kwargs)
        # Subclasses of others decide; PyTorch's pickling and deepcopy take a plain tensor.
        if func in (Tensor.__reduce_ex__, Tensor.__deepcopy__) or not all(issubclass(cls, kind) for kind in types):
            args, kwargs = tree_map_only(PatchScores, PatchScores.plain, (args, kwargs))
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
            if (
                (func in VIEWS or func in COPIES or func in SHAPES)
                and type(out) is Tensor
                and isinstance(first, PatchScores)
            ):
                out = _marked(out, first.calls)
        return out

    def plain(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)


def _interpolate(marked: PatchScores, *args: Any, **kwargs: Any) -> Tensor:
    scores, device = marked.plain(), marked.device.type
    if torch.is_autocast_enabled(device):  # some devices resize in float32 then
        one = torch.zeros(1, 1, 1, 1, dtype=scores.dtype, device=scores.device)
        scores = scores.to(F.interpolate(one, size=1, mode="bilinear").dtype)
    upsampling = Upsampling.of(scores, *args, **kwargs)
    if upsampling is None or not may_pay(upsampling):
        return F.interpolate(scores, *args, **kwargs)
    shape = (*scores.shape[:2], *upsampling.size)
    meta = torch.empty(shape, dtype=scores.dtype, device="meta", memory_format=suggest_memory_format(scores))
    return _make(State(upsampling, meta, scores, lambda x: F.interpolate(x, *args, **kwargs), marked.calls))


def _make(state: State) -> Upsampled:
    state.frozen = not torch.is_grad_enabled() and state.upsampling.scores.requires_grad and state.parent is not None
    if not torch.is_grad_enabled() or not state.upsampling.scores.requires_grad:
        state.root, state.upsampling = state.root.detach(), state.upsampling.detach()
    state.version = None if state.root.is_inference() else state.root._version
    tensor: Any = Birth.apply(state.root, state, Upsampled) if state.root.requires_grad else state.empty(Upsampled)
    tensor.state = state
    state.node = tensor.node()
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.requires_grad_() if state.frozen else tensor


def _in_full(tensor: Tensor, function: Any = None) -> Tensor:
    return tensor.in_full(function) if isinstance(tensor, Upsampled) else tensor


def _child(
    state: State, upsampling: Upsampling, function: Callable[[Tensor], Tensor], parent: Upsampled | None
) -> Upsampled:
    """A view of ``parent``, or a copy if that is None: ``function`` of the resized tensor."""
    rebuild = state.rebuild  # without the state, because nodes of the graph keep the function
    meta = function(state.meta)
    return _make(
        State(upsampling, meta, state.root, lambda x: function(rebuild(x)), state.calls, parent, function, source=state)
    )


def _grad(outputs: Any, inputs: tuple[Any, ...], **options: Any) -> tuple[Any, ...]:
    """``torch.autograd.grad`` of, or by, tensors that wait."""
    outputs = tree_map_only(Upsampled, _in_full, outputs)
    waiting = {i: x.state for i, x in enumerate(inputs) if isinstance(x, Upsampled) and x.state.results}
    create_graph, name = options.get("create_graph"), torch.autograd.grad
    values = {i: inputs[i].in_full(name) if create_graph else inputs[i].values(name).requires_grad_() for i in waiting}
    inputs = tuple(values[i] if i in waiting else _in_full(x) for i, x in enumerate(inputs))
    options.pop("only_inputs", None)
    if waiting:
        return gradients(waiting, outputs, inputs, **options)
    return torch.autograd.grad(outputs, inputs, **options)


class Upsampled(Tensor):
    """A resized tensor ``(B, K, H, W)``, or ``(K, H, W)``, that waits."""

    state: State

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return untraced(cls.call)(func, args, kwargs)

    @classmethod
    def call(cls, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of a function of PyTorch."""
        args, kwargs = positional(args, kwargs)
        args = outlined(func, args, Upsampled)
        first = args[0] if args else None
        if func is torch.autograd.grad:
            return _grad(*args, **kwargs)
        if isinstance(first, Upsampled):
            if func in METADATA and first.state.full is None:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if func is F.interpolate and not (first.waits() and keeps_size(first.state.meta, args[1:], kwargs)):
                calls = first.state.calls
                return func(patch_scores(first.in_full(func), calls), *args[1:], **kwargs)
            if first.waits():
                out = first.answer(func, args[1:], kwargs)
                if out is not None:
                    first.use()
                    return out
        if any(isinstance(value, (Upsampled, list, tuple, dict)) for value in (*args, *kwargs.values())):
            args, kwargs = tree_map_only(Upsampled, lambda tensor: _in_full(tensor, func), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(Upsampled, lambda tensor: tensor.values(func), (args, kwargs or {}))
        return func(*args, **kwargs)

    def node(self) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return self.grad_fn

    def waits(self) -> bool:
        """True if nobody has seen, and could have changed, the resized tensor, and its graph is its own."""
        state = self.state
        own = self.node() is state.node and not (state.frozen and torch.is_grad_enabled())
        parent = state.parent
        return state.full is None and own and (parent is None or (isinstance(parent, Upsampled) and parent.waits()))

    def use(self) -> None:
        """Note that results exist which do not depend on the resized tensor."""
        self.state.used = True
        if isinstance(self.state.parent, Upsampled):
            self.state.parent.use()

    def rebuilt(self) -> Tensor:
        state = self.state
        if state.version is not None and state.root._version != state.version:
            raise RuntimeError(
                "scores per patch were changed in place after their resize and before its first use: change a clone of "
                "them, or segmenter_fast.restore the model"
            )
        return state.rebuild(state.root)

    def values(self, function: Any = None) -> Tensor:
        """The resized tensor without a graph."""
        if self.state.full is not None:
            return self.state.full.detach()
        self.state.calls.add(function, self.state.meta.shape)
        with torch.no_grad(), torch.autocast(self.state.upsampling.scores.device.type, enabled=False):
            return self.rebuilt()

    def in_full(self, function: Any = None) -> Tensor:
        """The resized tensor, computed once; ``function`` is the call that needs it.

        This object becomes that tensor, unless something else holds it, or a gradient may need the graph of results.
        """
        state = self.state
        if state.full is not None:
            return state.full
        if state.used and function in (Tensor.register_hook, Tensor.retain_grad):
            raise RuntimeError(
                f"call {function.__name__} before a loss or a copy of the logits is made, or restore the model"
            )
        state.calls.add(function, state.meta.shape)
        device, own = state.upsampling.scores.device.type, self.node() is state.node
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(state.root.requires_grad or not own),
            torch.autocast(device, enabled=False),
        ):
            if not own:
                full = Follow.apply(self)
            elif state.parent is None or state.view is None:
                full = self.rebuilt()
            else:
                full = state.view(_in_full(state.parent))
        if not state.results:  # see _grad
            with contextlib.suppress(RuntimeError):
                torch.utils.swap_tensors(self, full)
                return self
        state.full = full
        return full

    def answer(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result without the resized tensor, or None."""
        upsampling = self.state.upsampling
        if function in (Tensor.unbind, torch.unbind) and upsampling.batched and args in ((), (0,)) and not kwargs:
            return tuple(map(self._unbound, range(len(self))))
        if function is F.interpolate:
            return _child(self.state, upsampling, lambda full: function(full, *args, **kwargs), None)
        if function in COPIES:
            return self.copy(function, args, kwargs)
        if not pays(upsampling, function):
            self.in_full()
            return None
        out = without_resize(upsampling, function, args, kwargs)

        def plain(full: Tensor) -> Any:
            return function(full, *args, **kwargs)

        if isinstance(out, Upsampling):
            return _child(self.state, out, plain, self)
        first = out[0] if isinstance(out, tuple) else out
        if isinstance(first, Tensor) and first.requires_grad:
            edge = torch.autograd.graph.get_gradient_edge(first)
            self.state.note(edge, plain if first is out else lambda full: plain(full)[0])
        return out

    def _unbound(self, i: int) -> Upsampled:
        image = self.state.upsampling.getitem(i)
        assert image is not None
        return _child(self.state, image, lambda full: full.unbind()[i], self)

    def copy(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A cast, a move or another layout, which waits as well; itself where PyTorch returns the tensor itself."""
        state = self.state
        scores = state.upsampling.scores
        goal = destination(scores, function, args, kwargs)
        if goal is None:
            return None
        device, dtype, new_layout = goal
        if function is Tensor.contiguous:
            new_layout = not state.meta.is_contiguous()
        if (device, dtype) == (scores.device, scores.dtype) and not new_layout:
            return self
        upsampling = replace(state.upsampling, scores=scores.to(device, dtype))

        def copy(full: Tensor) -> Tensor:
            return function(full) if new_layout else full.to(full.device if full.is_meta else device, dtype)

        return _child(state, upsampling, copy, None)
