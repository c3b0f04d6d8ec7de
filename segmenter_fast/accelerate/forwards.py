"""Forwards on the fused ops, put in front of the class of another library's module.

``swap_class(FusedAttention, theirs)`` is a subclass of both; giving it to an instance changes that instance's forward
and nothing else: children, parameters, hooks, ``isinstance`` and state-dict keys stay. Each forward fuses the plain
call only. Masks, dropout of the attention probabilities, hooks inside, devices and dtypes without a kernel
go to ``super().forward``, the module's own.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels

# The children of an attention that the fused forward calls.
CALLED = frozenset({"qkv", "proj", "proj_drop"})


class Swapped(nn.Module):
    """Base of the fused forwards. ``op`` names what they run on, ``original`` is the class that was swapped."""

    op: ClassVar[str]
    fused: ClassVar[type[Swapped]]
    original: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as the two classes and the state, because the class made of them cannot be imported."""
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        return (_empty, (self.fused, self.original), *reduced[2:])


def swap_class(fused: type[Swapped], original: type[nn.Module]) -> type[Swapped]:
    """The subclass of both; one for each pair, so that compiled code is shared between the instances."""
    return _class_of_both(fused, original)  # type: ignore[arg-type]  # typeshed holds that nn.Module has no hash


@functools.cache
def _class_of_both(fused: Any, original: Any) -> type[Swapped]:
    attributes = {"fused": fused, "original": original, "__module__": __name__}
    return types.new_class("Fused" + original.__name__, (fused, original), {}, lambda space: space.update(attributes))


def _empty(fused: type[Swapped], original: type[nn.Module]) -> Swapped:
    """An instance to unpickle the state into."""
    cls = swap_class(fused, original)
    return cls.__new__(cls)


def watched(module: nn.Module) -> bool:
    """Whether hooks look at the inputs or outputs of this module, or a forward of its own was set on it."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


def _idle(attention: nn.Module) -> bool:
    """Whether the children that the fused forward does not call would do nothing, with nobody watching them."""
    for name, child in attention.named_children():
        if name not in CALLED and (
            watched(child) or not isinstance(child, (nn.Identity, nn.Dropout)) or (child.training and _drops(child))
        ):
            return False
    return True


def _drops(child: nn.Module) -> bool:
    return isinstance(child, nn.Dropout) and child.p > 0


def _absent(values: Iterable[Any]) -> bool:
    """Whether every optional argument is None or False: no mask, not causal, no attention map wanted."""
    return all(value is None or value is False for value in values)


def _has_kernel(x: Any) -> bool:
    """Whether ``x`` is a batch of token sequences ``(B, N, D)`` on a device and in a dtype that the ops serve."""
    return (
        isinstance(x, Tensor)
        and x.ndim == 3
        and not x.is_nested
        and x.is_floating_point()
        and (x.device.type == "cpu" or (x.device.type == "cuda" and x.dtype != torch.float64))
    )


def head_count(attention: nn.Module) -> Any:
    """``num_heads``, or ``heads`` as the official program calls it; None if there is neither."""
    return getattr(attention, "num_heads", None) or getattr(attention, "heads", None)


def attend(attention: Any, x: Tensor) -> Tensor:
    """``(B, N, D)`` -> ``(B, N, D)`` through the attention's own projections and dropout of the result."""
    qkv = attention.qkv(x).unflatten(-1, (3, head_count(attention), -1))
    out = attention.proj(kernels.attention(qkv, getattr(attention, "scale", None)).flatten(2))
    return attention.proj_drop(out) if hasattr(attention, "proj_drop") else out


class FusedAttention(Swapped):
    """Attention with ``qkv`` and ``proj`` that returns a tensor (timm)."""

    op = "attention"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args and _absent((*args[1:], *kwargs.values())) and _has_kernel(args[0]) and _idle(self):
            return attend(self, args[0])
        return super().forward(*args, **kwargs)


class FusedBlock(Swapped):
    """Transformer layer whose attention returns ``(x, attention map)`` (official Segmenter, DINO).

    The attention itself keeps its forward, map and all; only the layer knows that nobody reads the map.
    """

    op = "attention"
    norm1: nn.Module
    attn: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    drop_path: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        fusable = args and _absent((*args[1:], *kwargs.values())) and _has_kernel(args[0])
        if fusable and _idle(self.attn) and not watched(self.attn):
            x = args[0]
            x = x + self.drop_path(attend(self.attn, self.norm1(x)))
            return x + self.drop_path(self.mlp(self.norm2(x)))
        return super().forward(*args, **kwargs)


class FusedResidualAttention(Swapped):
    """mmcv's ``MultiheadAttention``: ``torch.nn.MultiheadAttention`` with dropout and the residual added."""

    op = "attention"
    positional: ClassVar = ("query", "key", "value", "identity")
    attn: nn.MultiheadAttention
    proj_drop: nn.Module
    dropout_layer: nn.Module
    batch_first: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        others = {**dict(zip(self.positional, args, strict=False)), **kwargs}
        query, key, value, identity = (others.pop(name, None) for name in self.positional)
        attn = self.attn
        itself = (key is None or key is query) and (value is None or value is query)
        plain = itself and len(args) <= 4 and all(other is None for other in others.values())
        seen = watched(attn) or watched(attn.out_proj)
        if not plain or not _has_kernel(query) or seen or (attn.training and attn.dropout):
            return super().forward(*args, **kwargs)
        x = query if self.batch_first else query.transpose(0, 1)
        qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).unflatten(-1, (3, attn.num_heads, -1))
        x = F.linear(kernels.attention(qkv).flatten(2), attn.out_proj.weight, attn.out_proj.bias)
        if not self.batch_first:
            x = x.transpose(0, 1)
        return (query if identity is None else identity) + self.dropout_layer(self.proj_drop(x))


class FusedMaskTransformer(Swapped):
    """The official mask decoder; its tail, from the projected patches to the masks' LayerNorm, is one op."""

    op = "mask_scores"
    n_cls: int
    patch_size: int
    proj_dec: nn.Module
    cls_emb: Tensor
    blocks: nn.ModuleList
    decoder_norm: nn.Module
    mask_norm: nn.LayerNorm
    proj_patch: Tensor
    proj_classes: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        fusable = len(args) == 2 and not kwargs and _has_kernel(args[0]) and not watched(self.mask_norm)
        # Under autocast PyTorch's LayerNorm gives float32 on a GPU, as the op does, but 16 bits on the CPU.
        if not fusable or (args[0].device.type == "cpu" and torch.is_autocast_enabled("cpu")):
            return super().forward(*args, **kwargs)
        x, image_size = args
        x = torch.cat([self.proj_dec(x), self.cls_emb.expand(x.shape[0], -1, -1)], 1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_norm(x)
        patches, classes = x[:, : -self.n_cls] @ self.proj_patch, x[:, -self.n_cls :] @ self.proj_classes
        norm = self.mask_norm
        scores = kernels.mask_scores(patches, classes, norm.weight, norm.bias, norm.eps)  # (B, h w, K)
        return scores.mT.unflatten(2, (int(image_size[0] // self.patch_size), -1))
