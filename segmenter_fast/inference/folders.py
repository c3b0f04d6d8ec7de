"""Labels and overlays of many images as files: the outputs of each input, written complete or not at all."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .. import visualize
from ..captions import captioned, legend_of
from ..io import images
from ..io.atomic import remove_left, write_png
from ..io.images import Raster
from ..io.label_tiff import check_label_tiff, write_label_tiff
from ..io.walk import IMAGE_SUFFIXES, Ignored, describe_ignored, files_below, sort_out
from .batches import Model
from .predict import Prediction, check_raster, class_table, label_bands, one_window_size, token_groups
from .resume import FinishedRows, record_of
from .settings import Settings
from .sliding import Progress

LABELS, OVERLAYS, TOKENS = "labels", "overlays", "tokens"
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
    note: str = ""
    """Line in red below the overlay."""
    page: int | None = None
    """Of the input, from 0 on; None: the first, with a warning if there are others."""
    tokens: Path | None = None
    """PNG of the groups of patches that merged, see ``draw_tokens``."""

    @property
    def tiled(self) -> Path:
        """Path of the labels as TIFF."""
        return self.labels.with_suffix(".tif")


def plan(
    inputs: Sequence[Path],
    out: Path,
    overlay: bool = True,
    format: LabelFormat = "auto",
    *,
    root: Path | None = None,
    keep_suffix: bool = False,
    tokens: bool = False,
) -> list[Job]:
    """List the images in files and folders, and their outputs ``out/labels/*.png`` or ``*.tif`` and ``out/overlays``.

    Folders are walked for files of ``IMAGE_SUFFIXES``, see ``files_below``; those in the output folders are left
    out, and a warning counts all others. The name of an output depends on its own input alone: the path below the
    outermost folder that was given and holds it, or the name of a file that was given itself, without the suffix.

    Args:
        root: folder that inputs lie in; outputs keep the path below it.
        keep_suffix: keep the input's suffix, too: ``x.jpg.png``.
        tokens: write ``out/tokens``, too.

    Raises:
        FileNotFoundError: an input that does not exist.
        ValueError: no image in the inputs, two with one output, one outside of ``root``, an output that is itself an
            input, or TIFF without tifffile.
    """
    if format == "tiff":
        check_label_tiff()
    out = _absolute(out)
    found: dict[Path, Path] = {}  # image -> the folder below which outputs keep its path
    ignored: Ignored = {}
    for path in map(_absolute, inputs):
        for source in _images(path, out, ignored):
            base = path if path.is_dir() else path.parent
            found[source] = min(found.get(source, base), base, key=lambda folder: len(folder.parts))
    if not found:
        given = ", ".join(map(str, inputs)) or "no input"
        rest = f"; {describe_ignored(ignored)}" if ignored else ""
        raise ValueError(f"no images in {given}; known suffixes are {' '.join(IMAGE_SUFFIXES)}{rest}")
    if ignored:
        warnings.warn(describe_ignored(ignored), stacklevel=2)
    jobs: dict[Path, Job] = {}
    drawn = ((OVERLAYS, overlay), (TOKENS, tokens))
    for source, base in found.items():
        base = base if root is None else _absolute(root)
        if not source.is_relative_to(base):
            raise ValueError(f"the root must hold all inputs, but {source} is not below {base}")
        place = source.relative_to(base)
        place = place.with_name(f"{source.name if keep_suffix else source.stem}.png")
        if other := jobs.get(place):
            remedy = "give a folder that holds both as --root" if other.source.name == source.name else "--keep-suffix"
            raise ValueError(
                f"{other.source} and {source} would have one output, {out / LABELS / place}: {remedy} gives them names "
                "of their own"
            )
        labels = out / LABELS / (place.with_suffix(".tif") if format == "tiff" else place)
        overlays, groups = (out / name / place if wanted else None for name, wanted in drawn)
        jobs[place] = Job(source, labels, overlays, format, tokens=groups)
    outputs = (path for job in jobs.values() for path in (job.labels, job.tiled, job.overlay, job.tokens))
    if overwritten := [str(path) for path in outputs if path in found]:
        raise ValueError(f"the output {min(overwritten)} is itself an input; choose another output folder")
    return list(jobs.values())


def make_writable(out: Path, overlay: bool = True, tokens: bool = False) -> None:
    """Make the output folders, try to write into them, and remove what killed processes left there half-written.

    Raises:
        OSError: a folder cannot be made or written, naming it.
    """
    for name in (LABELS, *[OVERLAYS] * overlay, *[TOKENS] * tokens):
        folder = out / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                remove_left(folder)
        except OSError as error:
            raise OSError(f"output folder {out} cannot be written: {error.strerror or error}") from error


def in_memory(job: Job, raster: Raster) -> bool:
    """Return whether the labels of an open image are computed in memory, not by rows on disk."""
    return job.format != "tiff" and raster.height * raster.width <= images.LARGE_PIXELS


def write_outputs(job: Job, prediction: Prediction, run: dict[str, Any]) -> None:
    """Write the overlay, if it is wanted, and then the labels, with records of the run, which ``describe_run`` gives.

    Raises:
        OSError, ValueError: an output cannot be written; nothing half-written stays.
    """
    record = record_of(run, job.source)
    if job.overlay is not None:
        write_png(prediction.captioned_overlay(job.note), job.overlay, record)
    write_png(prediction.label_image(), job.labels, record)


def draw_tokens(model: Model, job: Job, raster: Raster, settings: Settings, run: dict[str, Any]) -> None:
    """Draw the groups of patches of an open image, where they are wanted; the model runs once more for them.

    Warns where one window does not cover the image as it is.

    Raises:
        OSError, ValueError: the file cannot be written.
    """
    if job.tokens is None:
        return
    if one_window_size(model, raster, settings) is None:
        warnings.warn(
            f"no groups of tokens are drawn of {job.source}: {raster.width} x {raster.height} pixels are enlarged or "
            f"take several windows of {settings.window}",
            stacklevel=2,
        )
        return
    pixels = visualize.displayed(raster.read(0, raster.height))
    picture = visualize.draw_groups(pixels, token_groups(model, raster), model.config.patch_size)
    write_png(picture, job.tokens, record_of(run, job.source))


def run_by_rows(
    model: Model,
    job: Job,
    raster: Raster,
    settings: Settings,
    run: dict[str, Any],
    resume: bool,
    progress: Progress | None,
) -> str | None:
    """Segment an open image that is not ``in_memory`` and write its outputs, the labels last.

    Images above ``LARGE_PIXELS``, and all where the format is "tiff", need not fit into memory: their labels go to
    disk a band of rows at a time, and with ``resume`` an interrupted run continues below the finished rows. At the end
    they become tiled TIFF, or PNG, which needs all of them in memory, a byte or two a pixel. Overlays of these images
    are reduced to ``OVERLAY_SIDE``.

    Args:
        run: of ``describe_run``.
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
    check_raster(model, raster, settings)
    record = record_of(run, job.source)
    image = {**record["image"], "size": list(size)}
    rows = FinishedRows(labels, {**run, "image": image}, size, dtype, resume)
    if rows.count < size[0]:
        for _, band in label_bands(model, raster, settings, rows.count, progress):
            rows.append(band)
    if job.overlay is not None:
        counts = np.zeros(num_classes, np.int64)

        def read(top: int, bottom: int) -> np.ndarray:
            band = rows.read(top, bottom)
            counts[:] += np.bincount(band.ravel(), minlength=num_classes)
            return band

        picture = visualize.reduced_overlay(raster, read, palette, OVERLAY_SIDE)
        legend = legend_of(counts, palette, names)
        write_png(captioned([[picture]], legend=legend, note=job.note), job.overlay, record)
    values = model.config.label_values
    if labels.suffix == ".tif":
        bands = (visualize.stored_labels(band, palette, names, values)[0] for band in rows.bands())
        _, colors, words = visualize.stored_labels(rows.read(0, 1), palette, names, values)
        write_label_tiff(labels, bands, size, colors, words, record, job.source, job.page or 0)
    else:
        whole, colors, _ = visualize.stored_labels(rows.read(0, size[0]), palette, names, values)
        write_png(visualize.label_image(whole, colors), labels, record)
    rows.remove()
    return rows.restarted


def _images(path: Path, out: Path, ignored: Ignored) -> list[Path]:
    """Return the images that an input names; adds files that are none to ``ignored``."""
    if not path.exists():
        raise FileNotFoundError(f"input {path} does not exist")
    if not path.is_dir():
        return [path]
    taken, others = sort_out(files_below(path, (out / LABELS, out / OVERLAYS, out / TOKENS)))
    for reason, paths in others.items():
        ignored[reason] = [*ignored.get(reason, []), *paths]
    return taken


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))
