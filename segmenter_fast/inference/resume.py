"""Labels of an image on their way to a file, on disk row by row, so that an interrupted run can go on.

Two files beside the output: ``.NAME.rows`` with the finished rows as they are, and ``.NAME.json`` which says whose
they are. Rows are appended and synced a band at a time; how many are whole is a matter of the file's length.
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

from ..config import Pair
from ..io.atomic import atomic_path
from .settings import Settings

Identity = dict[str, Any]


def identity(model: nn.Module, name: str, settings: Settings, source: Path, size: Pair) -> Identity:
    """What labels depend on: weights, options and the image file, in values that JSON holds.

    Raises:
        OSError: the image file is not there.
    """
    status = os.stat(source)
    return {
        "model": {"name": name, "weights": _digest(model)},
        "options": asdict(settings) | {"scales": list(settings.scales)},
        "image": {"name": source.name, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "size": list(size)},
    }


class Spool:
    """The finished rows ``(h, W)`` of one label map."""

    def __init__(self, output: Path, identity: Identity, size: Pair, dtype: np.dtype, resume: bool) -> None:
        """Opens the rows of ``output``, or begins anew where ``resume`` is not set or they are another run's.

        ``restarted`` says why rows that were there are not used, None where they are or where there were none.

        Raises:
            OSError: the files cannot be written.
        """
        self._rows, self._about = files(output)
        self._identity, self.size, self.dtype = identity, size, np.dtype(dtype)
        self._row_bytes = size[1] * self.dtype.itemsize
        self.restarted = self._why_not() if resume else None
        output.parent.mkdir(parents=True, exist_ok=True)
        if not resume or self.restarted or not (self._rows.exists() and self._about.exists()):
            self.remove()
            with atomic_path(self._about) as temporary:
                temporary.write_text(json.dumps(identity, indent=1) + "\n")
            self._rows.touch()
        self.finished = min(self._rows.stat().st_size // self._row_bytes, size[0])
        os.truncate(self._rows, self.finished * self._row_bytes)

    def append(self, band: np.ndarray) -> None:
        """Adds ``(h, W)`` labels below the finished rows; they are on disk when this returns."""
        with open(self._rows, "r+b") as file:
            file.seek(self.finished * self._row_bytes)
            file.write(np.ascontiguousarray(band, self.dtype).data)
            file.flush()
            os.fsync(file.fileno())
        self.finished += len(band)

    def read(self, top: int, bottom: int) -> np.ndarray:
        """``(bottom - top, W)`` finished rows."""
        with open(self._rows, "rb") as file:
            file.seek(top * self._row_bytes)
            data = file.read((bottom - top) * self._row_bytes)
        return np.frombuffer(data, self.dtype).reshape(bottom - top, self.size[1])

    def bands(self, height: int = 512) -> Iterator[np.ndarray]:
        """All finished rows, ``height`` of them at a time."""
        return (self.read(top, min(top + height, self.finished)) for top in range(0, self.finished, height))

    def remove(self) -> None:
        """Deletes the files."""
        self._rows.unlink(missing_ok=True)
        self._about.unlink(missing_ok=True)

    def _why_not(self) -> str | None:
        if not self._about.exists():
            return None
        try:
            found = json.loads(self._about.read_text())
        except ValueError:
            return "the note on the interrupted run cannot be read"
        known = found if isinstance(found, dict) else {}
        other = [part for part, value in self._identity.items() if known.get(part) != value]
        return f"not those of the interrupted run: {', '.join(other)}" if other else None


def files(output: Path) -> tuple[Path, Path]:
    """Where the finished rows of ``output`` lie, and the note on them."""
    return output.with_name(f".{output.name}.rows"), output.with_name(f".{output.name}.json")


def _digest(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
