"""Fused forwards for modules of other libraries.

``fused_class(FusedAttention, cls)`` is a subclass of both. Assigning it to one instance's ``__class__`` changes the
forward of that instance alone: children, parameters, hooks, ``isinstance`` and state-dict keys stay. The fused forwards
serve plain calls. Calls with masks, dropout of the attention probabilities, hooks inside the module, or devices and
dtypes without a kernel run ``super().forward``, the module's own.
"""

from __future__ import annotations

import functools
import types
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import kernels
from ..vit import Attention
from .full_size import CALLS
from .lazy import patch_scores
from .lazy_functions import has_kernel, is_transformed
from .linears import linear, onednn_beats_mkl

# Children of an attention that the fused forward calls.
CALLED = frozenset({"qkv", "proj", "proj_drop"})


class Fused(nn.Module):
    """Base of the fused forwards. ``op`` is the op's name, ``original`` the class that was replaced."""

    op: ClassVar[str]
    pair: ClassVar[bool] = False
    """The forward returns ``(output, None)``."""
    tried: bool = False
    """True on a copy that is being verified."""
    fused: ClassVar[type[Fused]]
    original: ClassVar[type[nn.Module]]

    @classmethod
    def condition(cls, module: nn.Module) -> str:
        """The calls that the fused forward of a module serves, for the report; empty for all plain ones."""
        attention = getattr(module, "attn", module)
        drops = [child.p for name, child in attention.named_children() if name not in CALLED and _is_dropout(child)]
        return "in evaluation" if any(drops) or getattr(attention, "dropout", None) not in (None, 0.0) else ""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the two classes and the state, because the class derived from them cannot be imported."""
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        return (_empty, (self.fused, self.original), *reduced[2:])


def mark_output(module: nn.Module, output: Any) -> Any:
    """The output of a head, after ``FullSizeCalls.check``, marked if ``accelerate`` counts the head's calls."""
    calls = vars(module).get(CALLS)
    if calls is None:
        return output
    calls.check(output)
    return patch_scores(output, calls) if isinstance(output, Tensor) else output


def fused_class(fused: type[Fused], original: type[nn.Module]) -> type[Fused]:
    """The subclass of both; one per pair, so that instances share compiled code."""
    return _derived(fused, original)  # type: ignore[arg-type]  # typeshed takes nn.Module for unhashable


@functools.cache
def _derived(fused: Any, original: Any) -> type[Fused]:
    attributes = {"fused": fused, "original": original, "__module__": __name__}
    return types.new_class("Fused" + original.__name__, (fused, original), {}, lambda space: space.update(attributes))


def _empty(fused: type[Fused], original: type[nn.Module]) -> Fused:
    """An instance to unpickle the state into."""
    cls = fused_class(fused, original)
    return cls.__new__(cls)


def is_hooked(module: nn.Module) -> bool:
    """True if the module has hooks on its inputs or outputs, or a forward set on the instance."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


def _others_do_nothing(attention: nn.Module) -> bool:
    """True if every child that the fused forward does not call is an identity now, without hooks."""
    for name, child in attention.named_children():
        drops = isinstance(child, nn.Dropout) and child.training and child.p > 0
        if name not in CALLED and (is_hooked(child) or not isinstance(child, (nn.Identity, nn.Dropout)) or drops):
            return False
    return True


def _has_kernel(x: Any) -> bool:
    """True if ``x`` is a ``(B, N, D)`` batch of tokens that the ops serve."""
    plain = isinstance(x, Tensor) and x.ndim == 3 and not x.is_nested
    return plain and has_kernel(x.device, x.dtype) and not is_transformed()


def is_plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True for a call with tokens and nothing else: no mask, not causal, no attention map returned."""
    options = (*args[1:], *kwargs.values())
    return len(args) > 0 and all(option is None or option is False for option in options) and _has_kernel(args[0])


def _is_dropout(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout)


def head_count(attention: nn.Module) -> Any:
    """``num_heads``, or ``heads`` as in the official program; None without either."""
    return getattr(attention, "num_heads", None) or getattr(attention, "heads", None)


def attend(attention: Any, x: Tensor) -> Tensor:
    """``(B, N, D)`` -> ``(B, N, D)`` through the attention's own projections and output dropout."""
    qkv = attention.qkv(x).unflatten(-1, (3, head_count(attention), -1))
    out = attention.proj(kernels.attention(qkv, getattr(attention, "scale", None)).flatten(2))
    return attention.proj_drop(out) if hasattr(attention, "proj_drop") else out


class FusedAttention(Fused):
    """Attention with ``qkv`` and ``proj`` that returns a tensor (timm)."""

    op = "attention"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if is_plain(args, kwargs) and _others_do_nothing(self):
            return attend(self, args[0])
        return super().forward(*args, **kwargs)


class FusedBlock(Fused):
    """Transformer layer whose attention returns ``(x, attention map)`` (official Segmenter, DINO).

    The attention keeps its own forward and map: only the layer drops the map, so only the layer can skip it.
    """

    op = "attention"

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_plain(args, kwargs) and _others_do_nothing(self.attn) and not is_hooked(self.attn):
            x = args[0]
            x = x + self.drop_path(attend(self.attn, self.norm1(x)))
            return x + self.drop_path(self.mlp(self.norm2(x)))
        return super().forward(*args, **kwargs)


class FusedResidualAttention(Fused):
    """mmcv's ``MultiheadAttention``: ``torch.nn.MultiheadAttention`` with dropout and the residual added."""

    op = "attention"
    positional: ClassVar = ("query", "key", "value", "identity")

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        others = {**dict(zip(self.positional, args, strict=False)), **kwargs}
        query, key, value, identity = (others.pop(name, None) for name in self.positional)
        attn = self.attn
        self_attention = (key is None or key is query) and (value is None or value is query)
        plain = self_attention and len(args) <= 4 and all(other is None for other in others.values())
        hooked = is_hooked(attn) or is_hooked(attn.out_proj)
        if not plain or not _has_kernel(query) or hooked or (attn.training and attn.dropout):
            return super().forward(*args, **kwargs)
        x = query if self.batch_first else query.transpose(0, 1)
        qkv = linear(x, attn.in_proj_weight, attn.in_proj_bias).unflatten(-1, (3, attn.num_heads, -1))
        x = linear(kernels.attention(qkv).flatten(2), attn.out_proj.weight, attn.out_proj.bias)
        if not self.batch_first:
            x = x.transpose(0, 1)
        return (query if identity is None else identity) + self.dropout_layer(self.proj_drop(x))


class FusedMaskTransformer(Fused):
    """The official mask decoder; one op computes everything from the projected patches to the masks' LayerNorm."""

    op = "mask_scores"

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        plain = len(args) == 2 and not kwargs and _has_kernel(args[0]) and not is_hooked(self.mask_norm)
        # Under autocast PyTorch's LayerNorm returns float32 on a GPU, as the op does, but 16 bits on the CPU.
        if not plain or (args[0].device.type == "cpu" and torch.is_autocast_enabled("cpu")):
            return mark_output(self, super().forward(*args, **kwargs))
        x, image_size = args
        x = torch.cat([self.proj_dec(x), self.cls_emb.expand(x.shape[0], -1, -1)], 1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_norm(x)
        patches, classes = x[:, : -self.n_cls] @ self.proj_patch, x[:, -self.n_cls :] @ self.proj_classes
        norm = self.mask_norm
        scores = kernels.mask_scores(patches, classes, norm.weight, norm.bias, norm.eps)  # (B, h w, K)
        scores = scores.unflatten(1, (int(image_size[0] // self.patch_size), -1)).permute(0, 3, 1, 2)
        return mark_output(self, scores)


class FusedLinear(Fused):
    """``torch.nn.Linear`` with the products of oneDNN."""

    op = "linear"

    def forward(self: Any, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def mark_linears(model: nn.Module) -> tuple[str, ...]:
    """Run the linear layers of another library's model on ``linear`` where that is faster; return their names."""
    if not onednn_beats_mkl() or any(isinstance(part, Attention) for part in model.modules()):
        return ()
    found = [name for name, part in model.named_modules() if type(part) is nn.Linear and "forward" not in vars(part)]
    for name in found:
        model.get_submodule(name).__class__ = fused_class(FusedLinear, nn.Linear)
    return tuple(found)
