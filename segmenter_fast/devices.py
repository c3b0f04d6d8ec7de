"""Choice of device, dtype and compilation, "auto" among them."""

from __future__ import annotations

import os
import warnings
from functools import cache

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


def choose_dtype(dtype: str | torch.dtype, device: torch.device, int8: bool = False) -> torch.dtype:
    """A dtype of ``DTYPES``, by itself or by name.

    "auto" is bfloat16 if the hardware multiplies it fast, else float16 on a GPU or float32. With ``int8`` linear
    layers it is float32 on CPUs without AMX: bfloat16 for the rest was slower (AMD EPYC, AVX512, B/16 387 / 399 ms).

    Raises:
        ValueError: another name or dtype.
    """
    if dtype == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        fast = device.type == "cpu" and (cpu_has("amx_tile") if int8 else cpu_is_fast_in_bfloat16())
        return torch.bfloat16 if fast else torch.float32
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {dtype!r}")
    return chosen


def choose_compile(compile: bool | str, device: torch.device, dtype: torch.dtype) -> bool:
    """Return ``compile``, or for "auto" True where ``torch.compile`` makes the inference form faster.

    | device | "auto" |
    |---|---|
    | CUDA, ROCm | True |
    | CPU with AMX, bfloat16 | True |
    | other CPUs, other dtypes | False |

    Raises:
        ValueError: another value.
    """
    if compile == "auto":
        return device.type == "cuda" or (device.type == "cpu" and dtype == torch.bfloat16 and cpu_has("amx_tile"))
    if not isinstance(compile, bool):
        raise ValueError(f"compile must be True, False or 'auto', got {compile!r}")
    return compile


def computes_slowly(dtype: torch.dtype, device: torch.device) -> bool:
    """True if matrix products in a low-precision ``dtype`` are slower than float32 on the device, for want of units."""
    if device.type == "cpu":
        fast = {torch.bfloat16: cpu_is_fast_in_bfloat16, torch.float16: cpu_is_fast_in_float16}
        return dtype in fast and not fast[dtype]()
    return device.type == "cuda" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(False)


@cache
def warn_of_slow_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Warn, once for a dtype and device, that ``computes_slowly``."""
    name = str(dtype).removeprefix("torch.")
    if device.type == "cpu":
        has = f"this CPU ({torch.backends.cpu.get_cpu_capability()}) has no {name} units"
        doing = f"linear layers keep their weights in {name}, for half the memory, and compute in float32"
    else:
        has = f"{torch.cuda.get_device_name(device)} has no {name} units"
        doing = f"it emulates {name} slowly"
    best = str(choose_dtype("auto", device)).removeprefix("torch.")
    warnings.warn(f"{has}: {doing}; dtype='auto' takes {best}, the fastest here", stacklevel=4)


def numeric_state(device_type: str) -> tuple[object, ...]:
    """PyTorch's settings that decide which kernels a call runs: autocast, TF32 of products and of convolutions."""
    autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    convolutions = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return autocast, torch.backends.cuda.matmul.fp32_precision, convolutions


def cpu_is_fast_in_bfloat16() -> bool:
    """True if the CPU has bfloat16 matrix products (AMX or AVX512-BF16); False also if PyTorch cannot tell."""
    return cpu_has("amx_tile") or cpu_has("avx512_bf16")


def cpu_is_fast_in_float16() -> bool:
    """True if the CPU has float16 matrix products (AMX or AVX512-FP16); False also if PyTorch cannot tell."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)
    return supported is not None and bool(supported())


def cpu_has(feature: str) -> bool:
    """True if PyTorch detects an instruction set of x86 and may use it: ATEN_CPU_CAPABILITY can forbid AVX512."""
    check = getattr(torch.cpu, f"_is_{feature}_supported", None)
    return bool(check and check()) and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Let the C library reuse freed blocks below 31 MB: glibc takes the largest freed block as its threshold.

    Source: mallopt(3), M_MMAP_THRESHOLD. The memory is never touched.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")
