"""``load``, for a trained model from any source, and ``create_model``, for a new one.

A source is recognised by its content. Key map and configuration of each format are in a file of its name.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from ..config import VARIANTS, SegmenterConfig, variant_config
from ..field_types import did_you_mean
from ..segmenter import Segmenter
from ..token_merging import Merge
from . import distributed, hub, huggingface, mmseg, mmseg_config, official, timm
from .build import SavedModel, build, load_strictly
from .infer_config import ARCHITECTURE
from .reading import CheckpointError, read_mapping, shown
from .unwrap import find_state, read_state

Source: TypeAlias = str | os.PathLike[str] | Mapping[str, Tensor]
_HUB_ID = re.compile(r"(?!.*\.(pth|pt|bin|ckpt|safetensors)$)[\w.-]+/[\w.-]+")
_RUNS = ("best", "last")  # folders of a training run: never names on the hub, which would be asked for long
_RUN = "run.json"  # with the model's configuration, beside the folder of a run's checkpoints
# Fields that a backbone of Hugging Face's brings, and those that may differ from the variant's.
_NUMERICS = ("encoder_norm_eps", "pos_embed_mode", "rope_temperature", "mean", "std")
_DETAILS = ("num_register_tokens", "pos_embed_prefix", "qkv_bias")


def load(source: Source, num_classes: int | None = None, merge: Merge = None, **fields: Any) -> Segmenter:
    """Return a trained model, float32, in evaluation mode, with the numerics of the program that trained it.

    Args:
        source: a folder with ``config.json`` and ``model.safetensors``, in one file or sharded with an index; an
            official folder with ``checkpoint.pth`` and ``variant.yml``; one of these files; a ``.pth`` of
            mmsegmentation 0.x or 1.x; a state dict of any of these, also inside of a trainer's checkpoint, see
            ``unwrap.find_state``, or in a folder of ``torch.distributed.checkpoint``; a checkpoint of a run of
            ``segmenter-fast train``; or the id ``org/name`` of a model on the Hugging Face Hub. The content tells
            which of them it is. A ViT, DeiT, DINOv2 or DINOv3 of Hugging Face's, in any of these forms, gets a random
            decoder, with a warning.
        num_classes: where it differs from the checkpoint's, the tensors of the classes are re-initialised, and a
            warning names them.
        merge: merging of tokens, see ``TokenMerging.of``, instead of the checkpoint's; "none" for exact.
        fields: fields of ``SegmenterConfig`` to override; another ``image_size`` resizes the position embedding, and
            ``in_channels`` adapts the patch embedding of an RGB model, see ``adapt_channels``.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: (a ValueError) the source is damaged, of an unknown format, names code, or does not fit.
        TypeError: an unknown field, or a source of another kind.
    """
    if not isinstance(source, (str, os.PathLike, Mapping)):
        raise TypeError(f"source must be a path, a hub id or a state dict, got {type(source).__name__}")
    source = _expanded(source)
    if num_classes is not None:
        fields["num_classes"] = num_classes
    if merge is not None:
        fields["merging"] = merge
    return build(Segmenter, read_checkpoint(source, fields), fields)


def create_model(
    variant: str | SegmenterConfig = "seg_b_mask_16",
    pretrained: Source | bool | None = None,
    freeze_encoder: bool = False,
    **fields: Any,
) -> Segmenter:
    """Return a Segmenter, in training mode unless it comes from a Segmenter checkpoint.

    Args:
        variant: a name from ``segmenter_fast.VARIANTS``, or a configuration.
        pretrained: None or False for random weights; ``"timm"`` or True for an encoder with the weights of
            ``config.timm_backbone``; another name of timm's, such as ``"vit_small_patch16_224.augreg_in21k"``; a file
            or state dict of encoder weights in timm's or Meta's names; a ViT, DeiT, DINOv2 or DINOv3 of Hugging
            Face's, as ``load`` takes, such as ``"facebook/dinov2-small"``; or a Segmenter checkpoint, as ``load``
            takes, of the same architecture. A checkpoint keeps its own numerics and classes, weights of timm their
            mean and std, a model of Hugging Face's its numerics, mean, std, registers and biases, and Meta's DINOv2
            its ``pos_embed_mode``, where ``fields`` name no others. The position embedding is resized to
            ``image_size``, the patch embedding of RGB images adapted to ``in_channels``.
        freeze_encoder: whether to train the decoder only, see ``Segmenter.freeze_encoder``.
        fields: any field of ``SegmenterConfig`` to override, such as ``num_classes`` or ``image_size``. timm's own
            features need ``encoder_norm_eps=1e-6`` and ``pos_embed_mode="bicubic_antialias"``, which are the default
            of the DINOv2 variants; the official program runs its weights at 1e-5 and "bilinear", the default elsewhere.

    Raises:
        ValueError: an unknown variant, a field out of range, or weights that are unavailable or do not fit.
        TypeError: an unknown field, or a variant or weights of another kind.
        FileNotFoundError: no such file, and no such name.
        ImportError: timm is wanted and missing.
    """
    if not isinstance(variant, (str, SegmenterConfig)):
        raise TypeError(f"variant must be a name or a SegmenterConfig, got {type(variant).__name__}")
    if isinstance(pretrained, bool):
        pretrained = "timm" if pretrained else None
    if not isinstance(pretrained, (str, os.PathLike, Mapping, type(None))):
        kind = type(pretrained).__name__
        raise TypeError(f"pretrained must be True, False, None, 'timm', a name, a state dict or a path, got {kind}")
    pretrained = None if pretrained is None else _expanded(pretrained)
    config = (variant_config(variant) if isinstance(variant, str) else variant).replace(**fields)
    model = Segmenter(config) if pretrained is None else _pretrained(config, pretrained, fields)
    return model.freeze_encoder() if freeze_encoder else model


def _expanded(source: Source) -> Source:
    """Return a source whose ~ is a home folder.

    Raises:
        CheckpointError: an empty path.
    """
    if isinstance(source, Mapping):
        return source
    if not os.fspath(source):
        raise CheckpointError("the source is empty: name a file, a folder or a hub id such as org/name")
    return os.path.expanduser(source)


def _pretrained(config: SegmenterConfig, source: Source, fields: Mapping[str, Any]) -> Segmenter:
    """Return a model with the weights of ``source``, see ``create_model``."""
    state, title = find_state(source, "the state dict")[0] if isinstance(source, Mapping) else None, "the state dict"
    if not isinstance(source, Mapping):
        title, path = os.fspath(source), Path(source)
        name = config.timm_backbone if title == "timm" else title
        if name is None:
            raise CheckpointError(f"there are no timm weights for {config.variant}; give a timm model's name or a file")
        if title == "timm" or (not path.exists() and timm.names_a_model(name)):
            encoder, pixels = timm.download(name, config)
            config = config.replace(**{**_for_rgb(config, pixels), "timm_backbone": name, **fields})
            return _with_encoder(config, encoder, f"timm's {name}")
        state = read_state(path)[0] if path.is_file() else None
    if state is not None and timm.recognises(state):
        return _with_encoder(config.replace(**{**timm.numerics(state), **fields}), state, title)
    # A bare state dict does not tell the number of heads.
    heads = {"num_heads": config.num_heads} if state is not None and huggingface.recognises(state) else {}
    saved = read_checkpoint(source, {**heads, **fields})
    if saved.has_decoder:
        model = build(Segmenter, saved, fields)
        _require_same(ARCHITECTURE, model.config, config, title)
        return model
    brought = {name: getattr(saved.config, name) for name in _NUMERICS + _DETAILS}
    config = config.replace(**{**_for_rgb(config, brought), **fields})
    _require_same([name for name in ARCHITECTURE if name != "decoder"], saved.config, config, title)
    return _with_encoder(config, {key.removeprefix("encoder."): saved.state[key] for key in saved.state}, title)


def _for_rgb(config: SegmenterConfig, brought: dict[str, Any]) -> dict[str, Any]:
    """Leave mean and std of RGB images out for a model of other channels."""
    return {name: value for name, value in brought.items() if config.in_channels == 3 or name not in ("mean", "std")}


def _require_same(names: Iterable[str], found: SegmenterConfig, wanted: SegmenterConfig, title: str) -> None:
    """Refuse a model with other fields than the wanted one; the message names the variants that have them.

    Raises:
        CheckpointError: the configurations differ.
    """
    different = [name for name in names if getattr(found, name) != getattr(wanted, name)]
    if different:
        what = ", ".join(f"{name} is {getattr(found, name)}, not {getattr(wanted, name)}" for name in different)
        needed = [name for name in names if name not in _DETAILS]
        fit = [key for key, other in VARIANTS.items() if all(getattr(other, n) == getattr(found, n) for n in needed)]
        hint = f"; it fits {', '.join(fit)}" if fit else ""
        raise CheckpointError(f"{title} holds another model than {wanted.variant}: {what}{hint}")


def _with_encoder(config: SegmenterConfig, state: Mapping[str, Tensor], name: str) -> Segmenter:
    """Return a random model with the encoder replaced; an unused classification head stays random."""
    model = Segmenter(config)
    heads = {key: tensor for key, tensor in model.encoder.state_dict().items() if key.startswith(timm.HEADS)}
    load_strictly(model.encoder, timm.encoder_state(state, config) | heads, name)
    return model


def read_checkpoint(source: Source, overrides: Mapping[str, Any]) -> SavedModel:
    """Read a file, a folder or a state dict.

    Args:
        overrides: fields that the caller sets, see ``fields_from_shapes``.

    Raises:
        FileNotFoundError, CheckpointError: as ``load``.
    """
    if isinstance(source, Mapping):
        return _from_state(*find_state(source, "the state dict"), source.get("meta"), "the state dict", overrides)
    path = Path(source)
    if not path.exists() and _HUB_ID.fullmatch(os.fspath(source)):
        if path.parent.is_dir():  # a mistyped path; the hub would be asked for half a minute
            others = ", ".join(sorted(other.name for other in path.parent.iterdir())[:10]) or "nothing"
            raise FileNotFoundError(
                f"{path}: no such file or folder; {path.parent.absolute()} has {others}. A hub id whose first part is "
                "a folder here is loaded by Segmenter.from_pretrained"
            )
        if path.name in _RUNS:
            raise FileNotFoundError(f"{path}: no such file or folder, nor is {path.parent.absolute()} one")
        try:
            return hub.read_hub(os.fspath(source))
        except (OSError, HfHubHTTPError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"{path.absolute()} is no file or folder, nor does the Hugging Face Hub give {source}: {reason}"
            ) from error
    if not path.exists():
        hint = did_you_mean(str(path), VARIANTS)
        if str(path) in VARIANTS:
            hint = "; create_model makes a variant, without trained weights"
        raise FileNotFoundError(f"{path}: no such file or folder, and no hub id such as org/name{hint}")
    if (path / distributed.METADATA).exists():
        return _from_state(distributed.read_folder(path), [], None, str(path), overrides)
    is_folder = path.is_dir()
    if is_folder:
        ours, theirs = (hub.CONFIG, hub.WEIGHTS), (official.WEIGHTS, official.VARIANT)
        parts = next((names for names in (ours, theirs) if any((path / name).exists() for name in names)), ())
        if not parts:
            expected = ", or ".join(" and ".join(names) for names in (ours, theirs))
            raise CheckpointError(f"{path} holds no checkpoint: expected {expected}; name a file to load another one")
        for name in parts:
            if not (path / name).exists() and not (name == hub.WEIGHTS and hub.weights_path(path).exists()):
                there = next(part for part in parts if part != name)
                raise FileNotFoundError(f"{path / name}: no such file; {path / there} alone is loaded by its own name")
        if parts == ours:
            return hub.read_folder(path)
        path /= official.WEIGHTS
    elif path.name in (hub.WEIGHTS, hub.INDEX) and (path.parent / hub.CONFIG).exists():
        return hub.read_folder(path.parent)
    state, left_out, content = read_state(path)
    variant, run = path.parent / official.VARIANT, path.parent.parent / _RUN
    if {"format_version", "schedule", "step"} <= content.keys() and run.exists():
        return SavedModel(str(path), hub.config_of(run, read_mapping(run).get("model")), state)
    if not is_folder and not (official.recognises(state) and variant.exists()):
        return _from_state(state, left_out, content.get("meta"), str(path), overrides)
    described = read_mapping(variant)
    try:
        return SavedModel(str(path), official.config_from_variant(described, state), state)
    except ValueError as error:
        raise CheckpointError(f"{variant}: {error}") from error


def _from_state(
    state: Mapping[str, Tensor], left_out: list[str], meta: Any, name: str, overrides: Mapping[str, Any]
) -> SavedModel:
    """Configure a state dict by its shapes; warn about keys beside it.

    Raises:
        CheckpointError: keys of no known origin, or a tensor that every Segmenter has is missing or misshapen.
    """
    if huggingface.recognises(state):
        return huggingface.read_backbone(name, state, {"num_attention_heads": overrides.get("num_heads")})
    if left_out:
        warnings.warn(f"{name}: {len(left_out)} tensors beside the model's: {shown(left_out)}", stacklevel=4)
    try:
        if mmseg.recognises(state):
            stated = mmseg_config.read_stated(meta, mask=mmseg.has_mask_head(state))
            renamed = mmseg.to_ours(state, bgr=stated is not None and stated.bgr)
            config = mmseg.config_from_shapes(renamed, overrides, meta, stated)
            if stated is None:
                told = f"{name} comes without a configuration that can be read: mean {config.mean}, windows of "
                told += f"{config.window_size} at a stride of {config.window_stride} and the numerics of "
                warnings.warn(told + "mmsegmentation's models are assumed; override what differs", stacklevel=4)
            elif stated.notes:
                told = f"{name}: labels will differ from mmsegmentation's, because its configuration has "
                warnings.warn(told + "; ".join(stated.notes), stacklevel=4)
            return SavedModel(name, config, renamed)
        if official.recognises(state):
            config = official.config_from_shapes(state, overrides)
            warnings.warn(
                f"{name} comes without a configuration: heads of {config.embed_dim // config.num_heads}, mean "
                f"{config.mean} and the official program's numerics are assumed; override what differs",
                stacklevel=4,
            )
            return SavedModel(name, config, state)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from error
    keys = ", ".join(key[:80] for key in list(state)[:5])
    if timm.recognises(state):
        raise CheckpointError(
            f"{name} holds an encoder in timm's or Meta's names, no Segmenter: create_model(variant, pretrained=...) "
            f"takes it; its keys are {keys}, ..."
        )
    raise CheckpointError(f"{name} holds no Segmenter: its keys are {keys}, ...")
