"""Checkpoints are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder, whose files replace those of ``folder`` once the block has ended without an error.

    They are renamed when all are on disk, so that a save that fails half-way leaves an earlier checkpoint as it was.

    Raises:
        OSError: the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as name:
        beside = Path(name)
        yield beside
        files = sorted(beside.iterdir())
        for file in files:
            with file.open("rb") as written:
                os.fsync(written.fileno())
        for file in files:
            os.replace(file, folder / file.name)
    _sync_names(folder)


def _sync_names(folder: Path) -> None:
    """Lets new names in a folder survive a loss of power, where the system can open folders."""
    if os.name == "posix":
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
