"""State dicts inside of what trainers write: containers, wrappers of modules, averages of the weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .pickles import Placeholder
from .reading import CheckpointError, read_safetensors, read_torch, require_stored, shown

# A tensor of every model, by format: a Segmenter's before those of a backbone alone, in timm's or Hugging Face's names.
_ANCHORS = (
    *("encoder.patch_embed.proj.weight", "backbone.patch_embed.projection.weight"),
    *("patch_embed.proj.weight", "embeddings.cls_token"),
)
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# The average of the weights is the model that was evaluated. mmengine stores it as state_dict, and the weights without
# averaging as ema_state_dict.
_AVERAGES = {"state_dict_ema", "model_ema", "ema", "ema_model", "teacher"}
_LATER = {"student", "ema_state_dict"}
_DEPTH, _MOST = 4, 10_000  # of mappings inside of each other, and in all


def read_state(path: Path) -> tuple[dict[str, Tensor], list[str], Mapping[str, Any]]:
    """Return the state dict of a file, the keys beside it that are not the model's, and all that the file holds.

    Raises:
        FileNotFoundError, CheckpointError: as ``read_torch``, ``read_safetensors`` and ``find_state``.
    """
    content = read_safetensors(path) if path.suffix in (".safetensors", ".json") else read_torch(path)
    state, left_out = find_state(content, str(path))
    if path.suffix != ".json":
        require_stored(state, path.stat().st_size, str(path))
    return state, left_out, content


def find_state(content: Any, name: str) -> tuple[dict[str, Tensor], list[str]]:
    """Return the state dict of a model in a loaded checkpoint, and the keys beside it that are not the model's.

    It may lie in mappings, such as ``model_state_dict`` or ``module``, and its keys may have a prefix, such as
    ``module.``, ``_orig_mod.``, ``model.backbone.`` or ``teacher.``, which is removed. An average of the weights goes
    before the weights, a teacher before its student.

    Raises:
        CheckpointError: no state dict in it, or one with other values than tensors.
    """
    mappings = _mappings(content)
    for anchor in _ANCHORS:
        found = []
        for path, mapping in mappings:
            for key in mapping:
                plain = _plain(key)
                if plain == anchor or plain.endswith(f".{anchor}"):
                    prefix = plain.removesuffix(anchor)
                    parts = {*path, *prefix.split(".")}
                    found.append((-1 if parts & _AVERAGES else 1 if parts & _LATER else 0, prefix, mapping))
        if found:
            _, prefix, mapping = min(found, key=lambda one: one[0])
            others = tuple(prefix for _, prefix, other in found if other is mapping)
            return _tensors(mapping, prefix, name), [key for key in map(_plain, mapping) if not key.startswith(others)]
    if not mappings:
        whole = content.values() if isinstance(content, Mapping) else [content]
        if objects := [type(value).__name__ for value in whole if isinstance(value, Placeholder)]:
            raise CheckpointError(
                f"{name} holds pickled objects ({', '.join(objects)[:200]}), a whole model perhaps, whose code is "
                "not run: save the state dict instead, torch.save(model.state_dict(), path)"
            )
        raise CheckpointError(f"{name} holds no state dict: neither is it one, nor has it 'model' or 'state_dict'")
    return _tensors(mappings[0][1], "", name), []


def _mappings(content: Any) -> list[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """Return each mapping with a tensor in it, and the keys that lead there, outer ones first."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), content)]
    seen = {id(content)}
    for path, value in waiting:  # grows
        if isinstance(value, Mapping) and len(path) < _DEPTH:
            for key, item in value.items():
                if isinstance(item, Mapping) and id(item) not in seen and len(waiting) < _MOST:
                    seen.add(id(item))
                    waiting.append(((*path, str(key)[:60]), item))
    maps = [(path, value) for path, value in waiting if isinstance(value, Mapping)]
    return [(path, value) for path, value in maps if any(isinstance(item, Tensor) for item in value.values())]


def _plain(key: Any) -> str:
    """Return a key without the names of wrappers; no string: as it is shown."""
    return _WRAPPERS.sub("", key) if isinstance(key, str) else shown(key)


def _tensors(mapping: Mapping[Any, Any], prefix: str, name: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for key, value in mapping.items():
        if not _plain(key).startswith(prefix):
            continue
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{name} holds no state dict: its {shown(key)} is {type(value).__name__}")
        if state.setdefault(_plain(key).removeprefix(prefix), value) is not value:
            raise CheckpointError(f"{name} holds two tensors of the name {_plain(key)}")
    return state
