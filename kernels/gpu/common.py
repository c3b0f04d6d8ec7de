"""Helpers that the Triton launchers share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
# Compiled by Triton 3.6 some tiles spill that do not with 3.7: launch configurations make exceptions for it.
TRITON_3_6 = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
MOST_PROGRAMS = 2**31 - 1  # along the first axis of a grid


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up, for the host: Triton's own costs microseconds a call."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least ``n`` (positive), for the host."""
    return 1 << (n - 1).bit_length()


def device_arch(tensor: Tensor) -> str:
    """``"sm_90"`` or ``"gfx942"``, of the GPU that Triton launches on; interpreted CPU tensors use sm_80's tables."""
    if tensor.is_cuda:
        return _arch_of(tensor.get_device())
    return "sm_80" if tensor.is_cpu else _current_arch()


@lru_cache
def _arch_of(device: int) -> str:
    """Architecture of ``device``, which is the current one."""
    return _current_arch()


def _current_arch() -> str:
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def processors(tensor: Tensor) -> int:
    """Multiprocessors or compute units of the tensor's GPU; an H100's where a launch is interpreted or recorded."""
    return _processors(tensor.get_device()) if tensor.is_cuda else 132


@lru_cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def dot_precision(dtype: torch.dtype, arch: str) -> str:
    """``"tf32"`` where PyTorch's own float32 matrix products may use it, ``"ieee"`` elsewhere."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and arch.startswith("sm_") else "ieee"


@lru_cache
def launch_arguments(tiles: Any) -> dict[str, int]:
    """A named tuple of tiles as keywords of a launch: ``block_m`` is the constant BLOCK_M, ``num_warps`` an option."""
    given = {name: value for name, value in tiles._asdict().items() if (name, value) != ("maxnreg", 0)}
    return {name if name.startswith(("num_", "maxnreg")) else name.upper(): value for name, value in given.items()}


def programs(*grid: int, **shapes: Sequence[int]) -> tuple[int, ...]:
    """``grid``, the programs of a launch along each axis.

    Raises:
        ValueError: more programs than a GPU takes along an axis; ``shapes`` of tensors are named.
    """
    if grid[0] > MOST_PROGRAMS or max(grid[1:], default=0) > 65535:
        given = " and ".join(f"{name} of shape {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(f"{given} need {grid} programs, a launch takes at most {MOST_PROGRAMS}; split the batch")
    return grid


def refuse_float64(op: str, tensor: Tensor) -> None:
    """Raise where the Triton kernels of ``op`` have no float64 arithmetic."""
    if tensor.dtype == torch.float64:
        raise TypeError(
            f"{op} on this device takes float32, bfloat16 or float16, got torch.float64; use "
            f"segmenter_fast.kernels.reference.{op} for float64"
        )
