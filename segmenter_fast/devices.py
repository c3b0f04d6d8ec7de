"""Choice of device and dtype, "auto" among them."""

from __future__ import annotations

import os

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes of weights and activations, by name."""


def choose_device(name: str = "auto") -> torch.device:
    """The device of a name; "auto" is a CUDA or ROCm device if there is one, else the CPU.

    Raises:
        ValueError: a device that PyTorch does not know or that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name} is not there: PyTorch {torch.__version__} sees no such CUDA or ROCm device")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name; "auto" is bfloat16 if the hardware multiplies it fast, else float16 on a GPU or float32.

    Raises:
        ValueError: an unknown name.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        return torch.bfloat16 if device.type == "cpu" and cpu_is_fast_in_bfloat16() else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def cpu_is_fast_in_bfloat16() -> bool:
    """True if the CPU has bfloat16 matrix products (AMX or AVX512-BF16); False also if PyTorch cannot tell."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(bool(check()) for check in checks if callable(check))


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
