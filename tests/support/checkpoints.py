"""Checkpoints for tests: the goldens, small models, mmengine's and hostile files, and a Hub without network."""

from __future__ import annotations

import os
import shutil
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segmenter_fast import Segmenter, SegmenterConfig

GOLDEN = Path(__file__).parent.parent / "golden"
SMALL = SegmenterConfig(
    num_classes=3,
    image_size=(32, 32),
    patch_size=8,
    embed_dim=64,
    depth=2,
    num_heads=1,
    decoder_num_heads=1,
    window_size=32,
    window_stride=32,
)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Return whether two state dicts are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def official_folder(folder: Path, name: str = "official_mask", edits: dict[str, str] | None = None) -> Path:
    """Make a writable copy of an official golden, with texts of its variant.yml replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(GOLDEN / name / "checkpoint.pth", folder / "checkpoint.pth")
    text = (GOLDEN / name / "variant.yml").read_text()
    for before, after in (edits or {}).items():
        assert before in text
        text = text.replace(before, after)
    (folder / "variant.yml").write_text(text)
    return folder


def small_model(**fields: Any) -> Segmenter:
    return Segmenter(SMALL.replace(**fields)).eval()


class Touches:
    """Creates ``marker`` when it is unpickled unsafely."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def save_with_history(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint as mmengine's runner does, with a ``HistoryBuffer`` of numpy arrays and one of its methods."""
    name = "mmengine.logging.history_buffer"

    class HistoryBuffer:
        def __init__(self) -> None:
            self._log_history = np.arange(4.0)
            self.statistics_methods = {"min": HistoryBuffer.min}

        def min(self) -> float:
            return float(self._log_history.min())

    for member in (HistoryBuffer, HistoryBuffer.min):
        member.__module__ = name
        member.__qualname__ = member.__qualname__.split("<locals>.")[1]
    modules = {part: types.ModuleType(part) for part in ("mmengine", "mmengine.logging", name)}
    modules[name].HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    sys.modules.update(modules)
    try:
        history = {"log_scalars": {"loss": HistoryBuffer()}, "lr": np.float64(0.1), "seeds": {1, 2}}
        torch.save({"message_hub": history, **content}, path)
    finally:
        for part in modules:
            del sys.modules[part]


class RecordingHub:
    """Stands in for huggingface_hub's ``HfApi``: copies what would be uploaded to ``folder/org/name``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.private: dict[str, bool | None] = {}

    def __call__(self, **_: Any) -> RecordingHub:
        return self

    def create_repo(self, repo_id: str, private: bool | None = None, **_: Any) -> types.SimpleNamespace:
        self.private[repo_id] = private
        return types.SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id: str, folder_path: Path, **_: Any) -> str:
        shutil.copytree(folder_path, self.folder / repo_id)
        return "https://hub/commit"


def save_pickle(path: Path, pickled: bytes) -> None:
    """Write a zip checkpoint around a hand-written pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", sys.byteorder)
