"""Tiled and striped TIFF, BigTIFF among them, a band of rows at a time through tifffile."""

from __future__ import annotations

import lzma
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from .images import to_eight_bits

# A compressed strip or tile is decoded as a whole; larger ones would not bound the memory.
_MOST_BYTES_AT_ONCE = 1 << 28
_MINISWHITE, _MINISBLACK, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6
_SAMPLES = {_MINISWHITE: 1, _MINISBLACK: 1, _RGB: 3, _PALETTE: 1, _CMYK: 4, _YCBCR: 3}
_JPEG = (6, 7, 33007, 34892)
_ORIENTATION, _ASSOCIATED_ALPHA = 274, 1
# What codecs and tifffile raise for broken data, beside an error of tifffile's own.
_BROKEN = (
    ValueError,
    RuntimeError,
    IndexError,
    EOFError,
    NotImplementedError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
)


class NotByRowsError(Exception):
    """Why a file cannot be read by rows; another reader may hold it as a whole."""


def is_tiff(path: str) -> bool:
    """Whether the first bytes are those of a TIFF or BigTIFF.

    Raises:
        OSError: the file cannot be opened.
    """
    with open(path, "rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class TiffRaster:
    """The first page of a TIFF, upright and as RGB, by Pillow's rules."""

    def __init__(self, path: str) -> None:
        """Opens ``path``.

        Raises:
            NotByRowsError: tifffile is not installed or lacks the codec, a strip or tile is too large, or pixels are
                of a kind that has no rule.
        """
        self.path = path
        self._file, page = self._opened()
        self._page = page
        self._rows, self._columns = int(page.imagelength), int(page.imagewidth)
        self._chunk = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
        self._planes = page.samplesperpixel if page.planarconfig == 2 else 1
        tag = page.tags.get(_ORIENTATION)
        self._orientation = int(tag.value) if tag is not None and 1 <= tag.value <= 8 else 1
        upright = (self._rows, self._columns) if self._orientation < 5 else (self._columns, self._rows)
        self.height, self.width = upright
        self._check()

    def read(self, top: int, bottom: int) -> np.ndarray:
        sideways, o = self._orientation >= 5, self._orientation
        along = self._columns if sideways else self._rows
        if o in (3, 4, 7, 8):  # counted from the far end
            top, bottom = along - bottom, along - top
        window = (0, self._rows, top, bottom) if sideways else (top, bottom, 0, self._columns)
        try:
            stored = self._stored(*window)
        except self._errors as error:
            raise OSError(f"image {self.path} cannot be read: {error}") from error
        pixels = self._rgb(stored)
        if sideways:
            pixels = pixels.transpose(1, 0, 2)
        # rows were counted from the far end for these, and columns are for those
        return np.ascontiguousarray(pixels[:: -1 if o in (3, 4, 7, 8) else 1, :: -1 if o in (2, 3, 6, 7) else 1])

    def _opened(self) -> tuple[Any, Any]:
        """The file and its first page."""
        try:
            import tifffile
        except ImportError as error:
            raise NotByRowsError("tifffile is not installed") from error
        self._errors: tuple[type[Exception], ...] = (tifffile.TiffFileError, *_BROKEN)
        try:
            file = tifffile.TiffFile(self.path)
            return file, file.pages[0]
        except self._errors as error:
            raise NotByRowsError(f"tifffile cannot open it: {error}") from error

    def _check(self) -> None:
        page = self._page
        bits, kind = page.bitspersample, page.photometric
        wanted = _SAMPLES.get(kind)
        if wanted is None or page.samplesperpixel < wanted:
            raise NotByRowsError(f"no rule for {page.samplesperpixel} samples of photometric {kind}")
        deep = bits == 16 and page.dtype is not None and page.dtype.kind == "u" and kind in (_MINISBLACK, _RGB)
        if not (bits == 8 and page.dtype is not None and page.dtype.kind == "u") and not deep and page.dtype != bool:
            raise NotByRowsError(f"no rule for samples of {bits} bits, {page.dtype}, photometric {kind}")
        if page.dtype == bool and (kind not in (_MINISWHITE, _MINISBLACK) or page.samplesperpixel != 1):
            raise NotByRowsError(f"no rule for samples of 1 bit, photometric {kind}")
        if kind == _YCBCR and page.compression not in _JPEG:
            raise NotByRowsError("no rule for YCbCr that is not compressed as JPEG")
        if page.tiledepth > 1 or page.imagedepth > 1:
            raise NotByRowsError("the page is a volume")
        if self._by_offset():
            return
        size = self._chunk[0] * self._chunk[1] * page.samplesperpixel // self._planes * page.dtype.itemsize
        if size > _MOST_BYTES_AT_ONCE:
            raise NotByRowsError(f"a strip or tile is {size / 1e6:,.0f} MB, more than {_MOST_BYTES_AT_ONCE / 1e6:,.0f}")
        try:
            page.decode(None, 0)
            next(self._chunks(0, 1, 0, 1))
        except self._errors as error:
            raise NotByRowsError(f"tifffile cannot decode it: {error}") from error

    def _by_offset(self) -> bool:
        """Whether rows lie in the file as they are."""
        page = self._page
        plain = page.compression == 1 and page.fillorder == 1 and page.bitspersample in (8, 16)
        return plain and not page.is_tiled and self._planes == 1

    def _stored(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """``(bottom - top, right - left, samples)`` as they lie in the file."""
        if self._by_offset():
            return self._plain_rows(top, bottom)[:, left:right]
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
        """(row, column, plane, values) of the tiles or strips that touch a region; ``values`` lie in the image."""
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
            values, (plane, _, row, column, _), shape = page.decode(data, index, **tables)
            if values is None:
                values = np.full(shape, page.nodata, page.dtype)
            yield row, column, plane, values[0, : self._rows - row, : self._columns - column]

    def _plain_rows(self, top: int, bottom: int) -> np.ndarray:
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
