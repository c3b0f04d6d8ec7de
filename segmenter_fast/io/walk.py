"""Files below a folder, which of them are images, and errors of the system about files."""

from __future__ import annotations

import importlib.util
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

HEIF_SUFFIXES = (".heic", ".heif")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".gif", ".jp2", ".avif")
IMAGE_SUFFIXES = _SUFFIXES + (HEIF_SUFFIXES if importlib.util.find_spec("pillow_heif") else ())

Ignored = dict[str, list[Path]]
"""Files that are not read, by the reason."""


def files_below(folder: Path, skip: Collection[Path] = ()) -> Iterator[Path]:
    """Yield all that is no folder below one, in order, without hidden files and folders, and those to skip.

    Links to folders are followed, but not back into a folder on the way to them.

    Raises:
        OSError: a folder cannot be listed.
    """
    yield from _walk(folder, skip, ())


def _walk(folder: Path, skip: Collection[Path], above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    status = os.stat(folder)
    if (here := (status.st_dev, status.st_ino)) in above:
        return
    with os.scandir(folder) as listed:
        entries = sorted((entry for entry in listed if not entry.name.startswith(".")), key=lambda entry: entry.name)
    folders = [entry.is_dir() for entry in entries]
    yield from (folder / entry.name for entry, is_folder in zip(entries, folders, strict=True) if not is_folder)
    for entry, is_folder in zip(entries, folders, strict=True):
        if is_folder and folder / entry.name not in skip:
            yield from _walk(folder / entry.name, skip, (*above, here))


def sort_out(paths: Iterable[Path], ends: tuple[str, ...] | None = None) -> tuple[list[Path], Ignored]:
    """Return the files whose names end so, in any case, by default as images do, and the others by the reason."""
    ends = IMAGE_SUFFIXES if ends is None else tuple(end.lower() for end in ends)
    taken, ignored = list[Path](), defaultdict[str, list[Path]](list)
    for path in paths:
        suffix = path.suffix.lower()
        if not path.name.lower().endswith(ends):
            reason = f"{suffix}, no known image" if suffix else "no suffix"
            if suffix in IMAGE_SUFFIXES:
                reason = f"no {' or '.join(ends)}"
            elif suffix in HEIF_SUFFIXES:
                reason = f"{suffix}, needs pip install pillow-heif"
            ignored[reason].append(path)
        else:
            taken.append(path)
    return taken, dict(ignored)


def describe_ignored(ignored: Ignored) -> str:
    """Return one line: how many files are not read, and why, with the name of one for each reason."""
    parts = [f"{len(paths)} ({reason}: {paths[0].name})" for reason, paths in sorted(ignored.items())]
    count = sum(map(len, ignored.values()))
    return f"{count} file{'s are' if count > 1 else ' is'} not read: {', '.join(parts)}"


def reason_of(error: Exception) -> str:
    """Return the message of an error; of one of the system: its file, and what is wrong with it."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror[0].lower()}{error.strerror[1:]}"
    return str(error)
