"""Checkpoints of mmsegmentation 0.x and 1.x, linear and mask heads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import SegmenterConfig
from .infer_config import fields_from_shapes

# What mmsegmentation's Segmenter configurations fix, where it differs from the official program.
_NUMERICS: dict[str, Any] = {
    "encoder_norm_eps": 1e-6,
    "decoder_norm_eps": 1e-5,
    "pos_embed_mode": "bicubic",
    "upsample_to": "image",
    "upscale_small_images": False,
    "drop_path_rate": 0.1,
    "decoder_drop_path_rate": 0.1,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
}
_OVERLAP = 32  # pixels by which neighbouring windows overlap in its configurations (crop 512, stride 480)

_NAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^backbone\.layers\.", "encoder.blocks."),
        (r"^backbone\.ln1\.", "encoder.norm."),
        (r"^backbone\.patch_embed\.projection\.", "encoder.patch_embed.proj."),
        (r"^backbone\.", "encoder."),
        (r"^decode_head\.layers\.", "decoder.blocks."),
        (r"^decode_head\.dec_proj\.", "decoder.proj_dec."),
        (r"^decode_head\.patch_proj\.weight$", "decoder.proj_patch"),
        (r"^decode_head\.classes_proj\.weight$", "decoder.proj_classes"),
        (r"^decode_head\.conv_seg\.", "decoder.head."),
        (r"^decode_head\.", "decoder."),
        (r"(\.blocks\.\d+)\.ln([12])\.", r"\1.norm\2."),
        (r"(\.blocks\.\d+)\.attn\.attn\.in_proj_", r"\1.attn.qkv."),
        (r"(\.blocks\.\d+)\.attn\.attn\.out_proj\.", r"\1.attn.proj."),
        (r"(\.blocks\.\d+)\.ffn\.layers\.0\.0\.", r"\1.mlp.fc1."),
        (r"(\.blocks\.\d+)\.ffn\.layers\.1\.", r"\1.mlp.fc2."),
    )
]
_TRANSPOSED = ("decoder.proj_patch", "decoder.proj_classes")


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Whether the keys are mmsegmentation's."""
    return any(key.startswith("backbone.") for key in state) and any(key.startswith("decode_head.") for key in state)


def to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """mmsegmentation's state dict in our names; keys it does not know keep theirs."""
    is_mask = "decode_head.cls_emb" in state
    ours = {
        _rename(key): tensor
        for key, tensor in state.items()
        if not (is_mask and key.startswith("decode_head.conv_seg."))  # unused beside the class embeddings
    }
    for key in _TRANSPOSED:
        if key in ours and ours[key].ndim == 2:
            ours[key] = ours[key].T
    head = "decoder.head.weight"
    if head in ours and ours[head].shape[2:] == (1, 1):  # a convolution of one pixel
        ours[head] = ours[head].flatten(1)
    projection = ours.get("encoder.patch_embed.proj.weight")
    if projection is not None:
        ours.setdefault("encoder.patch_embed.proj.bias", torch.zeros(projection.shape[:1]))
    return ours


def config_from(state: Mapping[str, Tensor], meta: Any, given: Mapping[str, Any]) -> SegmenterConfig:
    """The configuration of a state dict in our names; ``meta`` is the checkpoint's, with class names and palette.

    Attention heads of 64 and a square image are assumed unless ``given`` says otherwise. Windows are as large as the
    image and overlap by 32 pixels, as in mmsegmentation's configurations.

    Raises:
        CheckpointError: a tensor that any Segmenter has is missing.
    """
    fields = _NUMERICS | fields_from_shapes(state, given)
    side = min(fields["image_size"])
    stride = max(side - _OVERLAP, fields["patch_size"])
    config = SegmenterConfig(**fields, window_size=side, window_stride=stride)
    return config.replace(**_classes(meta, config.num_classes))


def _rename(key: str) -> str:
    for pattern, replacement in _NAMES:
        key = pattern.sub(replacement, key)
    return key


def _classes(meta: Any, count: int) -> dict[str, Any]:
    """Class names and palette, where they are of the right form and number."""
    meta = meta if isinstance(meta, Mapping) else {}
    dataset = meta.get("dataset_meta") if isinstance(meta.get("dataset_meta"), Mapping) else {}
    names = dataset.get("classes", meta.get("CLASSES"))
    palette = dataset.get("palette", meta.get("PALETTE"))
    fields: dict[str, Any] = {}
    if _is_list(names, count) and all(isinstance(name, str) for name in names):
        fields["class_names"] = tuple(names)
    if _is_list(palette, count) and all(_is_list(colour, 3) and _are_bytes(colour) for colour in palette):
        fields["palette"] = tuple(tuple(colour) for colour in palette)
    return fields


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == length


def _are_bytes(colour: Any) -> bool:
    return all(isinstance(value, int) and 0 <= value <= 255 for value in colour)
