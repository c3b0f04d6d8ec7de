"""Images larger than memory, a band of rows at a time: TIFF and BigTIFF by tifffile, other formats by libvips."""

from __future__ import annotations

import lzma
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

# A compressed strip or tile is decoded as a whole; a limit to its size bounds the memory.
_MOST_BYTES_AT_ONCE = 1 << 28
_MINISWHITE, _MINISBLACK, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6
_SAMPLES = {_MINISWHITE: 1, _MINISBLACK: 1, _RGB: 3, _PALETTE: 1, _CMYK: 4, _YCBCR: 3}
_JPEG = (6, 7, 33007, 34892)
_ORIENTATION, _ASSOCIATED_ALPHA = 274, 1
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
    """A page of a TIFF, upright and converted to RGB by Pillow's rules."""

    def __init__(self, path: str, number: int = 0) -> None:
        """Open page ``number``, from 0 on, of ``path``.

        Raises:
            NotByRowsError: tifffile is not installed or lacks the codec, a strip or tile is too large, or pixels are
                of a kind that has no rule.
        """
        try:
            import tifffile
        except ImportError as error:
            raise NotByRowsError("tifffile is not installed") from error
        self.path, self._errors = path, (tifffile.TiffFileError, *_BROKEN)
        try:
            self._file = tifffile.TiffFile(path)
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
        plain = page.compression == 1 and page.fillorder == 1 and page.bitspersample in (8, 16)
        self._check_chunks()
        self._uncompressed_rows = plain and not page.is_tiled and self._planes == 1
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
        pixels = self._rgb(stored)
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
        whole = sum(0 < at < at + count <= size for at, count in zip(page.dataoffsets, counts, strict=False))
        if whole < needed:
            raise OSError(
                f"image {self.path} cannot be read: {needed - whole} of its {needed} tiles or strips are missing or "
                "end behind the file"
            )

    def _check(self) -> None:
        page = self._page
        bits, kind = page.bitspersample, page.photometric
        wanted = _SAMPLES.get(kind)
        if wanted is None or page.samplesperpixel < wanted:
            raise NotByRowsError(f"no rule for {page.samplesperpixel} samples of photometric {kind}")
        known = (
            (page.dtype == np.uint8 and bits == 8)
            or (page.dtype == np.uint16 and bits == 16 and kind in (_MINISBLACK, _RGB))
            or (page.dtype == bool and kind in (_MINISWHITE, _MINISBLACK) and page.samplesperpixel == 1)
        )
        if not known:
            raise NotByRowsError(f"no rule for samples of {bits} bits, {page.dtype}, photometric {kind}")
        if kind == _YCBCR and page.compression not in _JPEG:
            raise NotByRowsError("no rule for YCbCr that is not compressed as JPEG")
        if page.tiledepth > 1 or page.imagedepth > 1:
            raise NotByRowsError("the page is a volume")
        if self._uncompressed_rows:
            return
        size = self._chunk[0] * self._chunk[1] * page.samplesperpixel // self._planes * page.dtype.itemsize
        if size > _MOST_BYTES_AT_ONCE:
            raise NotByRowsError(f"a strip or tile is {size / 1e6:,.0f} MB, more than {_MOST_BYTES_AT_ONCE / 1e6:,.0f}")
        try:
            page.decode(None, 0)
            next(self._chunks(0, 1, 0, 1))
        except self._errors as error:
            raise NotByRowsError(f"tifffile cannot decode it: {error}") from error

    def _stored(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """``(bottom - top, right - left, samples)`` in the file's orientation and samples."""
        if self._uncompressed_rows:
            return self._read_uncompressed(top, bottom)[:, left:right]
        samples = self._page.samplesperpixel
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
        indices = [
            (plane * down + y) * across + x
            for plane in range(self._planes)
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

    def _read_uncompressed(self, top: int, bottom: int) -> np.ndarray:
        page, file, height = self._page, self._file.filehandle, self._chunk[0]
        dtype = page.dtype.newbyteorder(self._file.byteorder)
        row = self._columns * page.samplesperpixel * dtype.itemsize
        parts = []
        for strip in range(top // height, -(-bottom // height)):
            first, last = max(top, strip * height), min(bottom, (strip + 1) * height)
            file.seek(page.dataoffsets[strip] + (first - strip * height) * row)
            parts.append(file.read((last - first) * row))
        data = b"".join(parts)
        if len(data) != (bottom - top) * row:
            raise ValueError(f"the file ends before row {bottom}")
        return np.frombuffer(data, dtype).reshape(bottom - top, self._columns, page.samplesperpixel)

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
    """A file that libvips reads through pyvips, upright and as RGB."""

    def __init__(self, path: str, page: int = 0) -> None:
        """Open a page, from 0 on, of ``path``.

        Raises:
            NotByRowsError: pyvips is not installed, or libvips knows no such pixels or format.
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
        if samples not in ("uchar", "ushort") or space in ("lab", "labs", "labq", "xyz", "multiband"):
            raise NotByRowsError(f"libvips gives pixels of {samples} {space}, which have no defined RGB of 8 bits")

    def read(self, top: int, bottom: int) -> np.ndarray:
        try:
            pixels = self._image.crop(0, top, self.width, bottom - top).numpy()
        except self._error as error:
            raise OSError(f"image {self.path} cannot be read: {_last_line(error)}") from error
        pixels = pixels.reshape(bottom - top, self.width, -1)
        if self._image.interpretation == "cmyk":
            inks = np.ascontiguousarray(pixels[..., :4])
            return np.asarray(Image.frombytes("CMYK", (self.width, bottom - top), inks.tobytes()).convert("RGB"))
        grey = pixels.shape[2] < 3
        if pixels.dtype == np.uint16:
            pixels = to_eight_bits(pixels[..., :1]) if grey else (pixels >> 8).astype(np.uint8)
        return np.repeat(pixels[..., :1], 3, 2) if grey else np.ascontiguousarray(pixels[..., :3])


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[-1].strip()
