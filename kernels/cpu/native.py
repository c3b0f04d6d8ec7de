"""C++ kernels of ``src/``, compiled for this processor at their first call, as Triton's are for a GPU.

A source becomes a shared library that knows pointers and numbers only, in a second, with the compiler of ``CXX``,
``g++`` or ``clang++``. The library is kept in ``$SEGMENTER_FAST_CACHE``, or in ``segmenter-fast`` of the user's cache
folder. Where there is no compiler or no AVX2, or with ``SEGMENTER_FAST_NATIVE=0``, callers take PyTorch's operators.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SOURCES = Path(__file__).with_name("src")
_FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-fopenmp",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
)
# Types of arguments: pointer, integer, float, double.
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float, "d": ctypes.c_double}
# Source of each kernel and the types of its arguments.
_KERNELS = {
    "attention": ("attention", "pppp" + "i" * 10 + "f"),
    "attention_backward": ("attention_backward", "pppppp" + "i" * 10 + "f"),
    "best_match": ("best_match", "ppppp" + "iiii" + "iiii" + "ii"),
    "upsample_argmax": ("upsample_argmax", "ppppp" + "ppp" + "iiiii" + "iiiiiii"),
    "upsample_cross_entropy": ("upsample_cross_entropy", "ppipi" + "pppi" + "fff" + "pppi"),
    "target_classes": ("upsample_cross_entropy", "pii" + "ipi" + "ppi"),
    "upsample_softmax": ("upsample_softmax", "ppip" + "pi"),
    "upsample_softmax_backward": ("upsample_softmax", "pppp" + "ipi" + "pi"),
    "lattice_softmax": ("upsample_softmax", "ppppppp" + "iiiii"),
    "unit_rows": ("unit_rows", "pppp" + "i" * 8 + "f"),
    "bipartite_groups": ("merge_tokens", "pppp" + "iiiii" + "f"),
    "merge_tokens": ("merge_tokens", "pppppp" + "i" * 8),
    "merge_tokens_backward": ("merge_tokens", "pppppp" + "i" * 8),
}
_lock = threading.Lock()


def kernel(tensor: Tensor, name: str) -> Callable[..., Any] | None:
    """A C++ kernel for a tensor; None for a device or dtype that PyTorch's operators serve."""
    if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.bfloat16):
        return None
    source, types = _KERNELS[name]
    return function(source, name, types)


def function(source: str, name: str, types: str) -> Callable[..., Any] | None:
    """Function ``name`` of ``src/<source>.cpp`` without a result; None where C++ kernels do not run.

    ``types`` has a letter for each argument: p (``Tensor.data_ptr()`` or None), i (64 bits), f or d. The call holds no
    lock of Python. Tensors must outlive it.
    """
    if unavailable():
        return None
    with _lock:
        library = _library(source)
    if library is None:
        return None
    found = getattr(library, name)
    if found.argtypes is None:
        found.argtypes, found.restype = [_TYPES[letter] for letter in types], None
    return found


@cache
def has_feature(*names: str) -> bool:
    """True if the processor has one of these features, by PyTorch's names."""
    features: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(features.get(name) for name in names)


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def unavailable() -> str | None:
    """Reason why no C++ kernel can run in this process, or None."""
    if os.environ.get("SEGMENTER_FAST_NATIVE", "1").lower() in {"0", "false", "off", "no"}:
        return "SEGMENTER_FAST_NATIVE=0"
    return _unsupported()


@cache
def _unsupported() -> str | None:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"they need Linux on x86-64, this is {platform.system()} on {platform.machine()}"
    if not torch.backends.cpu.get_cpu_capability().startswith(("AVX2", "AVX512")):
        return f"they need AVX2, PyTorch uses {torch.backends.cpu.get_cpu_capability()}"
    if not _compiler():
        _warn(reason := "there is no C++ compiler: install g++ or clang++, or set CXX")
        return reason
    return None


@cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"PyTorch's slower operators run instead of C++ kernels: {reason} (SEGMENTER_FAST_NATIVE=0 accepts it)",
        RuntimeWarning,
        stacklevel=2,
    )


@cache
def _compiler() -> list[str]:
    """Command that starts the compiler, empty if there is none."""
    given = os.environ.get("CXX", "")
    try:
        chosen = shlex.split(given)
    except ValueError:  # an open quotation
        chosen = []
    found = next((command for command in (chosen, ["g++"], ["clang++"]) if command and shutil.which(command[0])), [])
    if given and found and found != chosen:
        warnings.warn(f"CXX={given} is no compiler; {found[0]} compiles the C++ kernels", RuntimeWarning, stacklevel=2)
    return found


@cache
def _library(source: str) -> ctypes.CDLL | None:
    """The library of a source, compiled if it is not in the cache; None, with a warning, if that fails."""
    flags = list(_FLAGS)
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):  # chosen by ATEN_CPU_CAPABILITY, too
        flags.append("-mno-avx512f")
    try:
        return ctypes.CDLL(str(_built(source, flags)))
    except (OSError, subprocess.SubprocessError) as error:
        code = getattr(error, "returncode", None)
        said = getattr(error, "stderr", None) or (str(error) if code is None else f"it ended with code {code}")
        reason = next((line for line in said.splitlines() if "error" in line), said.splitlines()[0])
        _warn(f"{shlex.join(_compiler())} made no library of {source}.cpp: {reason}")
        return None


def _built(source: str, flags: list[str]) -> Path:
    """Path of the compiled library, which ends with a digest: one that a crash or a full disk cut is made anew."""
    files = [_SOURCES / f"{source}.cpp", *sorted(_SOURCES.glob("*.h"))]
    programs = [Path(found).resolve() for word in _compiler() if (found := shutil.which(word))]
    identity = [*_compiler(), *flags, *(f"{path} {path.stat().st_mtime_ns}" for path in programs), _processor()]
    digest = hashlib.sha256("\n".join([*identity, *(path.read_text() for path in files)]).encode()).hexdigest()
    path = _cache_folder() / f"{source}-{digest[:20]}.so"
    if not _is_whole(path):
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".building-") as folder:
            made = Path(folder, path.name)
            command = [*_compiler(), *flags, str(files[0]), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            if not made.exists():
                raise OSError("it wrote nothing")
            code = made.read_bytes()
            made.write_bytes(code + hashlib.sha256(code).digest())  # what follows a library is not loaded
            made.replace(path)
    return path


def _is_whole(library: Path) -> bool:
    code = library.read_bytes() if library.is_file() else b""
    return hashlib.sha256(code[:-32]).digest() == code[-32:]


@cache
def _cache_folder() -> Path:
    """Absolute path of a folder of the user's that can be written, else of a temporary one, with a warning."""
    try:
        chosen, home = os.environ.get("SEGMENTER_FAST_CACHE"), os.environ.get("XDG_CACHE_HOME")
        folder = Path(chosen or Path(home or Path.home() / ".cache", "segmenter-fast")).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        folder = Path(tempfile.mkdtemp(prefix="segmenter-fast-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        warnings.warn(
            f"C++ kernels are compiled for this process alone and cannot be kept: {error}; set SEGMENTER_FAST_CACHE",
            RuntimeWarning,
            stacklevel=2,
        )
        return folder


@cache
def _processor() -> str:
    """Model and features of the processor: a cache folder may be shared by several machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
