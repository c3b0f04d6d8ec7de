"""Our own format: a folder with ``model.safetensors`` and ``config.json``.

``config.json`` holds the fields of ``SegmenterConfig``, class names and palette among them, the version of the format
and that of the package that wrote it.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..config import SegmenterConfig
from .build import Checkpoint
from .reading import CheckpointError, read_json, read_safetensors

FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def config_to_json(config: SegmenterConfig) -> dict[str, Any]:
    """The content of config.json."""
    versions = {"format_version": FORMAT_VERSION, "package_version": importlib.metadata.version("segmenter-fast")}
    return {**versions, **config.to_dict()}


def config_from_json(content: Mapping[str, Any]) -> SegmenterConfig:
    """The inverse of ``config_to_json``.

    Raises:
        CheckpointError: not of our format, of a newer version, or a field that is unknown or out of range.
    """
    fields = dict(content)
    version = fields.pop("format_version", None)
    writer = fields.pop("package_version", "unknown")
    if not isinstance(version, int):
        raise CheckpointError("no configuration of segmenter-fast: it has no format_version")
    if version > FORMAT_VERSION:
        raise CheckpointError(f"format {version}, written by segmenter-fast {writer}; this one reads {FORMAT_VERSION}")
    try:
        return SegmenterConfig.from_dict(fields)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{error} (written by segmenter-fast {writer})") from error


def read_folder(folder: Path) -> Checkpoint:
    """What ``write_folder`` wrote.

    Raises:
        FileNotFoundError: one of the two files is missing.
        CheckpointError: one of them is damaged or not ours.
    """
    content = read_json(folder / CONFIG)
    try:
        config = config_from_json(content)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    return Checkpoint(str(folder), config, read_safetensors(folder / WEIGHTS))


def write_folder(folder: Path, config: SegmenterConfig, state: Mapping[str, Tensor]) -> None:
    """Writes both files into an existing folder.

    Raises:
        OSError: a file cannot be written.
    """
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    try:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(f"{folder / WEIGHTS} cannot be written: {error}") from error
    (folder / CONFIG).write_text(json.dumps(config_to_json(config), indent=2) + "\n", encoding="utf-8")
