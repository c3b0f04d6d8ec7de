"""Linear layers whose products run in 8 bits: int8 everywhere, fp8 on NVIDIA's Hopper and newer.

Weights are quantised once with a scale for each output channel, activations in every call with a scale for each token,
both symmetrically. Products are summed, scaled and given their bias in 32 bits. One scale for all tokens would be
cheaper, but the few large activations of a ViT would leave no bits for the others.

Source: "vector-wise quantization" of Dettmers et al., "LLM.int8()", 2022.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .devices import cpu_is_fast_in_bfloat16
from .vit import Mlp

QUANTIZATIONS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Dtypes of quantised weights and activations, by the names that ``Segmenter.optimize`` takes."""
# Both sides of a weight; products on a GPU need it.
_MULTIPLE = 16
# Rows of an int8 product on a GPU.
_FEWEST_ROWS = 17
_TOKENS = 1024
# Below this width int8 gains nothing over bfloat16 on a CPU with bfloat16 units. AMD EPYC (Zen 5, AVX512 with VNNI, 2
# threads), 512 px, ms an image, bfloat16 / int8, batch 1: T/16 40 / 58, S/16 105 / 134, B/16 319 / 326.
_LEAST_WIDTH = 1024


class QuantizedLinear(nn.Module):
    """A linear layer in 8 bits, made of one in floating point; the output has the dtype of the input.

    Its state dict is that of the floating-point layer: the float32 values that its weights stand for. Loading
    quantises again. ``.to(dtype)`` keeps the scales and the bias in float32.
    """

    weight: Tensor
    """``(out, in)`` int8; fp8 by its bits, which PyTorch can pickle."""
    scale: Tensor
    """``(out,)`` float32, the factor of each row."""
    bias: Tensor | None
    """``(out,)`` float32."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self._quantize(linear)

    def forward(self, x: Tensor) -> Tensor:
        rows, inverse = _quantize_rows(x.flatten(0, -2).float(), self.dtype, _LARGEST[self.dtype])
        if self.dtype == torch.int8:
            # Divided: of two multiplications the compiler makes an op for signed activations, 1000 times slower on CPUs
            # without AMX (PyTorch 2.13).
            y = _int8_product(rows, self.weight).float().div_(inverse).mul_(self.scale)
        else:
            scales = inverse.reciprocal(), self.scale[None]
            y = torch._scaled_mm(rows, self.weight.view(self.dtype).t(), *scales, out_dtype=torch.bfloat16).float()
        if self.bias is not None:
            y = y.add_(self.bias)
        return y.to(x.dtype).unflatten(0, x.shape[:-1])

    def dequantized(self) -> nn.Linear:
        """Return a float32 layer with the values that the weights stand for."""
        rows, columns = self.weight.shape
        linear = nn.Linear(columns, rows, self.bias is not None, device="meta")
        state = {"weight": self.weight.view(self.dtype).float() * self.scale[:, None], "bias": self.bias}
        linear.load_state_dict({name: value for name, value in state.items() if value is not None}, assign=True)
        return linear.requires_grad_(False)

    @torch.no_grad()
    def _quantize(self, linear: nn.Linear) -> None:
        limit = _largest_weight(self.dtype, linear.weight.device.type)
        weight, inverse = _quantize_rows(linear.weight.float(), self.dtype, limit)
        self.register_buffer("weight", weight.view(torch.int8))
        self.register_buffer("scale", inverse.flatten().reciprocal())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float().clone())

    def _fit_device(self) -> None:
        """Quantise again if the weights came from a device that adds larger products exactly."""
        limit = _largest_weight(self.dtype, self.weight.device.type)
        if limit < _LARGEST[self.dtype] and self.weight.abs().amax() > limit:  # int8 only
            self._quantize(self.dequantized())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, own in before.items():
            if own is not None and (moved := self.get_buffer(name)).dtype != own.dtype:
                self._buffers[name] = own.to(moved.device)
        self._fit_device()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._fit_device()

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self.dequantized()._save_to_state_dict(*arguments)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        linear = self.dequantized()
        linear._load_from_state_dict(*arguments)
        self._quantize(linear)


class QuantizedMlp(Mlp):
    """An MLP of two quantised layers, for inference.

    On a CPU about 1024 tokens at a time go through both: the hidden activations of more leave the caches, and their
    memory is returned after each use. B/16, batch 4, 2 threads of an AMD EPYC: 417 ms an image instead of 519.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        rows = x.flatten(0, -2)
        parts = rows.tensor_split(max(round(rows.shape[0] / _TOKENS), 1))
        return torch.cat([self.fc2(torch.ops.aten.gelu_(self.fc1(part))) for part in parts]).unflatten(0, x.shape[:-1])


def check_quantization(quantize: str, device: torch.device) -> None:
    """Check that a quantisation exists and that the device can run it.

    Raises:
        ValueError: it does not, or cannot.
    """
    if quantize not in QUANTIZATIONS:
        raise ValueError(f"quantize must be None or one of {', '.join(QUANTIZATIONS)}, got {quantize!r}")
    hopper = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    if quantize == "fp8" and not hopper:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        raise ValueError(f"quantize='fp8' needs an NVIDIA GPU of the Hopper generation or newer, got a model on {name}")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"quantize={quantize!r} needs a CPU, CUDA or ROCm device, got a model on {device}")


def quantize_linears(module: nn.Module, quantize: str) -> None:
    """Replace the linear layers within ``module``, and MLPs of them, in place; odd sizes, which GPUs refuse, stay."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and not any(side % _MULTIPLE for side in child.weight.shape):
                setattr(parent, name, QuantizedLinear(child, QUANTIZATIONS[quantize]))
        if type(parent) is Mlp and all(isinstance(layer, QuantizedLinear) for layer in (parent.fc1, parent.fc2)):
            parent.__class__ = QuantizedMlp


@functools.cache
def warn_of_slow_quantization(quantize: str, width: int, device_type: str) -> None:
    """Warn, once for a width, where int8 was measured to gain nothing over bfloat16."""
    if quantize == "int8" and device_type == "cpu" and width < _LEAST_WIDTH and cpu_is_fast_in_bfloat16():
        warnings.warn(
            f"int8 gains nothing over bfloat16 on a CPU with bfloat16 units below width {_LEAST_WIDTH}; "
            f"this model has width {width}",
            stacklevel=4,
        )


_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def _quantize_rows(x: Tensor, dtype: torch.dtype, largest: float) -> tuple[Tensor, Tensor]:
    """``(N, D)`` float32 -> ``(N, D)`` in a dtype, up to +-``largest``, and ``(N, 1)`` the factors that made it so."""
    # amax and amin are vectorised on a CPU, aminmax is not.
    inverse = largest / torch.maximum(x.amax(-1, True), -x.amin(-1, True)).clamp_min_(1e-20)
    x = x * inverse
    return (x.round_() if dtype == torch.int8 else x).to(dtype), inverse


def _int8_product(rows: Tensor, weight: Tensor) -> Tensor:
    """``(N, D)`` and ``(M, D)`` int8 -> ``(N, M)`` int32."""
    if rows.is_cuda and rows.shape[0] < _FEWEST_ROWS:
        padded = F.pad(rows, (0, 0, 0, _FEWEST_ROWS - rows.shape[0]))
        return torch._int_mm(padded, weight.t())[: rows.shape[0]]
    return torch._int_mm(rows, weight.t())


@functools.cache
def _largest_weight(dtype: torch.dtype, device_type: str) -> float:
    """Largest magnitude of a weight: 64 for int8 on CPUs without VNNI, which add pairs of products in 16 bits."""
    if dtype == torch.int8 and device_type == "cpu":
        ones = torch.full((64, 64), 127, dtype=dtype)
        if int(torch._int_mm(ones, ones)[0, 0]) != 64 * 127**2:
            return 64.0
    return _LARGEST[dtype]
