"""``create_model``: a variant by name, with random weights or a trained start."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import SegmenterConfig, variant_config
from ..segmenter import Segmenter
from . import timm
from .build import build, require_fit
from .load import read_checkpoint, unwrapped
from .reading import CheckpointError, read_safetensors, read_torch

_ARCHITECTURE = (
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


def create_model(
    variant: str | SegmenterConfig = "seg_b_mask_16",
    pretrained: str | os.PathLike[str] | None = None,
    freeze_encoder: bool = False,
    **fields: Any,
) -> Segmenter:
    """A Segmenter, in training mode unless it comes from a Segmenter checkpoint.

    Args:
        variant: a name from ``segmenter_fast.VARIANTS``, or a configuration.
        pretrained: None for random weights; ``"timm"`` for an encoder with the weights of ``config.timm_backbone``;
            another name of timm's, such as ``"vit_small_patch16_224.augreg_in21k"``; a file of encoder weights in
            timm's names; or a file or folder with a Segmenter checkpoint, as ``load`` takes, of the same architecture.
            A checkpoint keeps its own numerics and classes, weights of timm their mean and std, where ``fields`` name
            no others. The position embedding is resized to ``image_size``.
        freeze_encoder: whether to train the decoder only, see ``Segmenter.freeze_encoder``.
        fields: any field of ``SegmenterConfig`` to override, such as ``num_classes`` or ``image_size``. timm's own
            features need ``encoder_norm_eps=1e-6`` and ``pos_embed_mode="bicubic_antialias"``, which are the default
            of the DINOv2 variants; the official program runs its weights at 1e-5 and "bilinear", the default elsewhere.

    Raises:
        ValueError: an unknown variant, a field out of range, or weights that are unavailable or do not fit.
        TypeError: an unknown field.
        FileNotFoundError: no such file, and no such name.
        ImportError: timm is wanted and missing.
    """
    config = (variant_config(variant) if isinstance(variant, str) else variant).replace(**fields)
    model = _started(config, pretrained, fields)
    return model.freeze_encoder() if freeze_encoder else model


def _started(config: SegmenterConfig, pretrained: str | os.PathLike[str] | None, fields: dict[str, Any]) -> Segmenter:
    if pretrained is None:
        return Segmenter(config)
    if pretrained == "timm":
        if config.timm_backbone is None:
            raise CheckpointError(f"there are no timm weights for {config.variant}; pass timm_backbone= or a file")
        return _from_timm(config, config.timm_backbone, fields)
    path = Path(pretrained)
    if not path.exists() and timm.names_a_model(os.fspath(pretrained)):
        return _from_timm(config, os.fspath(pretrained), fields)
    encoder = _encoder_weights(path)
    if encoder is not None:
        return _with_encoder(config, encoder, str(path))
    model = build(Segmenter, read_checkpoint(path, fields), fields)
    different = [
        f"{name} is {getattr(model.config, name)}, not {getattr(config, name)}"
        for name in _ARCHITECTURE
        if getattr(model.config, name) != getattr(config, name)
    ]
    if different:
        raise CheckpointError(f"{path} holds another model than {config.variant}: {', '.join(different)}")
    return model


def _from_timm(config: SegmenterConfig, name: str, fields: dict[str, Any]) -> Segmenter:
    backbone = timm.download(name, config)
    config = config.replace(**{"mean": backbone.mean, "std": backbone.std, "timm_backbone": name, **fields})
    return _with_encoder(config, backbone.state, f"timm's {name}")


def _encoder_weights(path: Path) -> Mapping[str, Tensor] | None:
    """The state dict of a file with timm's names; None for any other source."""
    if path.is_dir():
        return None
    if path.suffix == ".safetensors":
        state: Mapping[str, Tensor] = read_safetensors(path)
    else:
        state, _ = unwrapped(read_torch(path), str(path))
    return state if timm.recognises(state) else None


def _with_encoder(config: SegmenterConfig, state: Mapping[str, Tensor], name: str) -> Segmenter:
    """A random model with the encoder replaced; the unused classification head, if any, stays random."""
    model = Segmenter(config)
    encoder = timm.encoder_state(state, config)
    wanted = {key: tensor for key, tensor in model.encoder.state_dict().items() if not key.startswith(timm.HEADS)}
    require_fit({key: tensor.shape for key, tensor in wanted.items()}, encoder, name)
    model.encoder.load_state_dict(encoder, strict=False)  # only the head is not there
    return model
