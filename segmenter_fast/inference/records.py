"""Records in output files: the input, the model and the options that they were made of.

A PNG has a text chunk ``segmenter-fast``, a TIFF the tag Software, with a JSON object: ``input``, a digest of the
path of the image; ``image``, its file; ``model`` and ``options`` of ``describe_run``. So a file of somebody else, or
one for another input, is never replaced, and one of another model is never taken for finished.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..io.atomic import RECORD
from .batches import side_threads
from .folders import Job
from .resume import differing, record_of

_PNG, _TIFF = b"\x89PNG\r\n\x1a\n", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
Reasons = list[tuple[str, str]]
"""Inputs, and why their outputs are made again."""


def read_record(path: Path) -> tuple[dict[str, Any] | None, bool]:
    """Return the record of an output, None without one, and whether the file is complete.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(len(_PNG))
        text, complete = _read_png(file) if start == _PNG else ("", False)
    if start[:4] in _TIFF:
        text, complete = _read_tiff(path)
    try:
        record = json.loads(text)
    except ValueError:
        record = None
    return record if isinstance(record, dict) else None, complete


def unfinished(
    jobs: Sequence[Job], run: dict[str, Any], resume: bool, overwrite: bool
) -> tuple[list[Job], Reasons, Reasons]:
    """Return the jobs to do: all, or with ``resume`` those without complete outputs of this run and of these images.

    Args:
        run: as ``describe_run``.
        overwrite: allow that files are replaced which were not written for the same input.

    Returns:
        The jobs; the inputs whose outputs are there, but of another model, with other options, or damaged, and why;
        with ``resume`` the inputs that are left out, as a file in the place of their output is cut off and has lost
        its record, if it had one.

    Raises:
        FileExistsError: another file is in the place of an output, and ``overwrite`` is False.
    """
    with ThreadPoolExecutor(side_threads()) as pool:
        found = list(pool.map(lambda job: _examine(job, run), jobs))
    examined = list(zip(jobs, found, strict=True))
    cut = {job: paths[0] for job, (paths, _) in examined if resume and not overwrite and _are_cut(paths)}
    foreign = [path for job, (paths, _) in examined if job not in cut for path in paths]
    if foreign and not overwrite:
        more = f" and {len(foreign) - 1} more files are" if len(foreign) > 1 else " is"
        raise FileExistsError(
            f"{foreign[0]}{more} in the place of outputs, but no record in them says that segmenter-fast wrote them "
            "for these inputs (earlier versions wrote none); choose another --out, or replace them by --overwrite"
        )
    if not resume:
        return list(jobs), [], []
    hint = "is cut off, and no record in it says who wrote it; delete it, or replace it by --overwrite"
    left = {job: reason for job, (_, reason) in examined if reason is not None and job not in cut}
    return (
        list(left),
        [(str(job.source), reason) for job, reason in left.items() if reason],
        [(str(job.source), f"{path} {hint}") for job, path in cut.items()],
    )


def _examine(job: Job, run: dict[str, Any]) -> tuple[list[Path], str | None]:
    """Return the files in the way, and why the job is to be done: None if it is finished, "" without outputs."""
    drawn = [path for path in (job.overlay, job.tokens) if path]
    paths = [job.labels, *([job.tiled] if job.format == "auto" else []), *drawn]
    paths = [path for path in dict.fromkeys(paths) if path.is_symlink() or (path.exists() and path.stat().st_size)]
    if not paths:
        return [], ""
    try:
        wanted = record_of(run, job.source)
    except OSError:  # a broken link, which fails in its turn
        return paths, ""
    foreign, reasons = list[Path](), dict[Path, str | None]()
    for path in paths:
        record, complete = read_record(path) if path.is_file() else (None, False)
        same = record is not None and (record.get("input") == wanted["input"] or record.get("image") == wanted["image"])
        if not same:
            foreign.append(path)
        other = differing(record or {}, {name: wanted.get(name) for name in ("dtype", "model", "options", "image")})
        reasons[path] = (
            "its output is damaged" if same and not complete else f"its output had {other}" if other else None
        )
    labels = [reasons[path] for path in paths if path not in drawn]
    reason = (None if None in labels else labels[0]) if labels else ""
    for path in drawn:
        reason = reasons.get(path, "") if reason is None else reason
    return foreign, reason


def _are_cut(paths: Sequence[Path]) -> bool:
    """Return whether files begin as outputs do, but end before their record and their pixels do; False for none."""
    starts = [path.open("rb").read(len(_PNG)) if path.is_file() else b"" for path in paths]
    begun = [start[:4] in _TIFF or (bool(start) and _PNG.startswith(start)) for start in starts]
    return bool(paths) and all(begun) and all(read_record(path) == (None, False) for path in paths)


def _read_png(file: Any) -> tuple[str, bool]:
    """Return the text of the record, and whether all chunks are whole; ``file`` stands behind the signature."""
    text = ""
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        body, check = file.read(length), file.read(4)
        if len(body) < length or check != struct.pack(">I", zlib.crc32(body, zlib.crc32(kind))):
            return text, False
        if kind == b"tEXt" and body.startswith(RECORD.encode() + b"\0"):
            text = body.split(b"\0", 1)[1].decode("latin-1")
        if kind == b"IEND":
            return text, True
    return text, False


def _read_tiff(path: Path) -> tuple[str, bool]:
    """Return the text of the record, and whether the file reaches to the end of the last tile."""
    try:
        import tifffile
    except ImportError:  # no TIFF was written here
        return "", False
    try:
        with tifffile.TiffFile(path) as tiff:
            page: Any = tiff.pages[0]
            ends = [at + count for at, count in zip(page.dataoffsets, page.databytecounts, strict=True)]
            return str(page.software).removeprefix(f"{RECORD} "), max(ends, default=0) <= path.stat().st_size
    except (tifffile.TiffFileError, ValueError, IndexError, TypeError, struct.error):
        return "", False
