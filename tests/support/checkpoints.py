"""Checkpoint files for tests: paths of the goldens, and writers of small, foreign and hostile ones."""

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
    """Whether two state dicts are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def official_folder(folder: Path, name: str = "official_mask", edits: dict[str, str] | None = None) -> Path:
    """A writable copy of an official golden, with texts of its variant.yml replaced."""
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
    """Creates ``marker`` when it is unpickled the unsafe way."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def save_with_history(path: Path, content: dict[str, Any]) -> None:
    """Writes what mmengine's runner writes: a ``HistoryBuffer`` with numpy arrays and a method of its class."""
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


def save_pickle(path: Path, pickled: bytes) -> None:
    """A zip checkpoint around a hand-written pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", sys.byteorder)
