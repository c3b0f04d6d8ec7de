"""The operator library ``segmenter_fast``: definitions, the backend of each device, and rules that all ops share.

CUDA and ROCm tensors run Triton kernels, tensors of every other device the plain formulations in ``cpu/``. One op has a
rule of its own: ``ops.attention`` takes PyTorch's kernel on NVIDIA GPUs before compute capability 8.0.
``TRITON_INTERPRET=1`` sends CPU tensors through the Triton kernels, interpreted. Where Triton does not exist,
the plain formulations serve every device, and a warning says so.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

library = torch.library.Library("segmenter_fast", "DEF")

# The Triton attention takes these. Models are held to them on every device, because they may move to a GPU.
HEAD_SIZES = (16, 32, 64, 80, 96, 128)
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "on"}

# The Triton backend of each operator, in the arguments of its schema.
FUSED: dict[str, Callable[..., Any]] = {}

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Dtype of statistics, accumulators and losses for the dtype of an input: float64 for float64, float32 for all others.
statistics_dtype = functools.partial(torch.promote_types, torch.float32)


def widest(device: torch.device | str) -> torch.dtype:
    """Dtype of geometry and of sums on a device: float64; float32 on Apple's GPUs (mps), which have no float64."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def label_dtype(classes: int) -> torch.dtype:
    return torch.uint8 if classes <= 256 else torch.int32


# Types of devices that autocast knows. Asked once, because PyTorch 2.11 cannot compile the question.
_AUTOCAST = frozenset(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Dtype of autocast where it is on for the device of ``tensor``; None elsewhere and for float64."""
    device = tensor.device.type
    if device in _AUTOCAST and torch.is_autocast_enabled(device) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return None


def define(
    schema: str,
    *,
    triton: str | None,
    plain: Callable[..., Any],
    fake: Callable[..., Any],
    pack: Callable[..., tuple[Any, ...]] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Define an operator; register its backends and its first derivative.

    Args:
        schema: name, arguments and results, as for ``torch.library.define``.
        triton: ``".module:function"``, imported at the first call, so that a CPU process never imports Triton; None
            for an operator that is plain PyTorch on every device.
        plain: formulation for the CPU and for every device without Triton.
        fake: function of the schema's arguments that returns empty results of the right shapes and dtypes.
        pack: turns the schema's flat arguments into those of ``triton`` and ``plain``; not given where they are equal.
        setup_context, backward: as for ``torch.library.register_autograd``.
    """
    name = schema.split("(")[0]
    library.define(schema)
    torch.library.register_fake(f"segmenter_fast::{name}", fake, lib=library)
    fused = _triton_backend(*triton.split(":")) if triton and HAS_TRITON else None
    if pack:
        plain, fused = _packed(plain, pack), fused and _packed(fused, pack)
    library.impl(name, fused if fused and INTERPRET else plain, "CPU")
    library.impl(name, _warning(plain) if triton and not HAS_TRITON else plain, "CompositeExplicitAutograd")
    if fused:
        library.impl(name, fused, "CUDA")
        FUSED[name] = fused
    if backward:
        torch.library.register_autograd(f"segmenter_fast::{name}", backward, setup_context=setup_context, lib=library)


def runs_triton(tensor: Tensor) -> bool:
    """Operators on the device of ``tensor`` run their Triton kernels."""
    return HAS_TRITON and (tensor.is_cuda or (INTERPRET and tensor.is_cpu))


def _triton_backend(module: str, function: str) -> Callable[..., Any]:
    """The function, imported at its first call and run with the device of its first argument as the current one."""

    @functools.cache
    def backend() -> Callable[..., Any]:
        return getattr(importlib.import_module(module, __package__), function)

    def call(*args: Any) -> Any:
        tensor = args[0]
        if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
            with torch.cuda.device(tensor.get_device()):  # Triton launches on the current device
                return backend()(*args)
        return backend()(*args)

    return call


def _packed(function: Callable[..., Any], pack: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    return lambda *args: function(*pack(*args))


def _warning(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        warnings.warn(
            "Triton is not installed: segmenter_fast.kernels runs its plain PyTorch formulations on this device",
            RuntimeWarning,
            stacklevel=2,
        )
        return function(*args)

    return call


def differentiable_gradients(
    function: Callable[..., Tensor], grad: Tensor, *inputs: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients by ``inputs`` of a function of ``reference``, given ``grad`` by its result, with a graph.

    A registered derivative calls it where gradients are enabled, which they are under ``create_graph=True`` alone. The
    kernels of the derivatives have none of their own; those of PyTorch's functions are of any order.
    """
    device, dtype = grad.device.type, statistics_dtype(grad.dtype)
    with torch.autocast(device, enabled=False) if device in _AUTOCAST else contextlib.nullcontext():
        own = [tensor.view_as(tensor) for tensor in inputs]  # hooks of the inputs see the result alone
        wanted = [tensor for tensor in own if tensor.requires_grad]
        out = function(*(tensor.to(dtype) for tensor in own))
        found = iter(torch.autograd.grad(out, wanted, grad.to(dtype), create_graph=True))
    return tuple(next(found) if tensor.requires_grad else None for tensor in own)


def refuse_forward_mode(op: str, *tensors: Tensor) -> None:
    """Raise NotImplementedError if a tensor has a tangent of forward-mode differentiation."""
    for tensor in tensors:
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{op} has no forward-mode derivative; use segmenter_fast.kernels.reference.{op} for it"
            )


def require_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """Raise TypeError if the dtype of an argument is none of ``allowed``."""
    if tensor.dtype not in allowed:
        *names, last = (str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{name} must be {', '.join(names)}{' or ' if names else ''}{last}, got {tensor.dtype}")


def require_one_device(**tensors: Tensor | None) -> None:
    """Raise ValueError where the arguments, by name, are on more than one device; None is on none."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        given = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all arguments must be on one device, got {given}")
