"""Many images to files: which input is written where, and one image's outputs, whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .. import io as rasters
from ..io.atomic import write_png
from ..io.label_tiff import check_label_tiff
from ..segmenter import Segmenter
from .bands import Progress
from .by_rows import run_by_rows
from .predict import predict_raster
from .settings import Settings

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".gif", ".jp2", ".avif")
LABELS, OVERLAYS = "labels", "overlays"
LabelFormat = Literal["auto", "png", "tiff"]


@dataclass(frozen=True)
class Job:
    """One input and the files it becomes."""

    source: Path
    labels: Path
    """PNG, or TIFF where that is the format; with "auto" a large image has ``tiled`` instead."""
    overlay: Path | None
    format: LabelFormat = "auto"

    @property
    def tiled(self) -> Path:
        """The labels as TIFF."""
        return self.labels.with_suffix(".tif")

    @property
    def finished(self) -> bool:
        """Whether every output is there; outputs appear under their names only when complete."""
        labels = self.labels.exists() or (self.format == "auto" and self.tiled.exists())
        return labels and (self.overlay is None or self.overlay.exists())


def plan(inputs: Sequence[Path], out: Path, overlay: bool = True, format: LabelFormat = "auto") -> list[Job]:
    """The images of files and folders, and their outputs ``out/labels/*.png`` (or ``.tif``) and ``out/overlays/*.png``.

    Folders are walked; files in them count by ``IMAGE_SUFFIXES``, hidden ones and what is in the two output folders
    do not. Outputs keep the tree below the deepest folder that all inputs share, so that inputs of one name from
    several folders do not meet. In a folder where two names differ only in their suffix, outputs keep the suffix:
    ``x.jpg.png`` and ``x.tif.png``.

    Raises:
        FileNotFoundError: an input that does not exist.
        ValueError: no image in the inputs, inputs without a common folder, an output that is itself an input, or TIFF
            without tifffile.
    """
    if format == "tiff":
        check_label_tiff()
    absolute = [Path(os.path.abspath(path)) for path in inputs]
    out = Path(os.path.abspath(out))
    sources = list(dict.fromkeys(source for path in absolute for source in _images(path, out)))
    if not sources:
        given = ", ".join(map(str, inputs)) or "no input"
        raise ValueError(f"no images in {given}; known suffixes are {' '.join(IMAGE_SUFFIXES)}")
    root = os.path.commonpath([path if path.is_dir() else path.parent for path in absolute])

    by_folder: dict[Path, list[Path]] = defaultdict(list)
    for source in sources:
        by_folder[source.parent].append(source)
    ambiguous = {folder for folder, members in by_folder.items() if len({path.stem for path in members}) < len(members)}

    jobs = []
    for source in sources:
        name = (source.name if source.parent in ambiguous else source.stem) + ".png"
        place = source.parent.relative_to(root) / name
        labels = place.with_suffix(".tif") if format == "tiff" else place
        jobs.append(Job(source, out / LABELS / labels, out / OVERLAYS / place if overlay else None, format))
    if overwritten := {path for job in jobs for path in (job.labels, job.tiled, job.overlay)} & set(sources):
        raise ValueError(f"the output {min(map(str, overwritten))} is itself an input; choose another output folder")
    return jobs


def make_writable(out: Path, overlay: bool = True) -> None:
    """Makes the output folders, and tries to write into them.

    Raises:
        OSError: that cannot be done, naming the folder.
    """
    for name in (LABELS, OVERLAYS) if overlay else (LABELS,):
        folder = out / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise OSError(f"output folder {out} cannot be written: {error.strerror or error}") from error


def run(
    model: Segmenter,
    job: Job,
    settings: Settings,
    *,
    name: str = "",
    resume: bool = False,
    progress: Progress | None = None,
) -> str | None:
    """Segments one image and writes its outputs, the labels last.

    Images above ``rasters.LARGE_PIXELS``, and all where the format is "tiff", go through ``run_by_rows``: finished rows
    are kept on disk, and with ``resume`` a run that was interrupted goes on below them.

    Args:
        name: of the model, for the note on an interrupted run.
        progress: called with the windows done and the windows of the image; not where a single window is all.

    Returns:
        Why an interrupted run could not go on, or None.

    Raises:
        OSError, ValueError: the image cannot be used or an output cannot be written; nothing half-written stays but
            the rows of an interrupted run.
    """
    raster = rasters.open_raster(job.source)
    large = raster.height * raster.width > rasters.LARGE_PIXELS
    if large or job.format == "tiff":
        labels = job.tiled if job.format == "auto" else job.labels
        return run_by_rows(model, raster, job.source, labels, job.overlay, settings, name, resume, progress)
    prediction = predict_raster(model, raster, settings, progress)
    if job.overlay is not None:
        write_png(prediction.overlay(), job.overlay)
    write_png(prediction.label_image(), job.labels)
    return None


def _images(path: Path, out: Path) -> Iterator[Path]:
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"input {path} does not exist")
        yield path
        return
    for folder, subfolders, names in os.walk(path, onerror=_reraise):
        here = Path(folder)
        skipped = {LABELS, OVERLAYS} if here == out else set()
        subfolders[:] = sorted(name for name in subfolders if name not in skipped)
        yield from (
            here / name for name in sorted(names) if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        )


def _reraise(error: OSError) -> None:
    raise error
