"""What the Triton kernels share: constants, the cell geometry of ``bilinear.Axis``, how a build is described."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


class Specialization(NamedTuple):
    """One build of a kernel that a real launch would ask for; modules yield them from ``specializations(arch)``.

    ``signature`` maps every run-time argument to its type (``"*bf16"``, ``"i32"``, ``"fp32"``), ``constexprs`` every
    other one to its value; a stride of 1 belongs there, as a launch folds it. Pointers and arguments named ``stride_*``
    count as divisible by 16 unless ``odd`` names them. ``options`` are ``num_warps``, ``num_stages`` and the like.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int]
    odd: frozenset[str] = frozenset()


@triton.jit
def cell_start(cell, step, offset, denominator, kept):
    """``Axis.cell_starts``: the first kept output of ``cell`` (int64, so that the products cannot overflow)."""
    step = tl.maximum(step, 1)
    return tl.minimum((tl.maximum(cell * denominator - offset, 0) + step - 1) // step, kept)


def device_arch(tensor: Tensor) -> str:
    """``"sm_90"`` or ``"gfx942"``; interpreted CPU tensors take the table of sm_80."""
    if tensor.device.type == "cpu":
        return "sm_80"
    properties = torch.cuda.get_device_properties(tensor.device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def dot_precision(dtype: torch.dtype, arch: str) -> str:
    """``"tf32"`` where PyTorch's own float32 matrix products may use it, ``"ieee"`` elsewhere."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and arch.startswith("sm_") else "ieee"


def refuse_float64(op: str, tensor: Tensor) -> None:
    """Raise where the Triton kernels of ``op`` have no float64 arithmetic."""
    if tensor.dtype == torch.float64:
        raise TypeError(
            f"{op} on this device takes float32, bfloat16 or float16, got torch.float64; use "
            f"segmenter_fast.kernels.reference.{op} for float64"
        )
