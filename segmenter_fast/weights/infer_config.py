"""Configuration fields from the shapes of a state dict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..config import VARIANTS, SegmenterConfig
from .reading import CheckpointError

HEAD_DIM = 64  # of the paper's attention heads
# Fields that set one variant apart from another.
ARCHITECTURE = (
    "patch_size",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "mlp",
    "qkv_bias",
    "pos_embed_kind",
    "class_token",
    "distillation_token",
    "num_register_tokens",
    "layer_scale",
    "decoder",
)


def fields_from_shapes(state: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration fields of a state dict with official names.

    Attention heads of 64, as in the paper, are assumed.

    Args:
        overrides: fields that the caller sets; head counts and ``image_size`` among them are used here.

    Raises:
        CheckpointError: a tensor that every Segmenter has is missing or misshapen, or the grid of patches is ambiguous.
    """
    qkv_bias = "encoder.blocks.0.attn.qkv.bias" in state
    rotary = "encoder.pos_embed" not in state and not qkv_bias  # only one of them missing: a damaged checkpoint
    fields = encoder_fields(state, overrides, rotary)
    fields["decoder_num_heads"] = overrides.get("decoder_num_heads") or fields["num_heads"]
    if "decoder.cls_emb" in state:
        fields |= {"decoder": "mask", "num_classes": _shape(state, "decoder.cls_emb", 3)[1]}
        fields["decoder_depth"] = count_layers(state, "decoder.blocks.")
    else:
        fields |= {"decoder": "linear", "num_classes": _shape(state, "decoder.head.weight", 2)[0]}
    image_size = overrides.get("image_size")
    image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if rotary:
        fields |= {"image_size": image_size or SegmenterConfig.image_size, "pos_embed_prefix": False}
    else:
        fields |= _grid(_shape(state, "encoder.pos_embed", 3)[1], fields, image_size or (0, 0))
    return fields | named_variant(fields)


def encoder_fields(state: Mapping[str, Tensor], overrides: Mapping[str, Any], rotary: bool) -> dict[str, Any]:
    """Return the fields of the encoder, see ``fields_from_shapes``, without image size and ``pos_embed_prefix``."""
    embed_dim, _, patch_size, _ = _shape(state, "encoder.patch_embed.proj.weight", 4)
    swiglu = "encoder.blocks.0.mlp.fc1_g.weight" in state
    hidden, _ = _shape(state, f"encoder.blocks.0.mlp.fc1{'_g' * swiglu}.weight", 2)
    if embed_dim % HEAD_DIM and not overrides.get("num_heads"):
        raise CheckpointError(f"embed_dim {embed_dim} is no multiple of {HEAD_DIM}; pass num_heads=")
    return {
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": count_layers(state, "encoder.blocks."),
        "num_heads": overrides.get("num_heads") or embed_dim // HEAD_DIM,
        "mlp_ratio": hidden / embed_dim,
        "mlp": "swiglu" if swiglu else "gelu",
        "qkv_bias": "encoder.blocks.0.attn.qkv.bias" in state,
        "pos_embed_kind": "rotary" if rotary else "learned",
        "class_token": "encoder.cls_token" in state,
        "distillation_token": "encoder.dist_token" in state,
        "num_register_tokens": _shape(state, "encoder.reg_token", 3)[1] if "encoder.reg_token" in state else 0,
        "layer_scale": "encoder.blocks.0.ls1.gamma" in state,
        "head_classes": head_classes(state),
    }


def count_channels(state: Mapping[str, Tensor]) -> int:
    """Return the channels of the images that the weights take."""
    return _shape(state, "encoder.patch_embed.proj.weight", 4)[1]


def head_classes(state: Mapping[str, Tensor]) -> int:
    """Return the rows of the unused classification head, 0 where there is none."""
    return _shape(state, "encoder.head.weight", 2)[0] if "encoder.head.weight" in state else 0


def named_variant(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return name and timm backbone of the variant that has this architecture, nothing where none has."""
    for name, config in VARIANTS.items():
        if all(getattr(config, field) == fields.get(field, getattr(SegmenterConfig, field)) for field in ARCHITECTURE):
            return {"variant": name, "timm_backbone": config.timm_backbone}
    return {}


def _shape(state: Mapping[str, Tensor], key: str, ndim: int) -> tuple[int, ...]:
    if key not in state:
        raise CheckpointError(f"{key} is missing")
    if state[key].ndim != ndim or 0 in state[key].shape:
        raise CheckpointError(f"{key} must have {ndim} dimensions, none of them empty, got {tuple(state[key].shape)}")
    return tuple(state[key].shape)


def count_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    """Return how many layers a part has, such as ``encoder.blocks.``."""
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})


def _grid(positions: int, fields: Mapping[str, Any], image_size: tuple[int, int]) -> dict[str, Any]:
    """Return the image size of a position embedding: the overriding one where it fits, otherwise a square.

    Only models with register tokens are known to leave the prefix tokens out of the position embedding.
    """
    patch_size, registers, (height, width) = fields["patch_size"], fields["num_register_tokens"], image_size
    prefix = fields["class_token"] + fields["distillation_token"] + registers
    for has_prefix in (True, False) if registers else (True,):
        patches = positions - prefix * has_prefix
        side = math.isqrt(max(patches, 0))
        if (height // patch_size) * (width // patch_size) == patches > 0:
            return {"image_size": (height, width), "pos_embed_prefix": has_prefix}
        if side**2 == patches > 0:
            return {"image_size": (side * patch_size, side * patch_size), "pos_embed_prefix": has_prefix}
    raise CheckpointError(
        f"the {positions - prefix} patches of the position embedding (beside {prefix} other tokens) make no square "
        "grid; pass image_size=(height, width)"
    )
