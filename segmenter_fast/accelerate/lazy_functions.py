"""PyTorch's functions that a resize which waits understands."""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..kernels.cpu.native import kernel
from .upsampling import Upsampling

_ATTRIBUTES = (
    "shape dtype device layout ndim requires_grad grad_fn is_leaf is_cuda is_cpu is_meta is_sparse is_quantized"
)
_QUESTIONS = "is_floating_point is_complex is_signed is_same_size is_inference numel"
_METHODS = "size dim ndimension nelement stride storage_offset is_contiguous element_size get_device __len__"
# Answered from shape, strides, dtype and device.
METADATA = frozenset(
    [getattr(Tensor, name).__get__ for name in _ATTRIBUTES.split()]
    + [getattr(Tensor, name) for name in (_METHODS + " " + _QUESTIONS).split()]
    + [getattr(torch, name) for name in _QUESTIONS.split()]
)
_LAYOUTS = frozenset({Tensor.contiguous, Tensor.clone, torch.clone})
_CASTS = {Tensor.float: torch.float32, Tensor.double: torch.float64, Tensor.half: torch.float16} | {
    Tensor.bfloat16: torch.bfloat16
}
# From scores per token to scores per patch.
_SHAPES = "reshape view unflatten permute transpose swapaxes movedim mT"
SHAPES = frozenset(
    [getattr(Tensor, name) for name in _SHAPES.split()[:-1]]
    + [getattr(torch, name) for name in _SHAPES.split() if hasattr(torch, name)]
    + [Tensor.mT.__get__]  # type: ignore[attr-defined]
)
# They take shape, dtype and device of a tensor and no values: of their own, or of another one.
_NEW = frozenset(getattr(Tensor, f"new_{name}") for name in ("empty", "full", "ones", "tensor", "zeros"))
_LIKE = frozenset({Tensor.expand_as, Tensor.reshape_as, Tensor.to, Tensor.type_as, Tensor.view_as})
COPIES = frozenset({*_CASTS, *_LAYOUTS, Tensor.to, Tensor.cpu})
VIEWS: dict[Any, Callable[..., Upsampling | None]] = {
    **{function: Upsampling.detach for function in (Tensor.detach, torch.detach)},
    **{function: Upsampling.squeeze for function in (Tensor.squeeze, torch.squeeze)},
    **{function: Upsampling.unsqueeze for function in (Tensor.unsqueeze, torch.unsqueeze)},
    Tensor.__getitem__: Upsampling.getitem,
}
_RESULTS: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: Upsampling.cross_entropy,
    F.softmax: Upsampling.softmax,
    Tensor.softmax: lambda upsampling, dim, dtype=None: upsampling.softmax(dim, dtype=dtype),
    torch.softmax: lambda upsampling, dim, dtype=None: upsampling.softmax(dim, dtype=dtype),
    **{function: Upsampling.argmax for function in (Tensor.argmax, torch.argmax)},
    **{function: Upsampling.max for function in (Tensor.max, torch.max)},
    **{function: Upsampling.topk for function in (Tensor.topk, torch.topk)},
}
# Logits, those in a channels-last layout, pixels per patch, and classes, from which the fused op is faster on a CPU,
# for its C++ kernel and for its PyTorch formulation. Without an entry it always is. Measured on two cores of an EPYC
# with AVX512, float32, 2 to 150 classes.
_ARGMAX = ((1 << 15, 1 << 17, 1, 1), (8 << 20, 8 << 20, 2, 1))
_SOFTMAX = ((1 << 18, 1 << 16, 0, 1), (16 << 20, 16 << 20, 8, 1))
_MAX = ((1 << 19, 1 << 21, 0, 16), (16 << 20, 16 << 20, 8, 16))
FASTER_FROM: dict[Any, tuple[tuple[int, int, int, int], tuple[int, int, int, int]]] = {
    F.cross_entropy: ((1 << 17, 1 << 17, 0, 1), (2 << 20, 2 << 20, 4, 1)),
    **{function: _ARGMAX for function in (Tensor.argmax, torch.argmax)},
    **{function: _SOFTMAX for function in (F.softmax, Tensor.softmax, torch.softmax)},
    **{function: _MAX for function in (Tensor.max, torch.max)},
}
_signature = functools.cache(inspect.signature)


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and (device.type == "cpu" or (device.type == "cuda" and dtype != torch.float64))


def is_transformed() -> bool:
    """True inside ``torch.func`` and forward-mode differentiation, which PyTorch refuses for the ops."""
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def pays(upsampling: Upsampling, function: Any) -> bool:
    """False for a result of few logits, which PyTorch computes faster from the resized tensor."""
    scores, size = upsampling.scores, upsampling.size
    if scores.device.type != "cpu" or function not in FASTER_FROM:
        return True
    cpp, formulation = FASTER_FROM[function]
    planar, channels_last, ratio, classes = cpp if kernel(scores, "upsample_argmax") else formulation
    logits = scores.shape[0] * scores.shape[1] * math.prod(upsampling.crop)
    enough = logits >= (planar if scores.is_contiguous() else channels_last) and scores.shape[1] >= classes
    return enough and math.prod(size) >= ratio * scores.shape[2] * scores.shape[3]


def outlined(function: Any, args: tuple[Any, ...], cls: type[Tensor]) -> tuple[Any, ...]:
    """The arguments; one element, expanded, stands for tensors of ``cls`` whose values the function does not read."""
    here = slice(0, 1) if function in _NEW else slice(1, 2) if function in _LIKE else slice(0)
    outlines = [
        torch.empty(1, dtype=x.dtype, device=x.device).expand(x.shape) if isinstance(x, cls) else x for x in args[here]
    ]
    return (*args[: here.start or 0], *outlines, *args[here.stop :])


def may_pay(upsampling: Upsampling) -> bool:
    """False for a resize of so few logits that PyTorch is faster at what is usually computed of it."""
    grad = upsampling.scores.requires_grad and torch.is_grad_enabled()
    uses = (F.cross_entropy,) if grad else (F.cross_entropy, Tensor.argmax)
    return any(pays(upsampling, use) for use in uses)


def keeps_size(resized: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True for a second resize, to the size of the first and in its dtype: finite values stay the same."""
    again = Upsampling.of(resized, *args, **kwargs)
    casts = resized.dtype != torch.float32 and any(map(torch.is_autocast_enabled, ("cpu", "cuda")))
    return again is not None and again.size == resized.shape[2:] and not casts


@functools.cache
def _disabled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compiler.disable(function)


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, outside of the traces of torch.compile, which take one function of PyTorch for another."""
    return _disabled(function) if "torch._dynamo" in sys.modules else function


def positional(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, with an ``input`` given by name as the first of them."""
    kwargs = dict(kwargs or {})
    return ((kwargs.pop("input"),), kwargs) if not args and "input" in kwargs else (args, kwargs)


def without_resize(upsampling: Upsampling, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The upsampling of a view, or a result; None if the function or its arguments are none of those above."""
    method = VIEWS.get(function) or _RESULTS.get(function)
    if method is None:
        return None
    try:
        _signature(method).bind(upsampling, *args, **kwargs)
    except TypeError:
        return None
    return method(upsampling, *args, **kwargs)


def destination(
    scores: Tensor, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.device, torch.dtype, bool] | None:
    """Device and dtype of what one of ``COPIES`` returns, and True if it may be in another layout; None to resize."""
    device, dtype = scores.device, _CASTS.get(function, scores.dtype)
    if function is Tensor.to:
        try:
            with torch._C.DisableTorchFunctionSubclass():
                to_device, to_dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        except TypeError:
            return None
        device, dtype = to_device or device, to_dtype or dtype
        if layout is not None:
            return None
    elif args or kwargs:
        return None
    elif function is Tensor.cpu:
        device = torch.device("cpu")
    rounds = dtype.itemsize < scores.dtype.itemsize  # rounded logits have other labels than rounded scores
    return (device, dtype, function in _LAYOUTS) if has_kernel(device, dtype) and not rounds else None
