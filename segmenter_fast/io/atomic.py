"""Writing files that appear complete or not at all, also after a crash or a loss of power."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

RECORD = "segmenter-fast"
"""Name of the text in an output file that says what it was made of; see ``inference.records``."""
SAVING = ".saving-"
"""Start of the names of temporary folders; a killed process may leave some, see ``remove_left``."""


_YOUNG = 5.0
"""Seconds after which the process that made a temporary folder has locked it."""


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
    with opened as name, _locked(Path(name)):
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
def _locked(folder: Path) -> Iterator[bool]:
    """Lock a folder until the end of the block or of the process; yield False if another process has done so.

    Yields False, too, where the system has no locks of folders.
    """
    with contextlib.ExitStack() as opened:
        try:
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            opened.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except (ImportError, OSError):  # Windows; another process removed or locked it
            locked = False
        yield locked


def remove_left(folder: Path) -> None:
    """Remove the temporary folders, anywhere below a folder, of processes that were killed while they wrote."""
    with contextlib.suppress(OSError):  # others may write and remove there, too
        for left in folder.rglob(f"{SAVING}*"):
            with _locked(left) as unused:
                if unused and time.time() - left.stat().st_mtime > _YOUNG:
                    shutil.rmtree(left, ignore_errors=True)


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
