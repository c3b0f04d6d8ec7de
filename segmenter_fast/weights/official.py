"""Checkpoints of the official Segmenter program: ``checkpoint.pth`` beside ``variant.yml``.

Our state-dict keys are the official ones, so the key map is the identity. ``official_export`` writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..classes import classes_of
from ..config import IMAGENET_MEAN, IMAGENET_STD, VARIANTS, SegmenterConfig
from .infer_config import fields_from_shapes, head_classes, named_variant
from .reading import CheckpointError

WEIGHTS, VARIANT = "checkpoint.pth", "variant.yml"

NORMALIZATIONS: dict[str, dict[str, Any]] = {
    "vit": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    "deit": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD},
}
# What the program fixes in its code.
NUMERICS: dict[str, Any] = {
    "encoder_norm_eps": 1e-5,
    "decoder_norm_eps": 1e-5,
    "pos_embed_mode": "bilinear",
    "upsample_to": "padded",
    "upscale_small_images": True,
    "mlp_ratio": 4.0,
}
HEAD_DIM = 64  # of the mask transformer


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Whether the keys are the official ones, which are also ours."""
    return any(key.startswith(("encoder.", "decoder.")) for key in state)


def config_from_variant(variant: Mapping[str, Any], state: Mapping[str, Tensor]) -> SegmenterConfig:
    """The configuration that a parsed variant.yml describes.

    Raises:
        CheckpointError: an entry that is missing or has an unknown value, naming it.
        ValueError: a value out of range.
    """
    net = _section(variant, "net_kwargs")
    decoder = _section(net, "decoder")
    inference = _section(variant, "inference_kwargs") if "inference_kwargs" in variant else {}
    kind = _one_of(decoder, "name", {"mask_transformer": "mask", "linear": "linear"})
    embed_dim = _integer(net, "d_model")
    image_size = _size(net, "image_size")
    fields: dict[str, Any] = {
        **NUMERICS,
        **_one_of(net, "normalization", NORMALIZATIONS),
        "num_classes": _integer(net, "n_cls"),
        "image_size": image_size,
        "patch_size": _integer(net, "patch_size"),
        "embed_dim": embed_dim,
        "depth": _integer(net, "n_layers"),
        "num_heads": _integer(net, "n_heads"),
        "distillation_token": bool(net.get("distilled", False)),
        "dropout": _rate(net, "dropout"),
        "drop_path_rate": _rate(net, "drop_path_rate"),
        "head_classes": head_classes(state),
        "decoder": kind,
        "window_size": _integer({"window_size": image_size[0], **inference}, "window_size"),
        "window_stride": _integer({"window_stride": image_size[0], **inference}, "window_stride"),
    }
    if kind == "mask":
        fields |= {
            "decoder_depth": _integer(decoder, "n_layers"),
            "decoder_num_heads": max(embed_dim // HEAD_DIM, 1),
            "decoder_dropout": _rate(decoder, "dropout"),
            "decoder_drop_path_rate": _rate(decoder, "drop_path_rate"),
        }
    else:
        fields["decoder_num_heads"] = fields["num_heads"]
    dataset = variant.get("dataset_kwargs")
    trained_on = dataset.get("dataset") if isinstance(dataset, Mapping) else None
    return SegmenterConfig(**fields, **named_variant(fields), **classes_of(trained_on, fields["num_classes"]))


def config_from_shapes(state: Mapping[str, Tensor], given: Mapping[str, Any]) -> SegmenterConfig:
    """The configuration of a state dict without variant.yml: shapes, and the program's numerics.

    Normalisation is assumed: ImageNet's for distilled models, 0.5 for all others. Variants that the official program
    does not have, DINOv2 and DINOv3, keep numerics and normalisation of their own.
    """
    fields = NUMERICS | fields_from_shapes(state, given)
    normalization = NORMALIZATIONS["deit" if fields["distillation_token"] else "vit"]
    if fields["num_register_tokens"] and "variant" in fields:
        named = VARIANTS[fields["variant"]]
        fields |= {name: getattr(named, name) for name in ("encoder_norm_eps", "pos_embed_mode")}
        normalization = {"mean": named.mean, "std": named.std}
    side = min(fields["image_size"])
    return SegmenterConfig(**fields, **normalization, window_size=side, window_stride=side)


def _section(mapping: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = mapping.get(name)
    if not isinstance(section, Mapping):
        raise CheckpointError(f"{name} must be a mapping, got {section!r}")
    return section


def _integer(section: Mapping[str, Any], name: str) -> int:
    value = section.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(f"{name} must be an integer, got {value!r}")
    return value


def _rate(section: Mapping[str, Any], name: str) -> float:
    value = section.get(name, 0.0)
    if not isinstance(value, (int, float)):
        raise CheckpointError(f"{name} must be a number, got {value!r}")
    return float(value)


def _size(section: Mapping[str, Any], name: str) -> tuple[int, int]:
    value = section.get(name)
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(side, int) for side in pair):
        raise CheckpointError(f"{name} must be (height, width), got {value!r}")
    return pair[0], pair[1]


def _one_of(section: Mapping[str, Any], name: str, known: Mapping[str, Any]) -> Any:
    value = section.get(name)
    if not isinstance(value, str) or value not in known:
        raise CheckpointError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return known[value]
