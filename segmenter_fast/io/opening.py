"""Which reader takes an image: Pillow as a whole up to a size, above it by rows tifffile or libvips."""

from __future__ import annotations

import os
import warnings
from typing import Protocol

import numpy as np
from PIL import Image

from .images import ImageSource, read_image
from .pixels import Pixels
from .tiff import NotByRowsError, TiffRaster, is_tiff
from .vips import VipsRaster

LARGE_PIXELS = 1 << 26
"""Images with more pixels, 8192 x 8192, are read by rows, and their labels are written as tiled TIFF."""

INSTALL = "pip install 'segmenter-fast[large]'"


class Raster(Protocol):
    """RGB pixels that are read a band of rows at a time."""

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    def read(self, top: int, bottom: int) -> np.ndarray:
        """``(bottom - top, width, 3)`` uint8.

        Raises:
            OSError: the file cannot be decoded, naming it.
            ValueError: pixels without a defined meaning in 8 bits.
        """


def open_raster(image: ImageSource) -> Raster:
    """An image with the pixels of ``images.read_image``, by rows where its file is large and its format allows it.

    Above ``LARGE_PIXELS`` a TIFF is read by tifffile, tile by tile or strip by strip, and any other file, or a TIFF
    that tifffile cannot decode by rows, by libvips; formats without random access (JPEG, PNG) libvips decodes once to
    a temporary file. Where neither is installed Pillow holds the whole image, up to its own limit.

    Raises:
        TypeError, ValueError, OSError: as ``read_image``, and a file larger than what is installed can read.
    """
    if not isinstance(image, (str, os.PathLike)):
        return Pixels(read_image(image))
    path = os.fspath(image)
    reasons = []
    if is_tiff(path):
        try:
            raster = TiffRaster(path)
            if raster.height * raster.width > LARGE_PIXELS:
                return raster
        except NotByRowsError as reason:
            reasons.append(str(reason))
    if _is_large(path):
        try:
            return VipsRaster(path)
        except NotByRowsError as reason:
            reasons.append(str(reason))
        try:
            return Pixels(_whole(path))
        except (OSError, MemoryError) as error:
            raise OSError(f"{error}; by rows: {'; '.join(reasons)}; {INSTALL} has what large images need") from error
    return Pixels(read_image(path))


def _is_large(path: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                return opened.width * opened.height > LARGE_PIXELS
    except Image.DecompressionBombError:
        return True
    except (OSError, SyntaxError, ValueError):
        return False  # read_image says what is wrong with it


def _whole(path: str) -> np.ndarray:
    """By Pillow; its warning at half of its limit would tell of an attack, but the file is the user's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return read_image(path)
