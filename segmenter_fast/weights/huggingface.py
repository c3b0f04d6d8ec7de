"""Backbones in Hugging Face's names: ViT, DeiT, DINOv2 with and without registers, DINOv3.

Checkpoints on the hub keep the names of transformers 4 (``attention.attention.query``), the modules of transformers 5
have shorter ones (``attention.q_proj``); both are read, with or without a task model's prefix. Numerics are those of
transformers 5: all but DINOv3 resize positions bicubically, DINOv2 with registers antialiased.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import IMAGENET_MEAN, IMAGENET_STD, SegmenterConfig
from .build import SavedModel, rename
from .infer_config import count_channels, encoder_fields, named_variant
from .reading import CheckpointError, read_mapping

PIXELS = "preprocessor_config.json"
_IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
# Numerics by the model_type of config.json.
_FAMILIES: dict[str, dict[str, Any]] = {
    "vit": {"encoder_norm_eps": 1e-12, "pos_embed_mode": "bicubic_grid"},
    "deit": {"encoder_norm_eps": 1e-12, "pos_embed_mode": "bicubic_grid", **_IMAGENET},
    "dinov2": {"encoder_norm_eps": 1e-6, "pos_embed_mode": "bicubic_grid", **_IMAGENET},
    "dinov2_with_registers": {"encoder_norm_eps": 1e-6, "pos_embed_mode": "bicubic_antialias", **_IMAGENET},
    "dinov3_vit": {"encoder_norm_eps": 1e-5, **_IMAGENET},
}
# Entries of config.json and the fields that they set.
_FIELDS = {"num_attention_heads": "num_heads", "layer_norm_eps": "encoder_norm_eps", "rope_theta": "rope_temperature"}

_START = "embeddings.cls_token"
_NAMES = {
    r"^embeddings\.patch_embeddings\.(projection\.)?": "patch_embed.proj.",
    r"^embeddings\.position_embeddings$": "pos_embed",
    r"^embeddings\.distillation_token$": "dist_token",
    r"^embeddings\.register_tokens$": "reg_token",
    r"^embeddings\.": "",
    r"^(encoder\.|model\.)?layers?\.": "blocks.",
    r"^layernorm\.": "norm.",
    r"\.attention\.(attention\.)?(q|k|v)(uery|ey|alue|_proj)\.": r".attn.\2.",
    r"\.attention\.(output\.dense|o_proj)\.": ".attn.proj.",
    r"\.layernorm_before\.": ".norm1.",
    r"\.layernorm_after\.": ".norm2.",
    r"\.(intermediate\.dense|mlp\.up_proj)\.": ".mlp.fc1.",
    r"^(blocks\.\d+)\.output\.dense\.": r"\1.mlp.fc2.",
    r"\.mlp\.(down_proj|weights_out)\.": ".mlp.fc2.",
    r"\.layer_scale([12])\.lambda1$": r".ls\1.gamma",
}
_UNUSED = ("mask_token", "pooler.")


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Return whether the keys are those of a Vision Transformer of Hugging Face's."""
    return any(key.endswith(_START) for key in state) and any("embeddings.patch_embeddings." in key for key in state)


def read_backbone(
    name: str, state: Mapping[str, Tensor], described: Mapping[str, Any], folder: Path | None = None
) -> SavedModel:
    """Return a backbone without decoder, in our names.

    Args:
        described: the content of config.json. Without a ``model_type`` the names tell the family, and heads of 64 and
            the family's numerics are assumed where no entry names others, with a warning for ViT and DeiT.
        folder: where a preprocessor_config.json may lie, which has mean and std.

    Raises:
        CheckpointError: another kind of model, or a tensor that every encoder has is missing or misshapen.
    """
    family = described.get("model_type") or _family(state)
    if family not in _FAMILIES:
        raise CheckpointError(f"{name}: model_type {family!r} is none of {', '.join(_FAMILIES)}")
    if not recognises(state):
        raise CheckpointError(f"{name} holds no {family!r}: its keys are {', '.join(list(state)[:5])}, ...")
    ours, rotary = to_ours(state), family == "dinov3_vit"
    settings = {field: described[entry] for entry, field in _FIELDS.items() if described.get(entry)}
    fields = _FAMILIES[family] | encoder_fields(ours, settings, rotary) | settings | _positions(name, ours)
    _check_activation(name, family, described.get("hidden_act"), fields["mlp"])
    if "model_type" not in described and rotary:
        gate = f" and the activation {'silu' if fields['mlp'] == 'swiglu' else 'gelu'!r}"
        warnings.warn(
            f"{name} comes without config.json: rope_theta {SegmenterConfig.rope_temperature:g}{gate} of a {family!r} "
            "are assumed; load the folder of save_pretrained, or override what differs",
            stacklevel=5,
        )
    elif "model_type" not in described and family in ("vit", "deit"):  # other weights have one setting each
        warnings.warn(
            f"{name} comes without config.json: heads of {fields['embed_dim'] // fields['num_heads']}, and eps, mean "
            f"and std of a {family!r} are assumed; override what differs",
            stacklevel=5,
        )
    pixels = read_mapping(folder / PIXELS) if folder and (folder / PIXELS).exists() else {}
    channels, given = count_channels(ours), dict[str, Any]()
    for entry, field in (("image_mean", "mean"), ("image_std", "std")):
        if isinstance(pixels.get(entry), list) and len(pixels[entry]) == channels:
            given[field] = tuple(pixels[entry])
    side = min(fields["image_size"])
    fields |= {"decoder_num_heads": fields["num_heads"], "window_size": side, "window_stride": side}
    config = SegmenterConfig(**fields, **named_variant(fields)).replace(in_channels=channels, **given)
    return SavedModel(name, config, ours, has_decoder=False)


def to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in our names, of the encoder only; unknown keys keep theirs.

    The position of the class token is added to it where registers have no positions.
    """
    prefix = next(key for key in state if key.endswith(_START)).removesuffix(_START)
    found = {
        rename(key.removeprefix(prefix), _NAMES): tensor
        for key, tensor in state.items()
        if key.startswith(prefix) and not key.removeprefix(prefix).removeprefix("embeddings.").startswith(_UNUSED)
    }
    if "reg_token" in found and found["reg_token"].numel() == 0:  # DINOv3 without registers
        del found["reg_token"]
    if "reg_token" in found and "pos_embed" in found:
        positions = found.pop("pos_embed").float()
        found["cls_token"], found["pos_embed"] = found["cls_token"].float() + positions[:, :1], positions[:, 1:]
    for block in {".".join(key.split(".")[:2]) for key in found if key.startswith("blocks.")}:
        _pack_qkv(found, f"{block}.attn.", keep_zeros="pos_embed" in found)
        _split_gate(found, f"{block}.mlp.")
    return {f"encoder.{key}": tensor for key, tensor in found.items()}


def _pack_qkv(found: dict[str, Tensor], attention: str, keep_zeros: bool) -> None:
    """Make one projection of three, with zeros for an absent bias (DINOv3's keys)."""
    weights = [found.get(f"{attention}{part}.weight") for part in "qkv"]
    if any(weight is None for weight in weights):
        return  # the strict load names what is missing
    biases = [found.pop(f"{attention}{part}.bias", None) for part in "qkv"]
    for part in "qkv":
        del found[f"{attention}{part}.weight"]
    found[f"{attention}qkv.weight"] = torch.cat([weight for weight in weights if weight is not None])
    given = [bias for bias in biases if bias is not None]
    if given and (keep_zeros or any(bias.any() for bias in given)):
        packed = [torch.zeros_like(given[0]) if bias is None else bias for bias in biases]
        found[f"{attention}qkv.bias"] = torch.cat(packed)


def _split_gate(found: dict[str, Tensor], mlp: str) -> None:
    """Name the gate of a SwiGLU and its values, which transformers 4 packs into ``weights_in`` (DINOv2 giant)."""
    for kind in ("weight", "bias"):
        if (packed := found.pop(f"{mlp}weights_in.{kind}", None)) is not None:
            found[f"{mlp}fc1_g.{kind}"], found[f"{mlp}fc1_x.{kind}"] = packed.chunk(2)
        if (gate := found.pop(f"{mlp}gate_proj.{kind}", None)) is not None:
            found[f"{mlp}fc1_g.{kind}"] = gate
            if (values := found.pop(f"{mlp}fc1.{kind}", None)) is not None:
                found[f"{mlp}fc1_x.{kind}"] = values


def _positions(name: str, ours: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the fields of a square position embedding, or of none."""
    positions = ours.get("encoder.pos_embed")
    if positions is None:
        return {"pos_embed_prefix": False, "image_size": SegmenterConfig.image_size}
    tokens = 1 + ("encoder.dist_token" in ours) if "encoder.reg_token" not in ours else 0
    side = math.isqrt(max(positions.shape[1] - tokens, 0))
    if side**2 + tokens != positions.shape[1]:
        raise CheckpointError(
            f"{name}: {positions.shape[1] - tokens} position_embeddings of patches, beside {tokens} of other tokens, "
            "make no square grid"
        )
    size = side * ours["encoder.patch_embed.proj.weight"].shape[-1]
    return {"pos_embed_prefix": tokens > 0, "image_size": (size, size)}


def _family(state: Mapping[str, Tensor]) -> str:
    """Return the model_type of a state dict."""
    parts = {key.rsplit(".", 1)[-1] for key in state}
    if "position_embeddings" not in parts:
        return "dinov3_vit"
    if "lambda1" in parts:
        return "dinov2_with_registers" if "register_tokens" in parts else "dinov2"
    return "deit" if "distillation_token" in parts else "vit"


def _check_activation(name: str, family: str, given: str | None, mlp: str) -> None:
    wanted = "gelu" if mlp == "gelu" else "silu"
    if given not in (None, wanted) and (mlp == "gelu" or family == "dinov3_vit"):  # DINOv2's gate has its own
        raise CheckpointError(f"{name}: hidden_act must be {wanted!r} for mlp={mlp!r}, got {given!r}")
