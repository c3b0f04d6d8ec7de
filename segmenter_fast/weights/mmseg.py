"""Checkpoints of mmsegmentation 0.x and 1.x, linear and mask heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import SegmenterConfig
from .build import rename
from .infer_config import count_channels, fields_from_shapes
from .mmseg_config import Stated

# Values of mmsegmentation's Segmenter configurations, for checkpoints without a configuration.
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
_OVERLAP = 32  # of neighbouring windows, in pixels: crops of 512 at a stride of 480

_NAMES = {
    r"^backbone\.layers\.": "encoder.blocks.",
    r"^backbone\.ln1\.": "encoder.norm.",
    r"^backbone\.patch_embed\.projection\.": "encoder.patch_embed.proj.",
    r"^backbone\.": "encoder.",
    r"^decode_head\.layers\.": "decoder.blocks.",
    r"^decode_head\.dec_proj\.": "decoder.proj_dec.",
    r"^decode_head\.patch_proj\.weight$": "decoder.proj_patch",
    r"^decode_head\.classes_proj\.weight$": "decoder.proj_classes",
    r"^decode_head\.conv_seg\.": "decoder.head.",
    r"^decode_head\.": "decoder.",
    r"(\.blocks\.\d+)\.ln([12])\.": r"\1.norm\2.",
    r"(\.blocks\.\d+)\.attn\.attn\.in_proj_": r"\1.attn.qkv.",
    r"(\.blocks\.\d+)\.attn\.attn\.out_proj\.": r"\1.attn.proj.",
    r"(\.blocks\.\d+)\.ffn\.layers\.0\.0\.": r"\1.mlp.fc1.",
    r"(\.blocks\.\d+)\.ffn\.layers\.1\.": r"\1.mlp.fc2.",
}
_TRANSPOSED = ("decoder.proj_patch", "decoder.proj_classes")


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Return whether the keys are mmsegmentation's."""
    return all(any(key.startswith(prefix) for key in state) for prefix in ("backbone.", "decode_head."))


def has_mask_head(state: Mapping[str, Tensor]) -> bool:
    """Return whether the decoder is a mask transformer."""
    return "decode_head.cls_emb" in state


def to_ours(state: Mapping[str, Tensor], bgr: bool = False) -> dict[str, Tensor]:
    """Return mmsegmentation's state dict in our names; unknown keys keep theirs.

    ``bgr``: its images are blue, green, red, ours the other way round.
    """
    is_mask = has_mask_head(state)
    ours = {
        rename(key, _NAMES): tensor
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
        if bgr and projection.ndim == 4:
            ours["encoder.patch_embed.proj.weight"] = projection.flip(1)
    return ours


def config_from_shapes(
    state: Mapping[str, Tensor], overrides: Mapping[str, Any], meta: Any, stated: Stated | None = None
) -> SegmenterConfig:
    """Return the configuration of a state dict in our names.

    Without a configuration in the checkpoint, attention heads of 64 and a square image are assumed unless ``overrides``
    has others, and the numerics of mmsegmentation's configurations: windows overlap by 32 pixels, for example.

    Args:
        meta: the checkpoint's, whose class names and palette are taken where their form and number are right.
        stated: what the checkpoint's configuration says.

    Raises:
        CheckpointError: a tensor that every Segmenter has is missing or misshapen.
    """
    told = stated.fields if stated else {}
    fields = _NUMERICS | fields_from_shapes(state, {**told, **overrides})
    fields["window_size"] = side = min(fields["image_size"])
    fields["window_stride"] = max(side - _OVERLAP, fields["patch_size"])
    fields |= {name: value for name, value in told.items() if name != "image_size"}  # the grid's, where it fits
    meta = meta if isinstance(meta, Mapping) else {}
    dataset = meta.get("dataset_meta") if isinstance(meta.get("dataset_meta"), Mapping) else {}
    names = dataset.get("classes", meta.get("CLASSES"))
    if _is_list(names, fields["num_classes"], str):
        fields["class_names"] = tuple(names)
    palette = dataset.get("palette", meta.get("PALETTE"))
    if _is_list(palette, fields["num_classes"], (list, tuple)) and all(_is_color(color) for color in palette):
        fields["palette"] = tuple(tuple(color) for color in palette)
    return SegmenterConfig(**fields).replace(in_channels=count_channels(state))


def _is_list(value: Any, length: int, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == length and all(isinstance(item, kind) for item in value)


def _is_color(value: Any) -> bool:
    return _is_list(value, 3, int) and 0 <= min(value) <= max(value) <= 255
