"""One image to files without holding it: labels by bands, a reduced overlay, an interrupt that loses nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from .. import visualize
from ..io import Raster
from ..io.atomic import write_png
from ..io.label_tiff import check_label_tiff, write_label_tiff
from ..segmenter import Segmenter
from ..visualize import Color
from .bands import Progress
from .predict import classes, label_bands
from .resume import Spool, identity
from .settings import Settings

PREVIEW_SIDE = 2048
"""The longer side of an overlay in pixels is at most this."""


def run_by_rows(
    model: Segmenter,
    raster: Raster,
    source: Path,
    labels: Path,
    overlay: Path | None,
    settings: Settings,
    name: str = "",
    resume: bool = False,
    progress: Progress | None = None,
) -> str | None:
    """``predict_folder.run`` for an image that need not fit into memory.

    Labels go to disk a band at a time, and at the end into ``labels``: tiled TIFF where it ends in ``.tif``, else PNG,
    which needs all of them in memory, a byte or two a pixel. The overlay is reduced to ``PREVIEW_SIDE``.
    """
    size, config = (raster.height, raster.width), model.config
    tiff = labels.suffix == ".tif"
    if tiff:
        check_label_tiff(config.num_classes)
    names, palette = classes(config)
    dtype = np.dtype(np.uint8 if config.num_classes <= 256 else np.uint16 if config.num_classes <= 65536 else np.int32)
    run = identity(model, name, settings, source, size)
    spool = Spool(labels, run, size, dtype, resume)
    if spool.finished < size[0]:
        for _, band in label_bands(model, raster, settings, spool.finished, progress):
            spool.append(band)
    if overlay is not None:
        write_png(preview(raster, spool, palette), overlay)
    if tiff:
        write_label_tiff(labels, spool.bands(), size, palette, names)
    else:
        write_png(visualize.label_image(spool.read(0, size[0]), palette), labels)
    spool.remove()
    return spool.restarted


def preview(raster: Raster, spool: Spool, palette: tuple[Color, ...]) -> Image.Image:
    """The overlay, reduced by a whole factor: means of the pixels, and of each block the label in its middle."""
    height, width = spool.size
    factor = -(-max(spool.size) // PREVIEW_SIDE)
    step = factor * max(512 // factor, 1)
    columns = np.minimum(np.arange(-(-width // factor)) * factor + factor // 2, width - 1)
    parts = []
    for top in range(0, height, step):
        bottom = min(top + step, height)
        pixels = np.asarray(Image.fromarray(raster.read(top, bottom)).reduce(factor))
        rows = np.minimum(np.arange(len(pixels)) * factor + factor // 2, bottom - top - 1)
        labels = spool.read(top, bottom)[rows[:, None], columns]
        parts.append(np.asarray(visualize.overlay(pixels, labels, palette)))
    return Image.fromarray(np.concatenate(parts))
