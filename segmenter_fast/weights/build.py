"""Models from a configuration and a state dict, loaded strictly."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..config import SegmenterConfig
from ..vit import resize_positions
from .infer_config import count_layers
from .reading import CheckpointError, shown

ModelT = TypeVar("ModelT", bound=nn.Module)
_POSITIONS, _PROJECTION = "encoder.pos_embed", "encoder.patch_embed.proj.weight"
_SHAPES = ("image_size", "num_classes", "in_channels")
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


@torch.no_grad()
def take_classes(model: nn.Module, fresh: nn.Module, state: Mapping[str, Tensor], places: Sequence[int]) -> None:
    """Give each class of a model the weights of a state dict's class that ``places`` names, of place -1 fresh ones."""
    parameters, given = dict(fresh.named_parameters()), torch.tensor(places)
    kept = (given >= 0).nonzero()[:, 0]
    for name, tensor in model.named_parameters():
        if name in _CLASS_TENSORS:
            tensor.copy_(parameters[name])
            dim = 1 if name == "decoder.cls_emb" else 0
            tensor.index_copy_(dim, kept, state[name].index_select(dim, given[kept]).to(tensor))


def adapt_channels(weight: Tensor, channels: int, name: str) -> Tensor:
    """Turn a patch embedding of RGB images, ``(D, 3, P, P)``, into one of ``channels``, as timm does.

    One channel gets the sum of the weights, so that it gives what grey as RGB gives. More channels take the three in
    turn, times 3 / channels.

    Raises:
        CheckpointError: weights of other than three channels.
    """
    if weight.shape[1] != 3:
        raise CheckpointError(f"{name} takes images of {weight.shape[1]} channels, which cannot become {channels}")
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return weight[:, [index % 3 for index in range(channels)]] * (3 / channels)


def build(model_class: type[ModelT], saved: SavedModel, fields: Mapping[str, Any]) -> ModelT:
    """Return a saved model, float32, in evaluation mode, with ``fields`` of its configuration overridden.

    Another ``image_size`` resizes the position embedding in the mode that the configuration names. Other
    ``in_channels`` adapt the patch embedding, with a warning, see ``adapt_channels``. Another
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
    for key, value in saved.state.items():
        if not value.is_floating_point() or value.layout != torch.strided or value.is_meta:
            found = f"{value.dtype} ({'without values' if value.is_meta else value.layout})"
            raise CheckpointError(f"{saved.name}: {key} must be a dense floating point tensor, got {found}")
    # Names and shapes are compared before any memory is taken.
    classes, pixels = ("class_names", "palette", "label_values"), ("mean", "std", "bands")
    same = {name: getattr(before, name) for name in (*_SHAPES, *classes, *pixels)}
    model = _empty(model_class, stored := config.replace(**same), saved)
    shapes = {key: value.to("meta") for key, value in saved.state.items()}
    if not saved.has_decoder:
        shapes |= {key: value for key, value in model.state_dict().items() if key.startswith("decoder.")}
    load_strictly(model, shapes, saved.name, assign=True)
    state = {
        key: value.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        for key, value in saved.state.items()
    }
    if config.grid != before.grid and _POSITIONS in state:
        state[_POSITIONS] = resize_positions(state[_POSITIONS], before.grid, config.grid, config.pos_embed_mode)
    if config.in_channels != before.in_channels:
        state[_PROJECTION] = adapt_channels(state[_PROJECTION], config.in_channels, saved.name)
        adapted = f"its patch embedding is adapted from {before.in_channels} channels to {config.in_channels}"
        warnings.warn(f"{saved.name}: {adapted} and needs training", stacklevel=3)
    if config.num_classes != before.num_classes or not saved.has_decoder:
        with torch.device("cpu"):
            random = model_class(config.replace(depth=1, merging=None)).state_dict()
        if saved.has_decoder:
            renewed = [key for key in _CLASS_TENSORS if key in state and key in random]
            reason = f"has {before.num_classes} classes, not {config.num_classes}: {', '.join(renewed)} are"
        else:
            renewed = [key for key in random if key.startswith("decoder.")]
            reason = f"is a backbone: the tensors of a {config.decoder} decoder for {config.num_classes} classes are"
        state |= {key: random[key] for key in renewed}
        warnings.warn(f"{saved.name} {reason} random now and need training", stacklevel=3)
    if config != stored:
        model = _empty(model_class, config, saved)
    load_strictly(model, state, saved.name, assign=True)
    return model.eval()


def _empty(model_class: type[ModelT], config: SegmenterConfig, saved: SavedModel) -> ModelT:
    """Return a model without memory for its tensors, made only where the state dict has as many layers.

    Raises:
        CheckpointError: another number of layers, or sizes that no tensor can have.
    """
    for field, prefix in (("depth", "encoder.blocks."), ("decoder_depth", "decoder.blocks.")):
        wanted, found = getattr(config, field), count_layers(saved.state, prefix)
        if wanted != found and (field == "depth" or (saved.has_decoder and config.decoder == "mask")):
            reason = f"{field} is {shown(wanted)}, the weights have {found} layers"
            raise CheckpointError(f"{saved.name} does not fit its configuration: {reason}")
    try:
        with torch.device("meta"):
            return model_class(config)
    except (OverflowError, RuntimeError, TypeError) as error:  # of PyTorch
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{saved.name}: its configuration has sizes that no tensor can have: {reason}") from error


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
