"""Safe reading of files: nothing that a file names is imported or executed."""

from __future__ import annotations

import json
import pickle
import threading
import zipfile
from pathlib import Path
from typing import Any

import safetensors
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

# Objects of these packages, ``getattr`` for their methods and the factories of a defaultdict become placeholders.
_PACKAGES = ("mmengine", "mmcv", "mmseg", "numpy")
_NAMES = ("builtins.getattr", "builtins.dict", "builtins.list", "builtins.int", "builtins.float")
_ALLOWING = threading.Lock()  # torch keeps one list of allowed names for the whole process


class CheckpointError(ValueError):
    """A source that cannot or must not be loaded; the message names it and the reason."""


class _YamlLoader(yaml.SafeLoader):
    """Plain YAML plus ``!!python/tuple``, the tag of the image size in official variant.yml files."""


def _construct_tuple(loader: yaml.SafeLoader, node: yaml.SequenceNode) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node, deep=True))


_YamlLoader.add_constructor("tag:yaml.org,2002:python/tuple", _construct_tuple)


class _Placeholder:
    """Accepts any arguments and any pickled state, and keeps none of them."""

    def __new__(cls, *_: Any) -> _Placeholder:
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in a file whose name ends in .json, or in a YAML file.

    Every Python tag of YAML but ``!!python/tuple`` is refused.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not of that language, a refused tag, or no mapping.
    """
    language = "JSON" if path.suffix == ".json" else "YAML"
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if language == "JSON" else yaml.load(text, _YamlLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise CheckpointError(f"{path} is refused as {language}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a mapping, not {type(content).__name__}")
    return content


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: damaged, truncated or of another format.
    """
    try:
        return load_file(path)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error


def read_torch(path: Path) -> Any:
    """Return the content of a file of ``torch.save``, read with ``weights_only=True``.

    Training checkpoints of mmengine hold ``HistoryBuffer`` objects with numpy arrays beside the tensors. These objects
    become placeholders that do nothing, and a defaultdict becomes a dict; any other name refuses the file.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: damaged, truncated, of another format, or it names other code.
    """
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            with _ALLOWING, torch.serialization.safe_globals(_placeholders(path)):
                return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        if not _is_pickle(path):
            raise CheckpointError(f"{path} is damaged, truncated or no PyTorch checkpoint") from error
        raise CheckpointError(f"{path} is refused, and nothing in it was executed: {_reason(error)}") from error
    except Exception as error:  # torch raises almost anything for a damaged file
        raise CheckpointError(f"{path} is damaged, truncated or no PyTorch checkpoint ({_reason(error)})") from error


def _is_pickle(path: Path) -> bool:
    """True for a zip archive and for a pickle, the two forms of PyTorch's checkpoints."""
    with path.open("rb") as file:
        return file.read(2) in {b"PK", *(bytes((0x80, version)) for version in range(2, 6))}


def _empty_dict(*_: Any) -> dict[Any, Any]:
    """Stand for ``collections.defaultdict``, whose items follow."""
    return {}


def _placeholders(path: Path) -> list[Any]:
    """Return ``(placeholder, name)`` for each known name in a zip checkpoint."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
    known = [(_Placeholder, name) for name in names if name.split(".")[0] in _PACKAGES or name in _NAMES]
    return [*known, (_empty_dict, "collections.defaultdict")]


def _reason(error: Exception) -> str:
    """Return the first sentence of torch's error that is no advice on how to read the file unsafely."""
    advice = ("Weights only load failed", "(1)", "(2)", "Check the documentation")
    lines = [line.strip() for line in str(error).split("WeightsUnpickler error:")[-1].splitlines()]
    reasons = [line for line in lines if " " in line and not line.startswith(advice)]  # not a bare KeyError's key
    return (reasons or [type(error).__name__])[0].split(". ")[0]
