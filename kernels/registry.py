"""The operator library ``segmenter_fast``: definitions, and which backend serves which device.

CUDA and ROCm tensors run Triton kernels, tensors of every other device the plain formulations in ``cpu/``.
``TRITON_INTERPRET=1`` sends CPU tensors through the Triton kernels, interpreted. Where Triton does
not exist the plain formulations serve every device, said once by a warning.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

library = torch.library.Library("segmenter_fast", "DEF")

# The Triton attention takes these. Models are held to them on every device, because they may move to a GPU.
HEAD_SIZES = (16, 32, 64, 80, 96, 128)
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "on"}

# Dtype of statistics, accumulators and losses for the dtype of an input: float64 for float64, float32 for all others.
statistics_dtype = functools.partial(torch.promote_types, torch.float32)


def define(
    schema: str,
    *,
    triton: str | None,
    plain: Callable[..., Any],
    fake: Callable[..., Any],
    pack: Callable[..., tuple[Any, ...]] | None = None,
) -> None:
    """Define an operator and register its backends.

    Args:
        schema: name, arguments and results, as for ``torch.library.define``.
        triton: ``".module:function"``, imported at the first call, so that a CPU process never imports Triton; None
            for an operator that is plain PyTorch on every device.
        plain: formulation for the CPU and for every device without Triton.
        fake: function of the schema's arguments that returns empty results of the right shapes and dtypes.
        pack: turns the schema's flat arguments into those of ``triton`` and ``plain``; not given where they are equal.
    """
    name = schema.split("(")[0]
    library.define(schema)
    torch.library.register_fake(f"segmenter_fast::{name}", fake, lib=library)
    fused = None
    if triton and HAS_TRITON:
        fused = _triton_backend(*triton.split(":"), pack)
        library.impl(name, fused, "CUDA")
    if pack:
        plain = _packed(plain, pack)
    library.impl(name, fused if fused and INTERPRET else plain, "CPU")
    library.impl(name, _warning(plain) if triton and not HAS_TRITON else plain, "CompositeExplicitAutograd")


def _triton_backend(module: str, function: str, pack: Callable[..., tuple[Any, ...]] | None) -> Callable[..., Any]:
    """Launch on the device of the first argument: Triton launches on the current one."""

    def call(*args: Any) -> Any:
        backend = getattr(importlib.import_module(module, __package__), function)
        with torch.cuda.device_of(args[0]):
            return backend(*(pack(*args) if pack else args))

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


def differentiable(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Register the first derivative of ``name``."""
    torch.library.register_autograd(f"segmenter_fast::{name}", backward, setup_context=setup_context, lib=library)


def once_differentiable(*names: str) -> None:
    """Make a derivative of these backward operators a clear error."""

    def save_nothing(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    for name in names:

        def refuse(ctx: Any, *grads: Any, name: str = name) -> None:
            raise NotImplementedError(
                f"segmenter_fast::{name} has no derivative: second derivatives through the fused ops are not "
                "supported; use segmenter_fast.kernels.reference for them"
            )

        differentiable(name, refuse, save_nothing)


def refuse_forward_mode(op: str, *inputs: torch.Tensor) -> None:
    """Raise where a forward-mode tangent would be dropped without a word."""
    if not torch.compiler.is_compiling() and any(forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise NotImplementedError(
            f"{op} has no forward-mode derivative; use segmenter_fast.kernels.reference.{op} for it"
        )


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """The autocast dtype of the tensor's device, or None outside an autocast region."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
