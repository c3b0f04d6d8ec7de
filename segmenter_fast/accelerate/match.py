"""Matching of modules with fused forwards: by structure first, then by a trial (``verify``).

Anything that the fused forward would ignore refuses a module, whatever its value now: a position bias that is still
zero, a norm of the queries, an argument of the forward.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.cpu.attention import runs_native
from ..kernels.registry import HEAD_SIZES
from ..vit import Attention
from .forwards import (
    CALLED,
    Fused,
    FusedAttention,
    FusedBlock,
    FusedMaskTransformer,
    FusedResidualAttention,
    head_count,
)
from .separate import (
    BIASES,
    OUTPUTS,
    PROJECTIONS,
    FusedRotaryAttention,
    FusedSeparateAttention,
    output_of,
    projections,
    rotary_calls,
    rotation_argument,
    scale,
    separate_calls,
)
from .separate import head_count as separate_heads
from .verify import Call, find_difference, structure_key

# Optional arguments; a call that gives one runs the module's own forward.
_OPTIONAL = frozenset({"mask", "attn_mask", "attn_bias", "is_causal", "return_attention"})
_MMCV_ARGUMENTS = frozenset(
    {"key", "value", "identity", "query_pos", "key_pos", "attn_mask", "key_padding_mask", "kwargs"}
)
_BLOCK = frozenset({"norm1", "attn", "drop_path", "norm2", "mlp"})
_DECODER = frozenset({"proj_dec", "blocks", "decoder_norm", "mask_norm"})
_DECODER_PARAMETERS = frozenset({"cls_emb", "proj_patch", "proj_classes"})


@dataclass(frozen=True)
class Kind:
    """A kind of module: its structure, its fused forward, and calls to verify that with."""

    fused: type[Fused]
    recognised: Callable[[nn.Module], bool]
    refusal: Callable[[nn.Module], str | None]
    """The reason why a recognised module cannot run on the fused forward, by its structure."""
    matrix: str
    """Parameter with as many columns as tokens have channels."""
    calls: Callable[[Any, Tensor], list[Call]] = lambda module, tokens: [((tokens,), {})]
    stand_ins: Callable[[], Mapping[str, nn.Module]] = dict
    """Children that take no part in the verification, and their replacements."""

    def match(self, module: nn.Module, verified: dict[Hashable, str | None]) -> type[Fused] | str:
        """The fused forward, or the reason against it; ``verified`` caches results by ``structure_key``."""
        if reason := self.refusal(module):
            return reason
        stand_ins = self.stand_ins()
        key = structure_key(module, stand_ins)
        if key is None or key not in verified:
            width, generator = module.get_parameter(self.matrix).shape[1], torch.Generator().manual_seed(0)
            tokens = torch.randn(2, 6, width, dtype=torch.float64, device="cpu", generator=generator)
            verified[key] = find_difference(module, self.fused, self.calls(module, tokens), stand_ins)
        return verified[key] or self.fused


def match_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, type[Fused] | str]]:
    """Name, module and match of every module that is attention, or contains it, or is the mask decoder.

    The match is the fused forward (also of a module that has it already) or the reason to leave the module.
    """
    covered: set[int] = set()  # children of modules with a match of their own
    verified: dict[Hashable, str | None] = {}
    for name, module in model.named_modules():
        if id(module) in covered:
            continue
        if isinstance(module, Fused):
            covered.update(map(id, module.children()))
            yield name, module, module.fused
        elif kind := next((kind for kind in _KINDS if kind.recognised(module)), None):
            match = kind.match(module, verified)
            if not isinstance(match, str) or kind.fused is FusedResidualAttention:
                covered.update(map(id, module.children()))
            yield name, module, match
        elif reason := _reason_without_kind(module):
            yield name, module, reason


def _reason_without_kind(module: nn.Module) -> str | None:
    """The reason to leave a module of no kind, if it is mmsegmentation's mask head or attention by its class."""
    if hasattr(module, "patch_proj") and hasattr(module, "classes_proj") and hasattr(module, "mask_norm"):
        return "its scores are divided by norms of at least 1e-12, those of kernels.mask_scores by the norms"
    if isinstance(module, Attention):
        return "it runs on kernels.attention already"
    if isinstance(module, nn.MultiheadAttention):
        return "torch.nn.MultiheadAttention is taken only inside mmcv's wrapper, which drops its attention map"
    if named_attention(module) and not any(map(named_attention, list(module.modules())[1:])):
        return "it has separate q, k and v" if projections(module) else "it has no qkv and proj"
    return None


def named_attention(module: nn.Module) -> bool:
    named = re.search("attn|attention", type(module).__name__, re.IGNORECASE)
    return bool(named) or isinstance(module, (Fused, nn.MultiheadAttention)) or _is_attention(module)


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "qkv") and hasattr(module, "proj") and not isinstance(module, Attention)


def _is_separate(names: tuple[str, ...], module: nn.Module) -> bool:
    return projections(module) == names and hasattr(getattr(module, "config", None), "_attn_implementation")


def _is_rotary(module: nn.Module) -> bool:
    return _is_attention(module) and rotation_argument(module) == "rope"


def _is_block(module: nn.Module) -> bool:
    if {name for name, _ in module.named_children()} != _BLOCK:
        return False
    attention = module.get_submodule("attn")
    return _is_attention(attention) and not _refuse_attention(attention)


def _is_mmcv_attention(module: nn.Module) -> bool:
    return isinstance(getattr(module, "attn", None), nn.MultiheadAttention) and hasattr(module, "dropout_layer")


def _is_mask_decoder(module: nn.Module) -> bool:
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


def _refuse_separate(attention: Any) -> str | None:
    names, heads, output = projections(attention), separate_heads(attention), output_of(attention)
    parts = [getattr(attention, name) for name in names] + [output] * (output is not None)
    if not all(isinstance(part, nn.Linear) for part in parts):
        return f"its projections must be Linear, they are {', '.join(type(part).__name__ for part in parts)}"
    width = parts[0].out_features
    if any(part.out_features != width for part in parts[:3]) or not isinstance(heads, int) or width % heads:
        sizes = ", ".join(str(part.out_features) for part in parts[:3])
        return f"q, k and v make {sizes} features, not equal numbers for {heads} heads"
    if not isinstance(scale(attention), float):
        return "its scale is not a number"
    biases = [name for name in vars(attention.config) if name.endswith("relative_position_bias")]
    if used := [name for name in biases if getattr(attention.config, name)]:
        return f"its scores have position biases ({', '.join(used)})"
    reason = _refuse_head_size(width // heads) or _refuse_structure(
        attention, {*names, *OUTPUTS}, {"hidden_states", "position_embeddings", "attention_mask", "kwargs"}
    )
    return reason or _refuse_machine()


def _refuse_rotary(attention: Any) -> str | None:
    if getattr(attention, "rotate_half", None) is not True:
        return "it turns pairs of neighbouring channels, the fused forward those half a head apart"
    if not isinstance(attention.qkv, nn.Linear) or not isinstance(attention.proj, nn.Linear):
        return _refuse_attention(attention)
    if not isinstance(attention.proj_drop, nn.Dropout):
        return "it has no proj_drop"
    reason = _refuse_head_size(attention.proj.in_features // attention.num_heads) or _refuse_structure(
        attention, CALLED, {"x", "rope"} | _OPTIONAL, BIASES
    )
    return reason or _refuse_machine()


def _refuse_machine() -> str | None:
    return None if runs_native(torch.float32) else "no C++ kernel runs here, and PyTorch's attention is as fast"


def _refuse_mmcv_attention(wrapper: nn.Module) -> str | None:
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


def _refuse_mask_decoder(decoder: nn.Module) -> str | None:
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
    """The first thing that a forward with only these children, arguments and parameters would ignore."""
    for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if name not in parameters:
            return f"it has {name}, which the fused forward does not use"
    for name, child in module.named_children():
        if name not in children and not isinstance(child, (nn.Identity, nn.Dropout)):
            return f"it has {name} ({type(child).__name__}), which the fused forward does not use"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript"
    if "forward" in vars(module):
        return "its forward was set on the instance"
    cls = type(module)
    forwards = [base for base in cls.__mro__ if "forward" in vars(base) and base is not nn.Module]
    if len(forwards) > 1:
        return f"{forwards[0].__name__} overrides the forward of {forwards[1].__name__}"
    if cls.__reduce_ex__ is not object.__reduce_ex__ or cls.__reduce__ is not object.__reduce__:
        return "it pickles itself in a way of its own"
    unknown = [name for name in inspect.signature(cls.forward).parameters if name not in arguments | {"self"}]
    return f"its forward takes {', '.join(unknown)}" if unknown else None


_KINDS = (
    Kind(
        FusedMaskTransformer,
        _is_mask_decoder,
        _refuse_mask_decoder,
        "proj_dec.weight",
        lambda decoder, tokens: [((tokens, (2 * decoder.patch_size, 3 * decoder.patch_size)), {})],
        lambda: {"blocks": nn.ModuleList()},
    ),
    Kind(
        FusedBlock,
        _is_block,
        lambda block: _refuse_structure(block, _BLOCK, {"x"} | _OPTIONAL),
        "attn.qkv.weight",
        stand_ins=lambda: {"mlp": nn.Identity()},
    ),
    Kind(
        FusedResidualAttention,
        _is_mmcv_attention,
        _refuse_mmcv_attention,
        "attn.in_proj_weight",
        lambda wrapper, tokens: [((tokens,), {}), ((tokens,), {"identity": tokens.flip(0)})],
        # It drops other values of tokens that lie in memory in another order, with the same probability.
        lambda: {"proj_drop": nn.Dropout(0.0)},
    ),
    Kind(FusedRotaryAttention, _is_rotary, _refuse_rotary, "qkv.weight", rotary_calls),
    *(
        Kind(
            FusedSeparateAttention,
            partial(_is_separate, names),
            _refuse_separate,
            f"{names[0]}.weight",
            separate_calls,
        )
        for names in PROJECTIONS
    ),
    Kind(FusedAttention, _is_attention, _refuse_attention, "qkv.weight"),
)
