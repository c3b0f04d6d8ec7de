"""The owner of a run's folder: the lock of the process that trains there, and the record of the files that runs wrote.

The record, ``.written``, has a path or a pattern of paths a line. Files are recorded before they are written. So a file
among those of a run that is not in the record was written by somebody else.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from filelock import FileLock, Timeout

from ..io.atomic import SAVING

LOCK, RECORD = ".lock", ".written"


def lock(run: Path) -> FileLock:
    """Make the run's folder and lock it for this process; the lock goes with the process, however it ends.

    Raises:
        OSError: another training writes there, or the folder cannot be made.
    """
    held = FileLock(run / LOCK, timeout=0)
    try:
        run.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except Timeout:
        raise OSError(f"another training writes to {run}: wait for its end, or choose another --out") from None
    except OSError as error:
        raise OSError(f"the run's folder {run} cannot be written: {error.strerror or error}") from error
    return held


def record(run: Path, *patterns: str) -> None:
    """Record files that are about to be written, by their paths in the run's folder, which is made."""
    if new := [pattern for pattern in patterns if pattern not in recorded(run)]:
        run.mkdir(parents=True, exist_ok=True)
        with (run / RECORD).open("a", encoding="utf-8") as file:
            file.writelines(f"{pattern}\n" for pattern in new)


def recorded(run: Path) -> list[str]:
    """Return what was recorded; nothing where there is no record."""
    path = run / RECORD
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def remove(run: Path, names: Iterable[str]) -> None:
    """Remove what a run wrote under these names in its folder, and the record; leave everything else.

    Raises:
        FileExistsError: there are files that are not in the record; then nothing is removed. Names some.
        OSError: a file cannot be removed.
    """
    found = [path for name in names for path in (run / name, *(run / name).rglob("*")) if os.path.lexists(path)]
    # a link in the place of a folder of the run is followed, and stays
    files = [path for path in found if not path.is_dir() or (path.is_symlink() and path.parent != run)]
    patterns = [*recorded(run), f"*/{SAVING}*"]
    places = sorted(path.relative_to(run).as_posix() for path in files)
    others = [place for place in places if not any(fnmatchcase(place, pattern) for pattern in patterns)]
    if others:
        named = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise FileExistsError(
            f"{run} holds {named}, which no run is recorded to have written; nothing was removed: move or delete that "
            "yourself, or choose another --out"
        )
    for path in files:
        path.unlink()
    for folder in reversed([path for path in found if path.is_dir() and not path.is_symlink()]):
        folder.rmdir()
    if (run / RECORD).exists():
        (run / RECORD).unlink()
