"""Checkpoints of the official Segmenter program: ``checkpoint.pth`` beside ``variant.yml``, read and written.

Our state-dict keys are the official ones, so the key map is the identity.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ..classes import DATASET_CLASSES
from ..config import IMAGENET_MEAN, IMAGENET_STD, VARIANTS, SegmenterConfig
from ..io.atomic import atomic_files
from .infer_config import HEAD_DIM, count_channels, fields_from_shapes, head_classes, named_variant
from .reading import CheckpointError, shown

WEIGHTS, VARIANT = "checkpoint.pth", "variant.yml"

# Entries of variant.yml and the fields that they set, by section.
_NET = {
    "n_cls": ("num_classes", int),
    "d_model": ("embed_dim", int),
    "n_layers": ("depth", int),
    "n_heads": ("num_heads", int),
    "patch_size": ("patch_size", int),
    "dropout": ("dropout", float),
    "drop_path_rate": ("drop_path_rate", float),
}
_DECODER = {
    "n_layers": ("decoder_depth", int),
    "dropout": ("decoder_dropout", float),
    "drop_path_rate": ("decoder_drop_path_rate", float),
}
_INFERENCE = {"window_size": ("window_size", int), "window_stride": ("window_stride", int)}
_NORMALIZATIONS: dict[str, dict[str, Any]] = {
    "vit": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    "deit": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD},
}
_DECODERS = {"mask_transformer": "mask", "linear": "linear"}
# Fixed in the program's code: numerics, which other weights run with all the same, and architecture.
_NUMERICS: dict[str, Any] = {
    "encoder_norm_eps": 1e-5,
    "decoder_norm_eps": 1e-5,
    "pos_embed_mode": "bilinear",
    "upsample_to": "padded",
    "upscale_small_images": True,
}
_ARCHITECTURE: dict[str, Any] = {
    "in_channels": 3,
    "class_token": True,
    "num_register_tokens": 0,
    "layer_scale": False,
    "qkv_bias": True,
    "mlp": "gelu",
    "mlp_ratio": 4.0,
    "pos_embed_kind": "learned",
    "pos_embed_prefix": True,
}
_HEAD_CLASSES = 1000  # rows of the unused classification heads that the program always makes


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Return whether the keys are the official ones, which are also ours."""
    return any(key.startswith(("encoder.", "decoder.")) for key in state)


def config_from_variant(variant: Mapping[str, Any], state: Mapping[str, Tensor]) -> SegmenterConfig:
    """Return the configuration that a parsed variant.yml describes.

    Raises:
        CheckpointError: an entry that is missing or has a wrong type or value, naming it.
        ValueError: a value out of range.
    """
    net = _section(variant, "net_kwargs")
    decoder = _section(net, "decoder")
    side = net.get("image_size")
    image_size = (side, side) if isinstance(side, int) else side
    if not isinstance(image_size, (tuple, list)) or [type(side) for side in image_size] != [int, int]:
        raise CheckpointError(f"image_size must be (height, width), got {shown(image_size)}")
    windows = dict.fromkeys(_INFERENCE, image_size[0])
    if "inference_kwargs" in variant:
        windows |= _section(variant, "inference_kwargs")
    fields: dict[str, Any] = {
        **_NUMERICS,
        **_one_of(net, "normalization", _NORMALIZATIONS),
        **_numbers(net, _NET),
        **_numbers(windows, _INFERENCE),
        "image_size": tuple(image_size),
        "distillation_token": bool(net.get("distilled", False)),
        "head_classes": head_classes(state),
        "decoder": _one_of(decoder, "name", _DECODERS),
    }
    if fields["decoder"] == "mask":
        fields |= {"decoder_num_heads": _decoder_heads(fields["embed_dim"]), **_numbers(decoder, _DECODER)}
    else:
        fields["decoder_num_heads"] = fields["num_heads"]
    dataset = variant.get("dataset_kwargs")
    name = dataset.get("dataset") if isinstance(dataset, Mapping) else None
    classes = DATASET_CLASSES.get(name) if isinstance(name, str) else None
    if classes and len(classes.class_names) == fields["num_classes"]:
        fields |= {"class_names": classes.class_names, "palette": classes.palette}
    return SegmenterConfig(**fields, **named_variant(fields))


def config_from_shapes(state: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> SegmenterConfig:
    """Return the configuration of a state dict without variant.yml: its shapes, and the program's numerics.

    ImageNet's mean and std are assumed for distilled models, 0.5 for all others. Variants that the official program
    does not have, DINOv2 and DINOv3, keep numerics, mean and std of their own.
    """
    fields = _NUMERICS | fields_from_shapes(state, overrides)
    fields |= _NORMALIZATIONS["deit" if fields["distillation_token"] else "vit"]
    if fields["num_register_tokens"] and "variant" in fields:
        named = VARIANTS[fields["variant"]]
        fields |= {name: getattr(named, name) for name in ("encoder_norm_eps", "pos_embed_mode", "mean", "std")}
    side = min(fields["image_size"])
    config = SegmenterConfig(**fields, window_size=side, window_stride=side)
    return config.replace(in_channels=count_channels(state))


def write_folder(folder: Path, config: SegmenterConfig, state: Mapping[str, Tensor]) -> list[str]:
    """Write both files atomically, with every tensor of ``state`` bit for bit.

    Missing classification heads, which the program's strict loading needs, are added as zeros.

    Returns:
        One sentence for each setting that the program replaces or cannot store.

    Raises:
        ValueError: a model that the program cannot run, naming the fields.
        OSError: the folder cannot be written.
    """
    variant = variant_from_config(config)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    if not config.head_classes:
        for name in ("head", "head_dist") if config.distillation_token else ("head",):
            tensors[f"encoder.{name}.weight"] = torch.zeros(_HEAD_CLASSES, config.embed_dim)
            tensors[f"encoder.{name}.bias"] = torch.zeros(_HEAD_CLASSES)
    with atomic_files(folder) as temporary:
        try:
            torch.save({"model": tensors, "n_cls": config.num_classes}, temporary / WEIGHTS)
        except RuntimeError as error:  # raised for a full disk
            raise OSError(f"{folder / WEIGHTS} cannot be written: {error}") from error
        # the default dumper writes the image size with the tag !!python/tuple, as the program does
        (temporary / VARIANT).write_text(yaml.dump(variant), encoding="utf-8")
    differences = [
        f"the official program runs it with {name} {value}, not {getattr(config, name)}"
        for name, value in _NUMERICS.items()
        if getattr(config, name) != value
    ]
    if config.class_names and "dataset" not in variant["dataset_kwargs"]:
        differences.append("the official format has no place for class names and palette, so they are left out")
    if config.merging is not None:
        differences.append("the official program merges no tokens, so the schedule of token merging is left out")
    return differences


def variant_from_config(config: SegmenterConfig) -> dict[str, Any]:
    """Return the content of variant.yml, as far as the program reads it for inference.

    Raises:
        ValueError: a model that the program cannot run, naming the fields.
    """
    needed = dict(_ARCHITECTURE)
    decoder: dict[str, Any] = {"name": "linear"}
    if config.decoder == "mask":
        needed["decoder_num_heads"] = _decoder_heads(config.embed_dim)
        decoder = {"name": "mask_transformer", **_entries(config, _DECODER)}
    other = [f"{name}={getattr(config, name)!r}" for name, value in needed.items() if getattr(config, name) != value]
    if other:
        raise ValueError(f"the official program cannot run {config.variant}: it has no {', '.join(other)}")
    pixels = {"mean": config.mean, "std": config.std}
    normalization = next((name for name, fields in _NORMALIZATIONS.items() if fields == pixels), None)
    if normalization is None:
        raise ValueError(f"the official program has no normalization of mean {config.mean} and std {config.std}")
    # timm's name without the tag of the weights; the program's name for B/8 is not timm's
    backbone = (config.timm_backbone or f"vit_custom_patch{config.patch_size}_{min(config.image_size)}").split(".")[0]
    data = {"normalization": normalization, "image_size": max(config.image_size), "crop_size": config.window_size}
    for name, classes in DATASET_CLASSES.items():
        if classes.class_names == config.class_names:
            data["dataset"] = name
    return {
        "net_kwargs": {
            "backbone": re.sub(r"^vit_base_patch8_224$", "vit_base_patch8_384", backbone),
            "decoder": decoder,
            "distilled": config.distillation_token,
            "image_size": tuple(config.image_size),
            "normalization": normalization,
            **_entries(config, _NET),
        },
        "dataset_kwargs": data,
        "inference_kwargs": {"im_size": min(config.image_size), **_entries(config, _INFERENCE)},
    }


def _decoder_heads(embed_dim: int) -> int:
    return max(embed_dim // HEAD_DIM, 1)


def _entries(config: SegmenterConfig, table: Mapping[str, tuple[str, type]]) -> dict[str, Any]:
    return {entry: getattr(config, field) for entry, (field, _) in table.items()}


def _numbers(section: Mapping[str, Any], table: Mapping[str, tuple[str, type]]) -> dict[str, Any]:
    """Return the fields that the entries of a section set; an absent rate is 0."""
    fields = {}
    for entry, (field, kind) in table.items():
        value = section.get(entry, 0.0 if kind is float else None)
        if not isinstance(value, (int, kind)) or isinstance(value, bool):
            raise CheckpointError(f"{entry} must be {'an integer' if kind is int else 'a number'}, got {shown(value)}")
        fields[field] = kind(value)
    return fields


def _section(mapping: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = mapping.get(name)
    if not isinstance(section, Mapping):
        raise CheckpointError(f"{name} must be a mapping, got {shown(section)}")
    return section


def _one_of(section: Mapping[str, Any], name: str, known: Mapping[str, Any]) -> Any:
    value = section.get(name)
    if not isinstance(value, str) or value not in known:
        raise CheckpointError(f"{name} must be one of {', '.join(known)}, got {shown(value)}")
    return known[value]
