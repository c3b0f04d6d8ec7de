"""Writing files that appear complete or not at all, also after a crash or a loss of power."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

RECORD = "segmenter-fast"
"""Name of the text in an output file that says what it was made of; see ``inference.records``."""
SAVING = ".saving-"
"""Start of the names of temporary folders; a killed process may leave some."""


@contextmanager
def atomic_files(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder inside ``folder``, which is made; its content replaces that of the same names.

    Files are renamed after the block, when all of them are on disk, and have the permissions that the umask leaves. If
    the block raises, or the disk is full, the earlier files stay as they were and the temporary folder is deleted.

    Raises:
        OSError: the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        opened = tempfile.TemporaryDirectory(prefix=SAVING, dir=folder)
    except OSError as error:  # it names the temporary folder
        raise type(error)(error.errno, f"{error.strerror}, nothing can be written there", str(folder)) from error
    with opened as name:
        temporary = Path(name)
        probe = temporary / "mode"
        probe.touch()
        mode = probe.stat().st_mode
        probe.unlink()
        try:
            yield temporary
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:  # of a library
                raise type(error)(error.errno, error.strerror, str(folder)) from error
            raise
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(mode)  # some libraries write for the owner alone
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        for path in sorted(temporary.iterdir()):
            os.replace(path, folder / path.name)
    if os.name == "posix":  # the new names are on disk, too; other systems cannot open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """``atomic_files`` for a single file, or a new folder: yield the temporary path that becomes ``path``."""
    with atomic_files(path.parent) as temporary:
        yield temporary / path.name


def write_json(path: Path, content: dict[str, Any], **options: Any) -> None:
    """Write a mapping as JSON; ``options`` are those of ``json.dumps``. See ``atomic_files``."""
    text = json.dumps(content, **options) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_png(image: Image.Image, path: Path, record: dict[str, Any] | None = None) -> None:
    """Write an image as PNG, with a record in a text chunk; see ``atomic_files``."""
    text = PngInfo()
    if record is not None:
        text.add_text(RECORD, json.dumps(record))
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=text)
