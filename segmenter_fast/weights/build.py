"""One strict way from a configuration and a state dict to a model."""

from __future__ import annotations

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
POSITIONS = "encoder.pos_embed"
_OF_CLASSES = {
    "mask": ("decoder.cls_emb", "decoder.mask_norm.weight", "decoder.mask_norm.bias"),
    "linear": ("decoder.head.weight", "decoder.head.bias"),
}


@dataclass(frozen=True)
class Checkpoint:
    """What a source holds, in our names."""

    name: str
    """Where it comes from, for messages."""
    config: SegmenterConfig
    state: Mapping[str, Tensor]


def build(model_class: type[ModelT], checkpoint: Checkpoint, fields: Mapping[str, Any]) -> ModelT:
    """The model of a checkpoint, float32, in evaluation mode, with ``fields`` of its configuration overridden.

    Another ``image_size`` resizes the position embedding in the mode that the configuration names. Another
    ``num_classes`` re-initialises the tensors of the classes and warns of it, naming them.

    Raises:
        TypeError: an unknown field.
        CheckpointError: a field out of range, or keys that are missing, unexpected or misshapen: all are listed.
    """
    try:
        config = checkpoint.config.replace(**fields)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.name}: {error}") from error
    state = {key: _float32(key, value, checkpoint.name) for key, value in checkpoint.state.items()}
    before = checkpoint.config
    if config.grid != before.grid and _grid_fits(state, before):
        state[POSITIONS] = resize_positions(state[POSITIONS], before.grid, config.grid, config.pos_embed_mode)
    if config.num_classes != before.num_classes:
        _replace_classes(model_class, state, config, f"{checkpoint.name} has {before.num_classes} classes")
    return _assembled(model_class, config, state, checkpoint.name)


def _assembled(model_class: type[ModelT], config: SegmenterConfig, state: dict[str, Tensor], name: str) -> ModelT:
    with torch.device("meta"):  # shapes are compared before any memory is taken
        model = model_class(config)
    require_fit({key: tensor.shape for key, tensor in model.state_dict().items()}, state, name)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def require_fit(wanted: Mapping[str, torch.Size], state: Mapping[str, Tensor], name: str) -> None:
    """Compares names and shapes.

    Raises:
        CheckpointError: listing every key that is missing, unexpected or misshapen.
    """
    groups = {
        "missing": [f"{key} {tuple(wanted[key])}" for key in wanted if key not in state],
        "unexpected": [f"{key} {tuple(state[key].shape)}" for key in state if key not in wanted],
        "misshapen": [
            f"{key} is {tuple(state[key].shape)}, must be {tuple(shape)}"
            for key, shape in wanted.items()
            if key in state and state[key].shape != shape
        ],
    }
    if any(groups.values()):
        lines = [f"  {kind} ({len(keys)}): {', '.join(keys)}" for kind, keys in groups.items() if keys]
        raise CheckpointError("\n".join([f"{name} does not fit its configuration:", *lines]))


def _float32(key: str, value: Tensor, name: str) -> Tensor:
    """A float32 copy that shares no memory with the source."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout != torch.strided:
        found = f"{value.dtype} ({value.layout})" if isinstance(value, Tensor) else type(value).__name__
        raise CheckpointError(f"{name}: {key} must be a dense floating point tensor, got {found}")
    return value.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _grid_fits(state: Mapping[str, Tensor], config: SegmenterConfig) -> bool:
    """Whether the position embedding is the one the configuration describes; where not, the strict load says so."""
    entries = config.grid[0] * config.grid[1] + config.num_prefix_tokens * config.pos_embed_prefix
    return POSITIONS in state and state[POSITIONS].shape == (1, entries, config.embed_dim)


def _replace_classes(
    model_class: type[nn.Module], state: dict[str, Tensor], config: SegmenterConfig, reason: str
) -> None:
    with torch.device("cpu"):
        fresh = model_class(config.replace(depth=1)).state_dict()
    renewed = [key for key in _OF_CLASSES[config.decoder] if key in state]
    for key in renewed:
        state[key] = fresh[key]
    warnings.warn(
        f"{reason}, not {config.num_classes}: {', '.join(renewed)} are initialised anew and need training",
        stacklevel=4,
    )
