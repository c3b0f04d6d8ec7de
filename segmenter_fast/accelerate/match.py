"""Which modules of a model can run on which op, and why the others cannot: by structure first, then by trial.

By structure a module is refused for anything that its fused forward would ignore, whatever its value now: a position
bias that is still zero, a norm of the queries, an argument of the forward.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..kernels.registry import HEAD_SIZES
from ..vit import Attention
from .forwards import (
    CALLED,
    FusedAttention,
    FusedBlock,
    FusedMaskTransformer,
    FusedResidualAttention,
    Swapped,
    head_count,
)
from .verify import Call, blueprint, disagreement

# Optional arguments; given, they send the call to the module's own forward.
_OPTIONAL = frozenset({"mask", "attn_mask", "attn_bias", "is_causal", "return_attention"})
_MMCV_ARGUMENTS = frozenset(
    {"key", "value", "identity", "query_pos", "key_pos", "attn_mask", "key_padding_mask", "kwargs"}
)
_BLOCK = frozenset({"norm1", "attn", "drop_path", "norm2", "mlp"})
_DECODER = frozenset({"proj_dec", "blocks", "decoder_norm", "mask_norm"})
_DECODER_PARAMETERS = frozenset({"cls_emb", "proj_patch", "proj_classes"})


@dataclass(frozen=True)
class Kind:
    """A kind of module: how it is recognised, why one may be refused, its fused forward and calls to try it with."""

    fused: type[Swapped]
    recognised: Callable[[nn.Module], bool]
    refusal: Callable[[nn.Module], str | None]
    calls: Callable[[nn.Module], list[Call]]
    stand_ins: Callable[[], Mapping[str, nn.Module]] = dict

    def verdict(self, module: nn.Module, tried: dict[Hashable, str | None]) -> type[Swapped] | str:
        """The fused forward, or why not; ``tried`` keeps what came of trials."""
        if reason := self.refusal(module):
            return reason
        stand_ins = self.stand_ins()
        plan = blueprint(module, stand_ins)
        if plan is None or plan not in tried:
            tried[plan] = disagreement(module, self.fused, self.calls(module), stand_ins)
        return tried[plan] or self.fused


def survey(model: nn.Module) -> Iterator[tuple[str, nn.Module, type[Swapped] | str]]:
    """Name, module and verdict for every module that is attention, or holds it, or is the mask decoder.

    The verdict is the fused forward (also of a module that has it already) or the reason to leave the module.
    """
    served: set[int] = set()  # what a module around it answers for
    tried: dict[Hashable, str | None] = {}
    for name, module in model.named_modules():
        if id(module) in served:
            continue
        if isinstance(module, Swapped):
            served.update(map(id, module.children()))
            yield name, module, module.fused
        elif kind := next((kind for kind in _KINDS if kind.recognised(module)), None):
            verdict = kind.verdict(module, tried)
            if not isinstance(verdict, str) or kind.fused is FusedResidualAttention:
                served.update(map(id, module.children()))
            yield name, module, verdict
        elif reason := _known_and_left(module):
            yield name, module, reason


def _known_and_left(module: nn.Module) -> str | None:
    """Why a module is left that no kind takes: mmsegmentation's mask head, or attention by its class."""
    if hasattr(module, "patch_proj") and hasattr(module, "classes_proj") and hasattr(module, "mask_norm"):
        return "its scores are divided by norms of at least 1e-12, those of kernels.mask_scores by the norms"
    if isinstance(module, Attention):
        return "it runs on kernels.attention already"
    if isinstance(module, nn.MultiheadAttention):
        return "torch.nn.MultiheadAttention is taken only inside mmcv's wrapper, which drops its attention map"
    if _attention_by_name(module) and not any(map(_attention_by_name, list(module.modules())[1:])):
        return "it has no qkv and proj"
    return None


def _attention_by_name(module: nn.Module) -> bool:
    named = re.search("attn|attention", type(module).__name__, re.IGNORECASE)
    return bool(named) or isinstance(module, (Swapped, nn.MultiheadAttention)) or _looks_like_attention(module)


def _looks_like_attention(module: nn.Module) -> bool:
    return hasattr(module, "qkv") and hasattr(module, "proj") and not isinstance(module, Attention)


def _looks_like_block(module: nn.Module) -> bool:
    if {name for name, _ in module.named_children()} != _BLOCK:
        return False
    attention = module.get_submodule("attn")
    return _looks_like_attention(attention) and not _refuse_attention(attention)


def _looks_like_mmcv(module: nn.Module) -> bool:
    return isinstance(getattr(module, "attn", None), nn.MultiheadAttention) and hasattr(module, "dropout_layer")


def _looks_like_decoder(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("proj_patch", "proj_classes", "mask_norm", "cls_emb"))


def _refuse_attention(attention: nn.Module) -> str | None:
    qkv, proj, heads = getattr(attention, "qkv", None), getattr(attention, "proj", None), head_count(attention)
    if not isinstance(qkv, nn.Linear) or not isinstance(proj, nn.Linear):
        return f"qkv and proj must be Linear, they are {type(qkv).__name__} and {type(proj).__name__}"
    if not isinstance(heads, int) or qkv.out_features != 3 * proj.in_features or proj.in_features % heads:
        return f"qkv makes {qkv.out_features} features, not 3 times the {proj.in_features} of proj in {heads} heads"
    if not isinstance(getattr(attention, "scale", None), (float, int, type(None))):
        return "its scale is not a number"
    return _refuse_head_size(proj.in_features // heads) or _refuse_structure(attention, CALLED, {"x"} | _OPTIONAL)


def _refuse_block(block: nn.Module) -> str | None:
    return _refuse_structure(block, _BLOCK, {"x"} | _OPTIONAL)


def _refuse_mmcv(wrapper: nn.Module) -> str | None:
    attn = wrapper.get_submodule("attn")
    assert isinstance(attn, nn.MultiheadAttention)
    if type(attn) is not nn.MultiheadAttention or not attn._qkv_same_embed_dim:
        return "its attn is not a plain torch.nn.MultiheadAttention with one packed projection"
    if attn.bias_k is not None or attn.add_zero_attn:
        return "its attn adds keys of its own (add_bias_kv, add_zero_attn)"
    if not isinstance(getattr(wrapper, "batch_first", None), bool):
        return "it has no batch_first"
    return _refuse_head_size(attn.head_dim) or _refuse_structure(
        wrapper, {"attn", "proj_drop", "dropout_layer"}, {"query"} | _MMCV_ARGUMENTS
    )


def _refuse_decoder(decoder: nn.Module) -> str | None:
    norm = decoder.get_submodule("mask_norm")
    if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None:
        return "its mask_norm is not a LayerNorm with weight and bias"
    if not isinstance(getattr(decoder, "proj_dec", None), nn.Linear):
        return "its proj_dec is not Linear"
    for name in ("n_cls", "patch_size"):
        if not isinstance(getattr(decoder, name, None), int):
            return f"its {name} is not an integer"
    return _refuse_structure(decoder, _DECODER, {"x", "im_size"}, _DECODER_PARAMETERS)


def _refuse_head_size(size: int) -> str | None:
    return None if size in HEAD_SIZES else f"head size {size} is none of {', '.join(map(str, HEAD_SIZES))}"


def _refuse_structure(
    module: nn.Module,
    children: frozenset[str] | set[str],
    arguments: frozenset[str] | set[str],
    parameters: frozenset[str] = frozenset(),
) -> str | None:
    """Anything that a forward which knows only these children, arguments and parameters would pass over."""
    for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if name not in parameters:
            return f"it has {name}, which the fused forward does not use"
    for name, child in module.named_children():
        if name not in children and not isinstance(child, (nn.Identity, nn.Dropout)):
            return f"it has {name} ({type(child).__name__}), which the fused forward does not use"
    return _refuse_forward(module, arguments)


def _refuse_forward(module: nn.Module, arguments: frozenset[str] | set[str]) -> str | None:
    cls = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript"
    if "forward" in vars(module):
        return "its forward was set on the instance"
    forwards = [base for base in cls.__mro__ if "forward" in vars(base) and base is not nn.Module]
    if len(forwards) > 1:
        return f"{forwards[0].__name__} overrides the forward of {forwards[1].__name__}"
    if cls.__reduce_ex__ is not object.__reduce_ex__ or cls.__reduce__ is not object.__reduce__:
        return "it pickles itself in a way of its own"
    unknown = [name for name in inspect.signature(cls.forward).parameters if name not in arguments | {"self"}]
    return f"its forward takes {', '.join(unknown)}" if unknown else None


def _width(module: nn.Module, matrix: str) -> int:
    return module.get_parameter(matrix).shape[1]


def _tokens(width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 6, width, dtype=torch.float64, device="cpu", generator=generator)


def _attention_calls(attention: nn.Module) -> list[Call]:
    return [((_tokens(_width(attention, "qkv.weight")),), {})]


def _block_calls(block: nn.Module) -> list[Call]:
    return _attention_calls(block.get_submodule("attn"))


def _mmcv_calls(wrapper: nn.Module) -> list[Call]:
    width = _width(wrapper, "attn.in_proj_weight")
    return [((_tokens(width),), {}), ((_tokens(width),), {"identity": _tokens(width, seed=1)})]


def _decoder_calls(decoder: nn.Module) -> list[Call]:
    patch: Any = decoder.patch_size
    return [((_tokens(_width(decoder, "proj_dec.weight")), (2 * patch, 3 * patch)), {})]


_KINDS = (
    Kind(
        FusedMaskTransformer, _looks_like_decoder, _refuse_decoder, _decoder_calls, lambda: {"blocks": nn.ModuleList()}
    ),
    Kind(FusedBlock, _looks_like_block, _refuse_block, _block_calls, lambda: {"mlp": nn.Identity()}),
    Kind(FusedResidualAttention, _looks_like_mmcv, _refuse_mmcv, _mmcv_calls),
    Kind(FusedAttention, _looks_like_attention, _refuse_attention, _attention_calls),
)
