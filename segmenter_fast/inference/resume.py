"""Finished rows of a label map on disk, so that an interrupted run can be resumed.

Two files beside the output: ``.NAME.rows`` holds the finished rows as raw bytes, ``.NAME.json`` describes their run.
Rows are appended and synced a band at a time. The length of the file tells how many of them are complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..config import Pair, SegmenterConfig
from ..io.atomic import write_json
from .settings import Settings


def describe_run(model: nn.Module, settings: Settings) -> dict[str, Any]:
    """Return all that labels depend on beside the image: weights, configuration, options; in values that JSON holds.

    Fields of the configuration that have their default are left out, so that later versions may add some.
    """
    digest = hashlib.sha256()  # over names, dtypes, shapes and bytes of all tensors
    for key, tensor in model.state_dict().items():
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    config = getattr(model, "config", SegmenterConfig()).to_dict()
    default = SegmenterConfig().to_dict()
    set_fields = {name: value for name, value in config.items() if value != default.get(name)}
    fields = hashlib.sha256(json.dumps(set_fields, sort_keys=True).encode())
    options = json.loads(json.dumps(asdict(settings)))
    if settings.channels.colours:
        del options["channels"]
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in model.parameters() if tensor.is_floating_point()}
    described = {"weights": digest.hexdigest(), "configuration": fields.hexdigest()}
    return {"dtype": ", ".join(sorted(dtypes)), "model": described, "options": options}


def describe_image(source: Path) -> dict[str, Any]:
    """Return name, bytes and time of an image file.

    Raises:
        OSError: it does not exist.
    """
    status = os.stat(source)
    return {"name": source.name, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def record_of(run: dict[str, Any], source: Path) -> dict[str, Any]:
    """Return the record of the outputs of an image.

    Raises:
        OSError: the image file does not exist.
    """
    options = {name: value for name, value in run["options"].items() if name != "batch_size"}
    digest = hashlib.sha256(os.fsencode(os.path.abspath(source))).hexdigest()
    return {"input": digest, "image": describe_image(source), **run, "options": options}


class FinishedRows:
    """The finished rows ``(h, W)`` of one label map, on disk."""

    def __init__(self, output: Path, run: dict[str, Any], size: Pair, dtype: np.dtype, resume: bool) -> None:
        """Open the rows of ``output``; start with none unless ``resume`` is set and they are of the same run.

        ``restarted`` is the reason why rows that are there are not used, None where they are or where there are none.

        Raises:
            OSError: the files cannot be written.
        """
        self.size, self.dtype = size, np.dtype(dtype)
        self._rows, self._description = resume_files(output)
        self._row_bytes = size[1] * self.dtype.itemsize
        self.restarted = _difference(self._description, run) if resume and self._description.exists() else None
        if not resume or self.restarted or not (self._rows.exists() and self._description.exists()):
            self.remove()
            write_json(self._description, run, indent=1)
            self._rows.touch()
        self.count = min(self._rows.stat().st_size // self._row_bytes, size[0])
        os.truncate(self._rows, self.count * self._row_bytes)

    def append(self, band: np.ndarray) -> None:
        """Add ``(h, W)`` labels below the finished rows; they are on disk when this returns."""
        with open(self._rows, "r+b") as file:
            file.seek(self.count * self._row_bytes)
            file.write(np.ascontiguousarray(band, self.dtype).data)
            file.flush()
            os.fsync(file.fileno())
        self.count += len(band)

    def read(self, top: int, bottom: int) -> np.ndarray:
        """Return ``(bottom - top, W)`` finished rows."""
        with open(self._rows, "rb") as file:
            file.seek(top * self._row_bytes)
            data = file.read((bottom - top) * self._row_bytes)
        return np.frombuffer(data, self.dtype).reshape(bottom - top, self.size[1])

    def bands(self, height: int = 512) -> Iterator[np.ndarray]:
        """Return all finished rows, ``height`` of them at a time."""
        return (self.read(top, min(top + height, self.count)) for top in range(0, self.count, height))

    def remove(self) -> None:
        """Delete the files."""
        self._rows.unlink(missing_ok=True)
        self._description.unlink(missing_ok=True)


def resume_files(output: Path) -> tuple[Path, Path]:
    """Return the paths of the finished rows of ``output`` and of the description of their run."""
    return output.with_name(f".{output.name}.rows"), output.with_name(f".{output.name}.json")


def differing(found: dict[str, Any], run: dict[str, Any]) -> str:
    """Name the parts of a run that a description has otherwise; empty for none.

    Another dtype changes the digest of the model, and is named instead of it where both dtypes are known.
    """
    other = [part for part, value in run.items() if found.get(part) != value and part != "dtype"]
    if found.get("dtype") and run.get("dtype") not in (None, found["dtype"]):
        other = ["dtype" if part == "model" else part for part in other]
    return " and ".join("other options" if part == "options" else f"another {part}" for part in other)


def _difference(description: Path, run: dict[str, Any]) -> str | None:
    """Return what differs between the run of the rows on disk and this one, None for nothing."""
    try:
        found = json.loads(description.read_text())
    except ValueError:
        return "the description of the interrupted run cannot be read"
    other = differing(found if isinstance(found, dict) else {}, run)
    return f"the interrupted run had {other}" if other else None
