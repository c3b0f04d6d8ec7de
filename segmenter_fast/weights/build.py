"""Models from a configuration and a state dict, loaded strictly."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..config import SegmenterConfig
from ..vit import resize_positions
from .reading import CheckpointError

ModelT = TypeVar("ModelT", bound=nn.Module)
_POSITIONS = "encoder.pos_embed"
_CLASS_TENSORS = (
    *("decoder.cls_emb", "decoder.mask_norm.weight", "decoder.mask_norm.bias"),
    *("decoder.head.weight", "decoder.head.bias"),
)


def rename(key: str, names: Mapping[str, str]) -> str:
    """Return a key of a state dict after the substitution of each pattern in ``names``, in their order."""
    for pattern, replacement in names.items():
        key = re.sub(pattern, replacement, key)
    return key


@dataclass(frozen=True)
class SavedModel:
    """Configuration and state dict of a saved model, in our names."""

    name: str
    """Its source, for messages."""
    config: SegmenterConfig
    state: Mapping[str, Tensor]
    has_decoder: bool = True
    """False for a backbone: its configuration's decoder is the default one."""


def build(model_class: type[ModelT], saved: SavedModel, fields: Mapping[str, Any]) -> ModelT:
    """Return a saved model, float32, in evaluation mode, with ``fields`` of its configuration overridden.

    Another ``image_size`` resizes the position embedding in the mode that the configuration names. Another
    ``num_classes`` re-initialises the tensors of the classes, with a warning that names them; a backbone gets a random
    decoder, also with a warning. The model shares no memory with ``saved``.

    Args:
        model_class: ``Segmenter``, or a subclass; called with the configuration.

    Raises:
        TypeError: an unknown field.
        CheckpointError: a field out of range, a tensor that is not dense floating point, or keys that are missing,
            unexpected or misshapen: all are listed.
    """
    before = saved.config
    try:
        config = before.replace(**fields)
    except ValueError as error:
        raise CheckpointError(f"{saved.name}: {error}") from error
    state = {}
    for key, value in saved.state.items():
        if not value.is_floating_point() or value.layout != torch.strided:
            found = f"{value.dtype} ({value.layout})"
            raise CheckpointError(f"{saved.name}: {key} must be a dense floating point tensor, got {found}")
        state[key] = value.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    entries = before.grid[0] * before.grid[1] + before.num_prefix_tokens * before.pos_embed_prefix
    fits = _POSITIONS in state and state[_POSITIONS].shape == (1, entries, before.embed_dim)
    if fits and config.grid != before.grid:
        state[_POSITIONS] = resize_positions(state[_POSITIONS], before.grid, config.grid, config.pos_embed_mode)
    if config.num_classes != before.num_classes or not saved.has_decoder:
        with torch.device("cpu"):
            random = model_class(config.replace(depth=1)).state_dict()
        if saved.has_decoder:
            renewed = [key for key in _CLASS_TENSORS if key in state and key in random]
            reason = f"has {before.num_classes} classes, not {config.num_classes}: {', '.join(renewed)} are"
        else:
            renewed = [key for key in random if key.startswith("decoder.")]
            reason = f"is a backbone: the tensors of a {config.decoder} decoder for {config.num_classes} classes are"
        state |= {key: random[key] for key in renewed}
        warnings.warn(f"{saved.name} {reason} random now and need training", stacklevel=3)
    with torch.device("meta"):  # shapes are compared before any memory is taken
        model = model_class(config)
    load_strictly(model, state, saved.name, assign=True)
    return model.eval()


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], name: str, assign: bool = False) -> None:
    """Load a state dict with ``strict=True``.

    Raises:
        CheckpointError: every key that is missing, unexpected or misshapen, as PyTorch lists them.
    """
    try:
        module.load_state_dict(state, strict=True, assign=assign)
    except RuntimeError as error:
        _, _, keys = str(error).partition("\n")
        raise CheckpointError(f"{name} does not fit its configuration:\n{keys}") from error
