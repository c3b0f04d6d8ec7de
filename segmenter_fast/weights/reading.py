"""Files into plain data. Nothing that a file says is imported or executed."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import safetensors
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from . import safe_unpickle as foreign


class CheckpointError(ValueError):
    """A source that cannot or must not be loaded; the message names it and the reason."""


class _Loader(yaml.SafeLoader):
    """Plain YAML plus ``!!python/tuple``, which official variant.yml files use for the image size."""


def _construct_tuple(loader: yaml.SafeLoader, node: yaml.SequenceNode) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:python/tuple", _construct_tuple)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; every Python tag but ``!!python/tuple`` is refused.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not YAML, a refused tag, or no mapping.
    """
    _require_file(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(f"{path} is refused as YAML: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a mapping, not {type(content).__name__}")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not JSON, or no object.
    """
    _require_file(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold an object, not {type(content).__name__}")
    return content


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: damaged, truncated or something else.
    """
    _require_file(path)
    try:
        return load_file(path)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error


def read_torch(path: Path) -> Any:
    """What ``torch.save`` wrote, read with ``weights_only=True``.

    A file that also pickles objects of mmengine, numpy and the like is read a second way, in which these become
    inert placeholders (see ``foreign``).

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: damaged, truncated, something else, or it names code beyond tensors.
    """
    _require_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not _is_zip(path):
            raise CheckpointError(f"{path} is refused: not a checkpoint of tensors only ({_reason(error)})") from error
    except Exception as error:  # a damaged file makes torch's reader raise almost anything
        raise CheckpointError(f"{path} is damaged, truncated or no PyTorch checkpoint ({_reason(error)})") from error
    try:
        return foreign.read(path)
    except foreign.RefusedError as error:
        raise CheckpointError(f"{path} is refused, and nothing in it was executed: {error}") from error


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _reason(error: Exception) -> str:
    """The first sentence of torch's error that is not advice on how to read the file unsafely."""
    advice = ("Weights only load failed", "(1)", "(2)", "Check the documentation")
    lines = [line.strip() for line in str(error).splitlines()]
    reasons = [line for line in lines if line and not line.startswith(advice)]
    return (reasons or [type(error).__name__])[0].split(". ")[0].removeprefix("WeightsUnpickler error: ")
