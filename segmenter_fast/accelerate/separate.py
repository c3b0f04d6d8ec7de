"""Fused forwards of attention with separate projections (transformers) or rotated queries and keys (DINOv3).

These modules run PyTorch's attention already, on three tensors, and transformers' ``AttentionInterface`` would hand
over three. ``kernels.attention`` takes a packed one; the activations are packed, so that no packed copy of the weights
exists. It runs only where models were measured to win in spite of that: on a CPU with C++ kernels, from ``least``
tokens. Two cores of an AMD EPYC (Zen 5), layers of S models at batch 1, ViT / DINOv3: without gradients in float32
1.01 / 0.98x at 257 tokens, 1.06 / 1.04x at 401, 1.19 / 1.16x at 1025; in bfloat16 1.01 / 1.00x at 101, 1.13 / 1.09x at
197, 1.86 / 1.79x at 1025. Forward and backward in float32 1.03 / 1.03x at 197, 1.08 / 1.08x at 401, 1.26 / 1.22x at
1025; under autocast 1.24 / 1.20x at 101, 1.16 / 1.18x at 197, 1.59 / 1.51x at 1025. On a GPU PyTorch's attention stays:
on an H100 it is as fast forward, and faster backward from 577 tokens on.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..kernels.cpu.attention import runs_native
from ..kernels.registry import autocast_dtype
from ..vit import rotate
from .forwards import Fused, is_hooked, is_plain
from .linears import linear

PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
OUTPUTS = ("o_proj", "out_proj")
BIASES = frozenset({"q_bias", "k_bias", "v_bias"})


class FusedWhereFaster(Fused):
    """Base of both: runs the fused forward where it is faster; in a trial whether it is or not."""

    op = "attention"
    least: ClassVar[int] = 384
    """Number of tokens from which the fused forward wins; gradients halve it, and so does bfloat16."""

    @classmethod
    def condition(cls, module: nn.Module) -> str:
        evaluation = ", in evaluation" * _drops(module)
        return f"on a CPU, from {cls.least} tokens (half with gradients, half in bfloat16){evaluation}"

    def wins(self, x: Tensor) -> bool:
        """True if the fused forward gives the same as PyTorch's attention and is faster for these tokens."""
        if self.training and _drops(self):
            return False
        dtype = autocast_dtype(x) or x.dtype
        factor = (1 + torch.is_grad_enabled()) * (1 + (dtype == torch.bfloat16))
        faster = x.device.type == "cpu" and x.shape[1] * factor >= self.least and runs_native(dtype)
        return self.tried or faster


class FusedSeparateAttention(FusedWhereFaster):
    """transformers' attention, which returns ``(x, None)`` unless attention maps are wanted."""

    pair = True

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        others = {
            name: value for name, value in kwargs.items() if name != "output_hidden_states"
        }  # BEiT's passes it on
        rotation = others.pop("position_embeddings", None)
        tokens = args or (others.pop("hidden_states", None),)
        serves = is_plain(tokens, others) and (rotation is None or all(map(_is_table, rotation)))
        if not serves or self.config._attn_implementation != "sdpa" or not self.wins(tokens[0]):
            return super().forward(*args, **kwargs)
        qkv = torch.stack([self.get_submodule(name)(tokens[0]) for name in projections(self)], 2)
        out = _attend(qkv, head_count(self), scale(self), rotation)
        output = output_of(self)
        return (out if output is None else output(out)), None


class FusedRotaryAttention(FusedWhereFaster):
    """timm's ``EvaAttention`` and ``AttentionRope``, whose rotation is one table of sines and cosines."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        others = dict(kwargs)
        rope = args[1] if len(args) > 1 else others.pop("rope", None)
        serves = is_plain((*args[:1], *args[2:]), others) and (rope is None or _is_table(rope))
        if not serves or is_hooked(self.qkv) or not self.wins(args[0]):
            return super().forward(*args, **kwargs)
        bias = (
            self.qkv.bias if (q := getattr(self, "q_bias", None)) is None else torch.cat([q, self.k_bias, self.v_bias])
        )
        qkv = linear(args[0], self.qkv.weight, bias).unflatten(-1, (3, -1))
        rotation = None if rope is None else rope.chunk(2, -1)[::-1]
        return self.proj_drop(self.proj(_attend(qkv, self.num_heads, self.scale, rotation)))


def _attend(qkv: Tensor, heads: int, factor: float, rotation: Any) -> Tensor:
    """``(B, N, 3, D)`` -> ``(B, N, D)``; cosines and sines ``(patches, D / heads)`` turn the last tokens."""
    qkv = qkv.unflatten(-1, (heads, -1))
    if rotation is not None:
        cosines, sines = rotation
        prefix = (0, 0, qkv.shape[1] - len(cosines), 0)  # unturned tokens
        qkv = rotate(qkv, torch.stack([F.pad(cosines, prefix, value=1.0), F.pad(sines, prefix)]))
    return kernels.attention(qkv, factor).flatten(2)


def _drops(attention: nn.Module) -> bool:
    """True if the attention drops probabilities in training."""
    for name, value in (*vars(attention).items(), *attention.named_children()):
        p = getattr(value, "p", value) if "drop" in name and name != "proj_drop" else 0
        if isinstance(p, (int, float)) and p > 0:
            return True
    return False


def _is_table(table: Any) -> bool:
    return isinstance(table, Tensor) and table.ndim == 2 and not table.requires_grad


def projections(attention: nn.Module) -> tuple[str, ...]:
    """Names of the separate query, key and value projections, empty without them."""
    return next((names for names in PROJECTIONS if all(hasattr(attention, name) for name in names)), ())


def rotation_argument(attention: nn.Module) -> str | None:
    """Name of the argument of the forward that holds a rotation, None without one."""
    names = inspect.signature(getattr(attention, "original", type(attention)).forward).parameters
    return next((name for name in ("position_embeddings", "rope") if name in names), None)


def head_count(attention: nn.Module) -> Any:
    """``num_attention_heads`` or ``num_heads``; None without either."""
    return getattr(attention, "num_attention_heads", None) or getattr(attention, "num_heads", None)


def scale(attention: nn.Module) -> Any:
    """``scaling`` or ``scale``; None without either."""
    return getattr(attention, "scaling", getattr(attention, "scale", None))


def output_of(attention: nn.Module) -> Any:
    """The output projection, None where another module has it (DPT)."""
    return next((getattr(attention, name) for name in OUTPUTS if hasattr(attention, name)), None)


def separate_calls(attention: Any, tokens: Tensor) -> list[Any]:
    """Calls to try with: rotated where the forward takes a rotation."""
    if not rotation_argument(attention):
        return [((tokens,), {})]
    head_dim = attention.get_submodule(projections(attention)[0]).weight.shape[0] // head_count(attention)
    return [((tokens,), {"position_embeddings": tuple(_turns(tokens.shape[1] - 2, int(head_dim)))})]


def rotary_calls(attention: Any, tokens: Tensor) -> list[Any]:
    """Calls to try with, plain and rotated."""
    head_dim = attention.qkv.weight.shape[0] // 3 // attention.num_heads
    cosines, sines = _turns(tokens.shape[1] - attention.num_prefix_tokens, head_dim)
    return [((tokens,), {}), ((tokens,), {"rope": torch.cat([sines, cosines], -1)})]


def _turns(patches: int, head_dim: int) -> Tensor:
    """Cosines and sines ``(2, patches, head_dim)``, equal in both halves of a head."""
    angles = torch.linspace(-3, 3, patches * head_dim // 2, dtype=torch.float64, device="cpu").view(patches, -1)
    return torch.stack([angles.cos(), angles.sin()]).repeat(1, 1, 2)
