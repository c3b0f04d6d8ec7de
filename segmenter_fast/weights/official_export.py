"""Our models as the official Segmenter program takes them: ``checkpoint.pth`` beside ``variant.yml``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ..classes import DATASETS
from ..config import SegmenterConfig
from ..io.atomic import atomic_files
from .official import HEAD_DIM, NORMALIZATIONS, NUMERICS, VARIANT, WEIGHTS

_HEAD_CLASSES = 1000  # rows of the unused classification heads that the program always makes
# What its encoder cannot be told.
_FIXED = {
    "class_token": True,
    "num_register_tokens": 0,
    "layer_scale": False,
    "qkv_bias": True,
    "mlp": "gelu",
    "mlp_ratio": 4.0,
    "pos_embed_kind": "learned",
    "pos_embed_prefix": True,
}


def write_folder(folder: Path, config: SegmenterConfig, state: Mapping[str, Tensor]) -> list[str]:
    """Writes both files, whole or not at all; every tensor of ``state`` stays as it is, bit for bit.

    Classification heads, which the program's strict loading asks for, are added as zeros where there are none.

    Returns:
        What the program will do otherwise than the configuration says, one sentence each.

    Raises:
        ValueError: a model that the program cannot run, naming the fields.
        OSError: the folder cannot be written.
    """
    _require_known(config)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    if not config.head_classes:
        for name in ("head", "head_dist") if config.distillation_token else ("head",):
            tensors[f"encoder.{name}.weight"] = torch.zeros(_HEAD_CLASSES, config.embed_dim)
            tensors[f"encoder.{name}.bias"] = torch.zeros(_HEAD_CLASSES)
    with atomic_files(folder) as temporary:
        try:
            torch.save({"model": tensors, "n_cls": config.num_classes}, temporary / WEIGHTS)
        except RuntimeError as error:  # how it reports a full disk
            raise OSError(f"{folder / WEIGHTS} cannot be written: {error}") from error
        # the default dumper writes the image size with the tag !!python/tuple, as the program does
        (temporary / VARIANT).write_text(yaml.dump(variant_from_config(config)), encoding="utf-8")
    return _differences(config)


def variant_from_config(config: SegmenterConfig) -> dict[str, Any]:
    """The content of variant.yml, as far as the program reads it for inference.

    Raises:
        ValueError: a mean and std that it has no name for.
    """
    normalization = _normalization(config)
    decoder: dict[str, Any] = {"name": "linear"}
    if config.decoder == "mask":
        decoder = {
            "name": "mask_transformer",
            "n_layers": config.decoder_depth,
            "drop_path_rate": config.decoder_drop_path_rate,
            "dropout": config.decoder_dropout,
        }
    return {
        "net_kwargs": {
            "backbone": _backbone(config),
            "d_model": config.embed_dim,
            "decoder": decoder,
            "distilled": config.distillation_token,
            "drop_path_rate": config.drop_path_rate,
            "dropout": config.dropout,
            "image_size": tuple(config.image_size),
            "n_cls": config.num_classes,
            "n_heads": config.num_heads,
            "n_layers": config.depth,
            "normalization": normalization,
            "patch_size": config.patch_size,
        },
        "dataset_kwargs": {
            "normalization": normalization,
            "image_size": max(config.image_size),
            "crop_size": config.window_size,
            **({"dataset": name} if (name := _dataset(config)) else {}),
        },
        "inference_kwargs": {
            "im_size": min(config.image_size),
            "window_size": config.window_size,
            "window_stride": config.window_stride,
        },
    }


def _require_known(config: SegmenterConfig) -> None:
    fixed = dict(_FIXED)
    if config.decoder == "mask":
        fixed["decoder_num_heads"] = max(config.embed_dim // HEAD_DIM, 1)
    unknown = [f"{name}={getattr(config, name)!r}" for name, value in fixed.items() if getattr(config, name) != value]
    if unknown:
        raise ValueError(f"the official program cannot run {config.variant}: it has no {', '.join(unknown)}")
    _normalization(config)


def _normalization(config: SegmenterConfig) -> str:
    for name, fields in NORMALIZATIONS.items():
        if (config.mean, config.std) == (fields["mean"], fields["std"]):
            return name
    raise ValueError(f"the official program has no normalization of mean {config.mean} and std {config.std}")


def _backbone(config: SegmenterConfig) -> str:
    """The program's name of the backbone: timm's without the tag of the weights, or one that it does not know."""
    if config.timm_backbone is None:
        return f"vit_custom_patch{config.patch_size}_{min(config.image_size)}"
    architecture = config.timm_backbone.split(".")[0]
    return re.sub(r"^vit_base_patch8_224$", "vit_base_patch8_384", architecture)


def _dataset(config: SegmenterConfig) -> str | None:
    return next((name for name, dataset in DATASETS.items() if dataset.class_names == config.class_names), None)


def _differences(config: SegmenterConfig) -> list[str]:
    found = [
        f"the official program runs it with {name} {value}, not {getattr(config, name)}"
        for name, value in NUMERICS.items()
        if getattr(config, name) != value
    ]
    if config.class_names and _dataset(config) is None:
        found.append("the official format has no place for class names and palette, so they are left out")
    return found
