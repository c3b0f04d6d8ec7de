"""Labels and overlays of many images as files: the outputs of each input, written complete or not at all."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from .. import visualize
from ..io import images
from ..io.atomic import write_png
from ..io.images import Raster
from ..io.label_tiff import check_label_tiff, write_label_tiff
from .batches import Model
from .predict import Prediction, class_table, label_bands
from .resume import FinishedRows, describe_run
from .settings import Settings
from .sliding import Progress

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".gif", ".jp2", ".avif")
LABELS, OVERLAYS = "labels", "overlays"
OVERLAY_SIDE = 2048
"""Longest side in pixels of the overlay of a large image."""
LabelFormat = Literal["auto", "png", "tiff"]


@dataclass(frozen=True)
class Job:
    """One input and its output files."""

    source: Path
    labels: Path
    """PNG, or TIFF for the format "tiff"; with "auto" a large image has ``tiled`` instead."""
    overlay: Path | None
    format: LabelFormat = "auto"

    @property
    def tiled(self) -> Path:
        """Path of the labels as TIFF."""
        return self.labels.with_suffix(".tif")

    @property
    def finished(self) -> bool:
        """True if every output exists; outputs appear under their names only when complete."""
        labels = self.labels.exists() or (self.format == "auto" and self.tiled.exists())
        return labels and (self.overlay is None or self.overlay.exists())


def plan(inputs: Sequence[Path], out: Path, overlay: bool = True, format: LabelFormat = "auto") -> list[Job]:
    """List the images in files and folders, and their outputs ``out/labels/*.png`` or ``*.tif`` and ``out/overlays``.

    Folders are walked for files of ``IMAGE_SUFFIXES``, except hidden ones and those in the two output folders. Outputs
    keep the tree below the deepest folder that all inputs share, so that inputs of one name from several folders do
    not collide. In a folder where two names differ only in their suffix, outputs keep the suffix: ``x.jpg.png`` and
    ``x.tif.png``.

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

    stems = Counter(source.with_suffix("") for source in sources)
    ambiguous = {stem.parent for stem, count in stems.items() if count > 1}
    jobs = []
    for source in sources:
        name = (source.name if source.parent in ambiguous else source.stem) + ".png"
        place = source.parent.relative_to(root) / name
        labels = place.with_suffix(".tif") if format == "tiff" else place
        jobs.append(Job(source, out / LABELS / labels, out / OVERLAYS / place if overlay else None, format))
    taken = set(sources)
    if overwritten := [str(path) for job in jobs for path in (job.labels, job.tiled, job.overlay) if path in taken]:
        raise ValueError(f"the output {min(overwritten)} is itself an input; choose another output folder")
    return jobs


def make_writable(out: Path, overlay: bool = True) -> None:
    """Make the output folders and try to write into them.

    Raises:
        OSError: a folder cannot be made or written, naming it.
    """
    for name in (LABELS, OVERLAYS) if overlay else (LABELS,):
        folder = out / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise OSError(f"output folder {out} cannot be written: {error.strerror or error}") from error


def in_memory(job: Job, raster: Raster) -> bool:
    """Return whether the labels of an open image are computed in memory, not by rows on disk."""
    return job.format != "tiff" and raster.height * raster.width <= images.LARGE_PIXELS


def write_outputs(job: Job, prediction: Prediction) -> None:
    """Write the overlay, if it is wanted, and then the labels.

    Raises:
        OSError, ValueError: an output cannot be written; nothing half-written stays.
    """
    if job.overlay is not None:
        write_png(prediction.overlay(), job.overlay)
    write_png(prediction.label_image(), job.labels)


def run_by_rows(
    model: Model,
    job: Job,
    raster: Raster,
    settings: Settings,
    name: str,
    resume: bool,
    progress: Progress | None,
) -> str | None:
    """Segment an open image that is not ``in_memory`` and write its outputs, the labels last.

    Images above ``LARGE_PIXELS``, and all where the format is "tiff", need not fit into memory: their labels go to
    disk a band of rows at a time, and with ``resume`` an interrupted run continues below the finished rows. At the end
    they become tiled TIFF, or PNG, which needs all of them in memory, a byte or two a pixel. Overlays of these images
    are reduced to ``OVERLAY_SIDE``.

    Args:
        name: of the model, for the description of an interrupted run.
        progress: as in ``slide_rows``; not called where a single window covers the image.

    Returns:
        The reason why an interrupted run could not be continued, or None.

    Raises:
        OSError, ValueError: the image cannot be used or an output cannot be written; nothing half-written stays but
            the rows of an interrupted run.
    """
    labels = job.tiled if job.format == "auto" else job.labels
    size, num_classes = (raster.height, raster.width), model.config.num_classes
    if labels.suffix == ".tif":
        check_label_tiff(num_classes)
    names, palette = class_table(model.config)
    dtype = np.dtype(np.uint8 if num_classes <= 256 else np.uint16 if num_classes <= 65536 else np.int32)
    rows = FinishedRows(labels, describe_run(model, name, settings, job.source, size), size, dtype, resume)
    if rows.count < size[0]:
        for _, band in label_bands(model, raster, settings, rows.count, progress):
            rows.append(band)
    if job.overlay is not None:
        write_png(visualize.reduced_overlay(raster, rows.read, palette, OVERLAY_SIDE), job.overlay)
    if labels.suffix == ".tif":
        write_label_tiff(labels, rows.bands(), size, palette, names)
    else:
        write_png(visualize.label_image(rows.read(0, size[0]), palette), labels)
    rows.remove()
    return rows.restarted


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
