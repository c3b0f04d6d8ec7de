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
from .fitting import build, require_fit
from .load import read_checkpoint, unwrapped
from .reading import CheckpointError, read_safetensors, read_torch

_ARCHITECTURE = (
    "patch_size",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "class_token",
    "distillation_token",
    "num_register_tokens",
    "layer_scale",
    "decoder",
)


def create_model(
    variant: str | SegmenterConfig = "seg_b_mask_16",
    pretrained: str | os.PathLike[str] | None = None,
    **fields: Any,
) -> Segmenter:
    """A Segmenter, in training mode unless it comes from a Segmenter checkpoint.

    Args:
        variant: a name from ``segmenter_fast.VARIANTS``, or a configuration.
        pretrained: None for random weights; ``"timm"`` for an encoder with the weights of ``config.timm_backbone``;
            a file of encoder weights in timm's names; or a file or folder with a Segmenter checkpoint, as ``load``
            takes, of the same architecture. A checkpoint keeps its own numerics and classes where ``fields`` name
            no others. The position embedding is resized to ``image_size``.
        fields: any field of ``SegmenterConfig`` to override, such as ``num_classes`` or ``image_size``. timm's own
            features need ``encoder_norm_eps=1e-6``; the official program runs its weights at 1e-5, the default.

    Raises:
        ValueError: an unknown variant, a field out of range, or weights that are unavailable or do not fit.
        TypeError: an unknown field.
        FileNotFoundError: no such file.
        ImportError: timm is wanted and missing.
    """
    config = (variant_config(variant) if isinstance(variant, str) else variant).replace(**fields)
    if pretrained is None:
        return Segmenter(config)
    if pretrained == "timm":
        return _with_encoder(config, timm.download(config), f"timm's {config.timm_backbone}")
    path = Path(pretrained)
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
