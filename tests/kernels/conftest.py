"""One set of op tests serves four backends: C++ and PyTorch on the CPU, Triton interpreted there, Triton on a GPU."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from segmenter_fast.kernels.cpu import attention, native

_M_PERTURB = -6  # of mallopt


@dataclass(frozen=True)
class Backend:
    """A place where ops run."""

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]  # those whose arithmetic can be trusted there

    def masks(self, k: int, h: int = 2, w: int = 3, b: int = 2) -> Tensor:
        """Random channels-last masks, as a decoder leaves them."""
        return (torch.randn(b, h, w, k) * 2).permute(0, 3, 1, 2).to(self.device)

    def sparse_memory(self, elements: int) -> Tensor:
        """Float16 memory for offsets beyond 32 bits; on the CPU only the touched pages exist."""
        if self.device == "cuda":
            return torch.empty(elements, dtype=torch.float16, device="cuda")
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        return torch.frombuffer(mmap.mmap(-1, 2 * elements, flags=flags), dtype=torch.float16)


_ALL = (torch.float32, torch.bfloat16, torch.float16)
# The interpreter's bfloat16 tl.dot is wrong in Triton 3.7 to 3.9.
BACKENDS = (
    pytest.param(Backend("cpu", "cpu", _ALL), id="cpu"),
    pytest.param(
        Backend("interpret", "cpu", (torch.float32, torch.float16)), id="interpret", marks=pytest.mark.interpret
    ),
    pytest.param(Backend("gpu", "cuda", _ALL), id="gpu", marks=pytest.mark.gpu),
)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


@pytest.fixture(params=[*BACKENDS, pytest.param(Backend("pytorch", "cpu", _ALL), id="pytorch")])
def backend_or_pytorch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """A backend, or the CPU without C++ kernels."""
    if request.param.name == "pytorch":
        monkeypatch.setenv("SEGMENTER_FAST_NATIVE", "0")
    return request.param


@pytest.fixture(params=["", "-mno-avx512bf16", "-mno-avx512f"], ids=["all", "no bfloat16", "AVX2"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """C++ compiled with fewer of the processor's instructions, without AMX; its memory starts with large numbers."""
    if reason := native.unavailable():
        pytest.skip(f"C++ kernels: {reason}")
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, *([request.param] if request.param else [])))
    monkeypatch.setattr(attention, "has_feature", lambda *names: False)
    native._library.cache_clear()
    perturb = ctypes.CDLL(None).mallopt
    perturb(_M_PERTURB, 0x80)
    yield
    perturb(_M_PERTURB, 0)
    monkeypatch.undo()
    native._library.cache_clear()


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Uninitialised memory holds NaN or the largest integer, so that unwritten results are found."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
