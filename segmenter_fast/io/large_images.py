"""Images larger than memory, a band of rows at a time: TIFF and BigTIFF by tifffile, other formats by libvips."""

from __future__ import annotations

import lzma
import math
import struct
import weakref
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from .channels import RGB, Channels, to_unit

# A compressed strip or tile is decoded as a whole; a limit to its size bounds the memory.
_MOST_BYTES_AT_ONCE = 1 << 28
_MINISWHITE, _MINISBLACK, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6
_SAMPLES = {_MINISWHITE: 1, _MINISBLACK: 1, _RGB: 3, _PALETTE: 1, _CMYK: 4, _YCBCR: 3}
_JPEG = (6, 7, 33007, 34892)
_ORIENTATION, _ASSOCIATED_ALPHA, _UNASSOCIATED_ALPHA = 274, 1, 2
# Errors of codecs and tifffile on broken data, besides tifffile's own.
_BROKEN = (ValueError, RuntimeError, IndexError, EOFError, struct.error, zlib.error, lzma.LZMAError)


class NotByRowsError(Exception):
    """A file cannot be read by rows, and the reason; another reader may read it as a whole."""


def to_eight_bits(values: np.ndarray) -> np.ndarray:
    """Grey values of 16 bits -> uint8, rounded to nearest."""
    low, high = values.min(), values.max()
    if low < 0 or high > 65535:
        raise ValueError(f"image of integers must lie within 0 to 65535 (16 bits), got {low} to {high}")
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


class TiffRaster:
    """A page of a TIFF, upright, converted to RGB by Pillow's rules or as the bands that a model takes.

    Stored samples are bands; images of a palette, CMYK and YCbCr have the bands R, G, B. ``picked`` are the indices of
    those taken, None where the colours that the file declares are taken.
    """

    def __init__(self, path: str, number: int = 0, channels: Channels = RGB) -> None:
        """Open page ``number``, from 0 on, of ``path``.

        Raises:
            NotByRowsError: tifffile is not installed, a strip or tile is too large, or pixels are of a kind that has
                no rule.
            ValueError: other bands than the channels, see ``Channels.pick``.
            OSError: tiles or strips are missing.
        """
        try:
            import tifffile
        except ImportError as error:
            raise NotByRowsError("tifffile is not installed") from error
        self.path, self._errors = path, (tifffile.TiffFileError, *_BROKEN)
        try:
            self._file = tifffile.TiffFile(path)
            weakref.finalize(self, self._file.close)  # its pages refer to it: else the garbage collector does
            page: Any = self._file.pages[number]
        except self._errors as error:
            raise NotByRowsError(f"tifffile cannot open it: {error}") from error
        self._page = page
        self._rows, self._columns = int(page.imagelength), int(page.imagewidth)
        self._chunk = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
        self._planes = page.samplesperpixel if page.planarconfig == 2 else 1
        tag = page.tags.get(_ORIENTATION)
        self._orientation = int(tag.value) if tag is not None and 1 <= tag.value <= 8 else 1
        self.height, self.width = self._rows, self._columns
        if self._orientation >= 5:
            self.height, self.width = self._columns, self._rows
        self._check_chunks()
        self._contiguous = page.is_contiguous and self._planes == 1 and page.fillorder == page.predictor == 1
        self.wide = page.dtype is not None and page.dtype.itemsize > 1
        """Samples have more than 8 bits, whose range an image may not use."""
        self._scale, kind = channels.scale, page.photometric
        alpha = int(any(extra in (_ASSOCIATED_ALPHA, _UNASSOCIATED_ALPHA) for extra in page.extrasamples))
        self._converted = kind in (_MINISWHITE, _PALETTE, _CMYK, _YCBCR) or page.dtype == bool
        several = page.samplesperpixel - alpha > {_MINISBLACK: 1, _RGB: 3}.get(kind, page.samplesperpixel)
        self.picked: list[int] | None = None
        if several or not channels.colours:
            converted = (1 if kind in (_MINISWHITE, _MINISBLACK) else 3), 0
            self.picked = channels.pick(*(converted if self._converted else (page.samplesperpixel, alpha)))
        self._check()

    def read(self, top: int, bottom: int) -> np.ndarray:
        sideways, o = self._orientation >= 5, self._orientation
        along = self._columns if sideways else self._rows
        if o in (3, 4, 7, 8):  # rows are stored from the far end
            top, bottom = along - bottom, along - top
        window = (0, self._rows, top, bottom) if sideways else (top, bottom, 0, self._columns)
        try:
            stored = self._stored(*window)
        except self._errors as error:
            raise OSError(f"image {self.path} cannot be read: {error}") from error
        pixels = self._rgb(stored) if self.picked is None or self._converted else stored
        if self.picked is not None:
            pixels = to_unit(pixels[..., self.picked], self._scale)
        if sideways:
            pixels = pixels.transpose(1, 0, 2)
        return np.ascontiguousarray(pixels[:: -1 if o in (3, 4, 7, 8) else 1, :: -1 if o in (2, 3, 6, 7) else 1])

    def _check_chunks(self) -> None:
        """Require that the file holds every tile or strip; readers take a missing one for black.

        Raises:
            OSError: it does not.
        """
        page, size = self._page, self._file.filehandle.size
        needed = self._planes * -(-self._rows // self._chunk[0]) * -(-self._columns // self._chunk[1])
        counts = page.databytecounts or [1] * len(page.dataoffsets)
        places = [*zip(page.dataoffsets, counts, strict=False)]
        whole = sum(0 < at < at + count <= size for at, count in places)
        sparse = sum(at == count == 0 for at, count in places)
        if whole < needed:
            filled = "gdal_translate IN.tif OUT.tif writes them out as nodata or 0"
            hint = f"; {sparse} were never written (GDAL's SPARSE_OK): {filled}" if sparse else ""
            raise OSError(
                f"image {self.path} cannot be read: {needed - whole} of its {needed} tiles or strips are missing or "
                f"end behind the file{hint}"
            )

    def _check(self) -> None:
        page = self._page
        bits, kind = page.bitspersample, page.photometric
        wanted = _SAMPLES.get(kind)
        stored = self.picked is not None and not self._converted
        if not stored and (wanted is None or page.samplesperpixel < wanted):
            raise NotByRowsError(f"no rule for {page.samplesperpixel} samples of photometric {kind}")
        known = (
            (page.dtype is not None and page.dtype.kind in "uif")
            if stored
            else (
                (page.dtype == np.uint8 and bits == 8)
                or (page.dtype == np.uint16 and bits == 16 and kind in (_MINISBLACK, _RGB))
                or (page.dtype == bool and kind in (_MINISWHITE, _MINISBLACK) and page.samplesperpixel == 1)
            )
        )
        if not known:
            raise NotByRowsError(f"no rule for samples of {bits} bits, {page.dtype}, photometric {kind}")
        if kind == _YCBCR and page.compression not in _JPEG:
            raise NotByRowsError("no rule for YCbCr that is not compressed as JPEG")
        if page.tiledepth > 1 or page.imagedepth > 1:
            raise NotByRowsError("the page is a volume")
        if self._contiguous:
            return
        size = self._chunk[0] * self._chunk[1] * page.samplesperpixel // self._planes * page.dtype.itemsize
        if size > _MOST_BYTES_AT_ONCE:
            raise NotByRowsError(f"a strip or tile is {size / 1e6:,.0f} MB, more than {_MOST_BYTES_AT_ONCE / 1e6:,.0f}")

    def check_decodes(self) -> None:
        """Decode the first tile or strip.

        Raises:
            NotByRowsError: tifffile lacks the codec, or the data are damaged.
        """
        if self._contiguous:
            return
        try:
            self._page.decode(None, 0)
            next(self._chunks(0, 1, 0, 1))
        except self._errors as error:
            raise NotByRowsError(f"tifffile cannot decode it: {error}") from error

    def _stored(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """``(bottom - top, right - left, samples)`` in the file's orientation and samples."""
        samples = self._page.samplesperpixel
        if self._contiguous:
            shape = (bottom - top, self._columns, samples)
            dtype = self._page.dtype.newbyteorder(self._file.byteorder)
            offset = self._page.dataoffsets[0] + top * self._columns * samples * dtype.itemsize
            return np.fromfile(self.path, dtype, math.prod(shape), offset=offset).reshape(shape)[:, left:right]
        stored = np.empty((bottom - top, right - left, samples), self._page.dtype)
        for row, column, plane, values in self._chunks(top, bottom, left, right):
            into = stored[..., plane : plane + 1] if self._planes > 1 else stored
            height, width = values.shape[:2]
            r0, r1 = max(row, top), min(row + height, bottom)
            c0, c1 = max(column, left), min(column + width, right)
            into[r0 - top : r1 - top, c0 - left : c1 - left] = values[r0 - row : r1 - row, c0 - column : c1 - column]
        return stored

    def _chunks(self, top: int, bottom: int, left: int, right: int) -> Iterator[tuple[int, int, int, np.ndarray]]:
        """Yield (row, column, plane, values) of the tiles or strips that touch a region, cut to the image."""
        page, (height, width) = self._page, self._chunk
        down, across = -(-self._rows // height), -(-self._columns // width)
        stored = self.picked is not None and not self._converted and self._planes > 1
        planes = sorted(set(self.picked or ())) if stored else range(self._planes)
        indices = [
            (plane * down + y) * across + x
            for plane in planes
            for y in range(top // height, -(-bottom // height))
            for x in range(left // width, -(-right // width))
        ]
        tables: dict[str, Any] = {}
        if page.compression in _JPEG:
            tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
        read = self._file.filehandle.read_segments(
            [page.dataoffsets[i] for i in indices], [page.databytecounts[i] for i in indices], indices=indices
        )
        for data, index in read:
            values, (plane, _, row, column, _), _ = page.decode(data, index, **tables)
            if values is None:
                raise ValueError(f"the tile or strip at row {row}, column {column} is missing")
            yield row, column, plane, values[0, : self._rows - row, : self._columns - column]

    def _rgb(self, stored: np.ndarray) -> np.ndarray:
        kind, size = self._page.photometric, (stored.shape[1], stored.shape[0])
        if kind in (_MINISWHITE, _MINISBLACK):
            grey = stored[..., 0]
            if grey.dtype == bool:
                grey = grey.astype(np.uint8) * 255
            if grey.dtype != np.uint8:
                grey = to_eight_bits(grey)
            return np.repeat((255 - grey if kind == _MINISWHITE else grey)[..., None], 3, 2)
        if kind == _PALETTE:
            colours = (np.asarray(self._page.colormap) >> 8).astype(np.uint8).T
            return colours[stored[..., 0]]
        if kind == _CMYK:
            return np.asarray(Image.frombytes("CMYK", size, stored[..., :4].tobytes()).convert("RGB"))
        if stored.dtype != np.uint8:
            stored = (stored >> 8).astype(np.uint8)
        if stored.shape[2] == 4 and _ASSOCIATED_ALPHA in self._page.extrasamples:
            return np.asarray(Image.frombytes("RGBA", size, stored.tobytes(), "raw", "RGBa").convert("RGB"))
        return stored[..., :3]


class VipsRaster:
    """A file that libvips reads through pyvips, upright, as RGB or as the bands that a model takes."""

    def __init__(self, path: str, page: int = 0, channels: Channels = RGB, picked: list[int] | None = None) -> None:
        """Open a page, from 0 on, of ``path``.

        Args:
            picked: the indices of the bands that are taken, where another reader knows them.

        Raises:
            NotByRowsError: pyvips is not installed, or libvips knows no such pixels or format.
            ValueError: other bands than the channels, see ``Channels.pick``.
        """
        try:
            import pyvips
        except (ImportError, OSError) as error:  # OSError: the package without its library
            raise NotByRowsError("pyvips is not installed") from error
        self.path, self._error = path, pyvips.Error
        try:
            options = {"page": page} if page else {}  # loaders of formats without pages know no such option
            self._image = pyvips.Image.new_from_file(path, access="random", fail_on="error", **options).autorot()
        except pyvips.Error as error:
            raise NotByRowsError(f"libvips cannot open it: {_last_line(error)}") from error
        self.height, self.width = int(self._image.height), int(self._image.width)
        samples, space = self._image.format, self._image.interpretation
        self.picked, self._scale = picked, channels.scale
        if picked is not None or not channels.colours:
            if space == "cmyk":
                raise NotByRowsError("libvips gives CMYK, which has no bands R, G, B")
            self.picked = picked or channels.pick(self._image.bands, int(self._image.hasalpha()))
            return
        if samples not in ("uchar", "ushort") or space in ("lab", "labs", "labq", "xyz", "multiband"):
            raise NotByRowsError(f"libvips gives pixels of {samples} {space}, which have no defined RGB of 8 bits")

    def read(self, top: int, bottom: int) -> np.ndarray:
        try:
            pixels = self._image.crop(0, top, self.width, bottom - top).numpy()
        except self._error as error:
            raise OSError(f"image {self.path} cannot be read: {_last_line(error)}") from error
        pixels = pixels.reshape(bottom - top, self.width, -1)
        if self.picked is not None:
            return np.ascontiguousarray(to_unit(pixels[..., self.picked], self._scale))
        if self._image.interpretation == "cmyk":
            inks = np.ascontiguousarray(pixels[..., :4])
            return np.asarray(Image.frombytes("CMYK", (self.width, bottom - top), inks.tobytes()).convert("RGB"))
        grey = pixels.shape[2] < 3
        if pixels.dtype == np.uint16:
            pixels = to_eight_bits(pixels[..., :1]) if grey else (pixels >> 8).astype(np.uint8)
        return np.repeat(pixels[..., :1], 3, 2) if grey else np.ascontiguousarray(pixels[..., :3])


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[-1].strip()
