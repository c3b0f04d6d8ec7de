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

LOCK, RECORD = ".lock", ".written"
SAVING = ".saving-"
"""Start of the names of temporary folders, see ``io.atomic``; a killed process may leave some."""


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
    """Record files that are about to be written, relative to the run's folder, which is made.

    Raises:
        OSError: the record cannot be written.
    """
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
    patterns, found, folders = recorded(run), list[Path](), list[Path]()
    for path in (run / name for name in names):
        if not path.is_dir():
            found += [path] if os.path.lexists(path) else []
            continue
        for folder, inner, leaves in os.walk(path):
            folders.append(Path(folder))
            links = [name for name in inner if Path(folder, name).is_symlink()]
            found += [Path(folder, name) for name in (*leaves, *links)]
    places = [path.relative_to(run) for path in found]
    others = [
        place.as_posix()
        for place in places
        if not any(fnmatchcase(place.as_posix(), pattern) for pattern in patterns)
        and not any(part.startswith(SAVING) for part in place.parts)
    ]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise FileExistsError(
            f"{run} holds {', '.join(sorted(others)[:3])}{more}, which no run is recorded to have written; nothing was "
            "removed: move or delete that yourself, or choose another --out"
        )
    for path in found:
        path.unlink()
    for folder_path in reversed(folders):
        if not folder_path.is_symlink():
            folder_path.rmdir()
    if (run / RECORD).exists():
        (run / RECORD).unlink()
