"""Linear layers of the inference form."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .devices import cpu_is_fast_in_bfloat16
from .vit import Mlp


class StoredLinear(nn.Linear):
    """A linear layer that stores its weights in one dtype and computes in that of its input."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def store_linears(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert the weights of the linear layers within ``module`` to ``dtype``, in place; they compute as before."""
    for child in module.modules():
        if type(child) is nn.Linear:
            child.to(dtype)
            child.__class__ = StoredLinear


class PackedLinear(nn.Linear):
    """A linear layer that keeps, on a CPU, a copy of its weights in oneDNN's layout, made at the first call.

    GFLOP/s of oneDNN's products of packed weights and of ``F.linear``, which runs MKL's, at 1025 x 384 x 1152, float32,
    two cores of an AMD EPYC (Zen 5): 473 and 218, as MKL leaves AVX512 unused on AMD; both held to AVX2, 252 and 214.
    oneDNN's products of weights that are not packed give 395 and 242.
    """

    packed: Tensor | None = None

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """Apply the layer and, with ``gelu``, an exact GELU."""
        if x.device.type != "cpu" or x.dtype != self.weight.dtype or not x.numel() or not _packs(x.dtype):
            out = F.linear(x, self.weight, self.bias)
            return F.gelu(out) if gelu else out
        if self.packed is None:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())
        fused = gelu and torch.backends.cpu.get_cpu_capability().startswith("AVX512")  # slow in oneDNN's AVX2
        attribute = "gelu" if fused else "none"
        out = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, attribute, [], "none")
        return torch.ops.aten.gelu_(out) if gelu and not fused else out

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": None}


class PackedMlp(Mlp):
    """An MLP of two packed layers, for inference."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x, gelu=True))


def pack_linears(module: nn.Module) -> None:
    """Make the linear layers within ``module`` packed ones, in place, where oneDNN multiplies their dtype."""
    for child in module.modules():
        if type(child) is nn.Linear and _packs(child.weight.dtype):
            child.__class__ = PackedLinear
    for child in module.modules():
        if type(child) is Mlp and isinstance(child.fc1, PackedLinear):
            child.__class__ = PackedMlp


def unpack(module: nn.Module) -> None:
    """Drop the packed copies within ``module``; the next call makes them again."""
    for child in module.modules():
        if isinstance(child, PackedLinear):
            child.packed = None


def _packs(dtype: torch.dtype) -> bool:
    """True if oneDNN's packed products of ``dtype`` are faster than PyTorch's own on this CPU."""
    known = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return known and (dtype == torch.float32 or (dtype == torch.bfloat16 and cpu_is_fast_in_bfloat16()))
