"""``load``: any source, recognised by what it holds."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from ..config import SegmenterConfig
from ..segmenter import Segmenter
from . import mmseg, official, ours
from .build import Checkpoint, build
from .reading import CheckpointError, read_safetensors, read_torch, read_yaml

Source: TypeAlias = str | os.PathLike[str] | Mapping[str, Tensor]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load(source: Source, num_classes: int | None = None, **fields: Any) -> Segmenter:
    """A trained model, float32, in evaluation mode, with the numerics of the program that trained it.

    Args:
        source: a folder with ``config.json`` and ``model.safetensors``; an official folder with ``checkpoint.pth`` and
            ``variant.yml``; one of these files; a ``.pth`` of mmsegmentation 0.x or 1.x; a state dict of any of these;
            or the id ``org/name`` of a model on the Hugging Face Hub. What it is, is told by the content.
        num_classes: where it differs from the checkpoint's, the tensors of the classes are initialised anew, and a
            warning names them.
        fields: fields of ``SegmenterConfig`` to override; another ``image_size`` resizes the position embedding.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: (a ValueError) the source is damaged, unknown, names code, or does not fit; it says which.
        TypeError: an unknown field.
    """
    if num_classes is not None:
        fields["num_classes"] = num_classes
    if isinstance(source, Mapping):
        state, meta = unwrapped(source, "the state dict")
        return build(Segmenter, from_state(state, "the state dict", fields, meta), fields)
    path = Path(source)
    if not path.exists() and _HUB_ID.fullmatch(os.fspath(source)):
        return _from_hub(os.fspath(source), fields)
    return build(Segmenter, read_checkpoint(path, fields), fields)


def read_checkpoint(path: Path, given: Mapping[str, Any]) -> Checkpoint:
    """What a file or folder holds, in our names. ``given`` are the caller's overrides, see ``fields_from_shapes``."""
    if path.is_dir():
        if (path / ours.CONFIG).exists() or (path / ours.WEIGHTS).exists():
            return ours.read_folder(path)
        if (path / official.WEIGHTS).exists() or (path / official.VARIANT).exists():
            return _official(path / official.WEIGHTS, path / official.VARIANT)
        raise CheckpointError(
            f"{path} holds no checkpoint: expected {ours.CONFIG} and {ours.WEIGHTS}, "
            f"or {official.WEIGHTS} and {official.VARIANT}; name a file to load another one"
        )
    if path.suffix == ".safetensors":
        if path.name == ours.WEIGHTS and (path.parent / ours.CONFIG).exists():
            return ours.read_folder(path.parent)
        return from_state(read_safetensors(path), str(path), given)
    state, meta = unwrapped(read_torch(path), str(path))
    variant = path.parent / official.VARIANT
    if official.recognises(state) and variant.exists():
        return _official(path, variant, state)
    return from_state(state, str(path), given, meta)


def unwrapped(content: Any, name: str) -> tuple[Mapping[str, Tensor], Any]:
    """State dict and ``meta`` of a loaded checkpoint, which may be the state dict itself.

    Raises:
        CheckpointError: no state dict in it.
    """
    if isinstance(content, Mapping):
        for state in (content.get("model"), content.get("state_dict"), content):
            if isinstance(state, Mapping) and state and any(isinstance(value, Tensor) for value in state.values()):
                _require_tensors(state, name)
                return state, content.get("meta")
    raise CheckpointError(f"{name} holds no state dict: neither is it one, nor has it 'model' or 'state_dict'")


def _require_tensors(state: Mapping[Any, Any], name: str) -> None:
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{name} holds no state dict: its {key!r} is {type(value).__name__}")


def from_state(state: Mapping[str, Tensor], name: str, given: Mapping[str, Any], meta: Any = None) -> Checkpoint:
    """A state dict of any origin, configured from its shapes.

    Raises:
        CheckpointError: keys of no known origin, or a tensor that any Segmenter has is missing.
    """
    try:
        if mmseg.recognises(state):
            renamed = mmseg.to_ours(state)
            return Checkpoint(name, mmseg.config_from(renamed, meta, given), renamed)
        if official.recognises(state):
            config = official.config_from_shapes(state, given)
            warnings.warn(
                f"{name} comes without a configuration: heads of {config.embed_dim // config.num_heads}, mean "
                f"{config.mean} and the official program's numerics are assumed; override what differs",
                stacklevel=4,
            )
            return Checkpoint(name, config, state)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from error
    raise CheckpointError(f"{name} holds no Segmenter: its keys are {', '.join(map(str, list(state)[:5]))}, ...")


def _official(weights: Path, variant: Path, state: Mapping[str, Tensor] | None = None) -> Checkpoint:
    described = read_yaml(variant)
    if state is None:
        state, _ = unwrapped(read_torch(weights), str(weights))
    try:
        config: SegmenterConfig = official.config_from_variant(described, state)
    except ValueError as error:
        raise CheckpointError(f"{variant}: {error}") from error
    return Checkpoint(str(weights), config, state)


def _from_hub(model_id: str, fields: Mapping[str, Any]) -> Segmenter:
    try:
        return Segmenter.from_pretrained(model_id, **fields)
    except (OSError, HfHubHTTPError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{model_id} is no file or folder here, and cannot be had from the Hugging Face Hub either: {reason}"
        ) from error
