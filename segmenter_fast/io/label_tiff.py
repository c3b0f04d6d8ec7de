"""Label maps as tiled TIFF, written from bands of rows."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..classes import Color
from ..config import Pair
from .atomic import RECORD, atomic_path

TILE = 512
# Pixel scale, tie points, transformation, geokeys with their numbers and texts, rational polynomials.
_GEOREFERENCE = (33550, 33922, 34264, 34735, 34736, 34737, 50844)
_GDAL_METADATA, _ORIENTATION = 42112, 274
# An item of GDAL's metadata on the whole image; one with a sample describes a band, and does not fit labels.
_ITEM = re.compile(r"<Item (?![^>]*\bsample=)[^>]*>[^<]*</Item>")
_PLAIN_TIFF_BYTES = (1 << 32) - (1 << 25)


def check_label_tiff(num_classes: int = 1) -> None:
    """Check that ``write_label_tiff`` can write labels of this many classes.

    Raises:
        ValueError: more classes than 16 bits hold, or tifffile is not installed.
    """
    if num_classes > 65536:
        raise ValueError(f"labels of at most 65536 classes can be written as TIFF, got {num_classes}")
    try:
        import tifffile  # noqa: F401
    except ImportError as error:
        raise ValueError("labels as TIFF need tifffile: pip install 'segmenter-fast[large]'") from error


def write_label_tiff(
    path: Path,
    bands: Iterable[np.ndarray],
    size: Pair,
    palette: Sequence[Color],
    class_names: Sequence[str],
    record: dict[str, Any] | None = None,
    source: Path | None = None,
    page: int = 0,
) -> None:
    """Write ``(h, W)`` bands, top to bottom, as one TIFF of class indices.

    Tiles are at most 512 x 512, compressed by Deflate. Pixels are uint8 with the palette as colour map up to 256
    classes, 16-bit grey above. The description lists the class names, one a line; the tag Software holds the record.
    BigTIFF only where pixels could pass 4 GB.

    Args:
        source, page: the image, whose georeference is kept if it is a TIFF; see ``georeference``.

    Raises:
        ValueError: as ``check_label_tiff``, or bands that do not add up to ``size``.
        OSError: the file cannot be written; nothing half-written stays.
    """
    check_label_tiff(len(palette))
    import tifffile

    dtype = np.dtype(np.uint8 if len(palette) <= 256 else np.uint16)
    tile = tuple(min(TILE, -(-side // 16) * 16) for side in size)
    colours: dict[str, Any] = {"photometric": "minisblack"}
    if dtype == np.uint8:
        table = np.zeros((3, 256), np.uint16)
        table[:, : len(palette)] = np.asarray(palette, np.uint16).T * 257
        colours = {"photometric": "palette", "colormap": table}
    with (
        atomic_path(path) as temporary,
        tifffile.TiffWriter(temporary, bigtiff=size[0] * size[1] * dtype.itemsize > _PLAIN_TIFF_BYTES) as file,
    ):
        file.write(
            _tiles(bands, size, (tile[0], tile[1]), dtype),
            shape=size,
            dtype=dtype,
            tile=tile,
            compression="zlib",
            metadata=None,
            description="\n".join(class_names).encode(),
            software=RECORD if record is None else f"{RECORD} {json.dumps(record)}",
            maxworkers=1,
            extratags=georeference(source, page) if source is not None else (),
            **colours,
        )


def georeference(path: Path, number: int = 0) -> list[tuple[int, int, int, Any, bool]]:
    """Return the tags of a page of a TIFF that say where its pixels lie, as tifffile writes them, if any.

    GDAL's metadata on the whole image are kept. Its value of missing pixels and its metadata on bands do not fit
    labels; and no tag fits an image that an orientation turns.
    """
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            page: Any = file.pages[number]
            tags = page.tags
            found = [tags[code] for code in _GEOREFERENCE if code in tags]
            items = "".join(_ITEM.findall(str(tags.valueof(_GDAL_METADATA, ""))))
            if tags.valueof(_ORIENTATION, 1) != 1:
                return []
            kept = [(tag.code, int(tag.dtype), tag.count, tag.value, True) for tag in found]
    except (tifffile.TiffFileError, ValueError, IndexError, struct.error, OSError):
        return []
    metadata = (_GDAL_METADATA, 2, 0, f"<GDALMetadata>{items}</GDALMetadata>", True)
    return [*kept, metadata] if items else kept


def _tiles(bands: Iterable[np.ndarray], size: Pair, tile: Pair, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Yield the tiles row by row, the last of each row and column padded with 0."""
    height, width = tile
    rows = np.zeros((height, -(-size[1] // width) * width), dtype)
    filled = done = 0
    for band in bands:
        if band.ndim != 2 or band.shape[1] != size[1]:
            raise ValueError(f"bands must be (h, {size[1]}), got {band.shape}")
        while len(band):
            taken = min(height - filled, len(band))
            rows[filled : filled + taken, : size[1]] = band[:taken]
            band, filled, done = band[taken:], filled + taken, done + taken
            if filled == height or done == size[0]:
                rows[filled:] = 0
                yield from (rows[:, left : left + width].copy() for left in range(0, rows.shape[1], width))
                filled = 0
    if done != size[0]:
        raise ValueError(f"bands must add up to {size[0]} rows, got {done}")
