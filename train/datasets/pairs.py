"""Images and label images in files: reading them, turning values into classes."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ...classes import Color
from ...io.channels import RGB, Channels
from ...io.images import read_image
from ...io.pillow_images import UNREADABLE, check_regular, seek_page
from ...io.walk import Ignored, reason_of
from .base import IGNORE, SampleError, SegmentationDataset
from .colors import ColorTable, UnknownColorError

INVALID = -1
"""Marks a value that is neither a class nor ignored in a table of values."""
LABEL_SUFFIXES = (".png", ".tif", ".tiff")
# Modes with one value for each pixel; Pillow reads 16-bit PNG files as I;16, older versions as I.
_INDEX_MODES = ("L", "P", "1", "I", "I;16", "I;16B")
# Pillow spreads grey of few bits over 0 to 255: the step of the shades by its raw mode.
_SHADES = {"L;2": 85, "L;4": 17}


@dataclass(frozen=True)
class Pair:
    """The files of one sample, and its name."""

    name: str
    image: Path
    labels: Path


@dataclass(frozen=True, eq=False)
class PairedFiles:
    """A split of a data set in files; see ``SegmentationDataset``."""

    class_names: tuple[str, ...]
    palette: tuple[Color, ...]
    pairs: tuple[Pair, ...]
    strays: tuple[Path, ...]
    """Label files that belong to no image."""
    ignored: Ignored
    """Files in the folders that are neither images nor labels, by the reason."""
    table: np.ndarray
    """``(256,)`` int16: the class of each value of the label files, ``ignore_index`` or ``INVALID``."""
    ignore_index: int = IGNORE
    colors: ColorTable | str = ""
    """Values of label images of colours, or the reason why they cannot be read."""
    page: int | None = None
    """Page, from 0 on, of files that have several; None: the first, which a warning says."""
    channels: Channels = RGB
    """Bands that the images are read as."""

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        """Return the image's path below the folder of images, without suffix."""
        return self.pairs[index].name

    @property
    def label_values(self) -> tuple[int, ...]:
        """Return the value of each class in label files; empty where it is the class itself."""
        values = tuple(int(np.flatnonzero(self.table == place)[0]) for place in range(len(self.class_names)))
        return () if values == tuple(range(len(values))) else values

    @property
    def reading(self) -> str:
        """Return what changes pixels and labels beside the files, for ``fingerprint``."""
        ignored = self.colors.ignored if isinstance(self.colors, ColorTable) else []
        return f"{ignored} {self.page}" if self.page or ignored else ""

    def identity(self, index: int) -> str:
        """Return the name with the size and a checksum of the end of the image file, for ``fingerprint``."""
        try:
            check_regular(self.pairs[index].image)
            with self.pairs[index].image.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(size - 4096, 0))
                return f"{self.name(index)} {size} {zlib.crc32(file.read())}"
        except OSError:  # read names the file
            return self.name(index)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Read pixels as ``read_image`` does, by default ``(H, W, 3)`` uint8 RGB, and ``(H, W)`` uint8 classes.

        Raises:
            SampleError: a file is missing or unreadable, or the sizes differ; names the file.
            ValueError: a value of the label file is neither a class nor ignored.
        """
        pair = self.pairs[index]
        classes, image = self.classes(pair), read_pixels(pair.image, self.page or 0, self.channels)
        if image.shape[:2] != classes.shape:
            raise SampleError(differing_sizes(pair, image, classes))
        return image, classes

    def classes(self, pair: Pair) -> np.ndarray:
        """Read ``(H, W)`` uint8 classes; errors as in ``read``."""
        values = self.values(pair)
        counts = np.bincount(values.reshape(-1), minlength=len(self.table))
        if len(counts) > len(self.table) or counts[self.table == INVALID].any():
            hint = "segmenter-fast dataset check finds all such files"
            raise ValueError(f"labels {pair.labels} hold {self.invalid(counts)}; {hint}")
        return self.table.astype(np.uint8)[values]

    def values(self, pair: Pair) -> np.ndarray:
        """Read the values of a label file, see ``read_values``."""
        return read_values(pair.labels, self.colors, self.page or 0)

    def invalid(self, counts: np.ndarray) -> str:
        """Name the values that occur but are no classes, by the pixels of each value; empty if there are none."""
        known = np.flatnonzero(self.table != INVALID)
        bad = np.setdiff1d(np.flatnonzero(counts), known)
        if not len(bad):
            return ""
        some = ", ".join(map(str, bad[:5])) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        ignored = ", ".join(map(str, np.flatnonzero(self.table == self.ignore_index)))
        classes = np.flatnonzero((self.table != INVALID) & (self.table != self.ignore_index))
        rest = f", and ignored is {ignored}" if ignored else ""
        return f"{some}, but classes are {classes.min()} to {classes.max()}{rest}"


def with_channels(dataset: SegmentationDataset, channels: Channels) -> SegmentationDataset:
    """Return a data set whose files are read as these channels; drawn images stay RGB."""
    return replace(dataset, channels=channels) if isinstance(dataset, PairedFiles) else dataset


def read_pixels(path: Path, page: int = 0, channels: Channels = RGB) -> np.ndarray:
    """Read an image as ``read_image`` does, with every failure a ``SampleError`` that names the file."""
    try:
        return read_image(path, page, channels)
    except FileNotFoundError:
        raise SampleError(f"image {path} does not exist") from None
    except ValueError as error:
        raise SampleError(f"image {path}: {error}") from error
    except OSError as error:
        raise SampleError(reason_of(error)) from error


def read_values(path: Path, colors: ColorTable | str = "", page: int = 0) -> np.ndarray:
    """Read the values of a label file as they are stored, turned upright by its own orientation: ``(H, W)``.

    uint8 or int32. Grey of 2 and 4 bits gives the stored 0 to 3 and 0 to 15, not the shades. A palette image gives its
    indices; RGB, with or without alpha, the values that ``colors`` has for it.

    Args:
        colors: a table, or the reason why there is none.
        page: of a file that has several; another one has its only page.

    Raises:
        SampleError: missing, unreadable, or an image of colours without a table; names the file.
        ValueError: a colour that the table does not have.
    """
    try:
        check_regular(path)
        with Image.open(path) as opened:
            if page and getattr(opened, "n_frames", 1) > 1:
                seek_page(opened, page)
            if opened.mode in ("RGB", "RGBA") and isinstance(colors, ColorTable):
                upright = ImageOps.exif_transpose(opened)
                return colors.read(np.asarray(upright.convert("RGB")), path)
            if opened.mode not in _INDEX_MODES:
                raise SampleError(
                    f"labels {path} have mode {opened.mode}; one class index for each pixel is needed: "
                    f"a grey or palette PNG or TIFF{f'; {colors}' if isinstance(colors, str) and colors else ''}"
                )
            raw = opened.tile[0][3] if opened.tile else ""
            raw = raw if isinstance(raw, str) else (raw or ("",))[0]
            if "I" in raw.partition(";")[2]:
                raise SampleError(
                    f"labels {path} have 0 as white, of which Pillow makes other values: write 0 as black"
                )
            step = _SHADES.get(raw, 1)
            upright = ImageOps.exif_transpose(opened)
            values = np.asarray(upright) // step if step > 1 else np.asarray(upright)
    except FileNotFoundError:
        raise SampleError(f"labels {path} do not exist") from None
    except (SampleError, UnknownColorError):
        raise
    except UNREADABLE as error:
        raise SampleError(f"labels {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if values.dtype in (np.uint8, np.bool_):
        return values.astype(np.uint8)
    if values.min() < 0 or values.max() > 65535:
        raise SampleError(f"labels {path} hold values outside 0 to 65535, {values.min()} to {values.max()}")
    return values.astype(np.int32)


def orientation(path: Path) -> int:
    """Return the EXIF orientation of an image file, 1 to 8; 1, upright, where there is none."""
    try:
        check_regular(path)
        with Image.open(path) as opened:
            found = opened.getexif().get(ExifTags.Base.Orientation, 1)
    except UNREADABLE:
        return 1
    return found if found in range(1, 9) else 1


def differing_sizes(pair: Pair, image: np.ndarray, values: np.ndarray) -> str:
    """Describe sizes that differ, and EXIF orientations where these do; empty if the sizes agree."""
    if image.shape[:2] == values.shape:
        return ""
    (height, width), (rows, columns) = image.shape[:2], values.shape
    tags = orientation(pair.image), orientation(pair.labels)
    turned = f"; EXIF turns the image by orientation {tags[0]}, the labels by {tags[1]}" if tags[0] != tags[1] else ""
    return f"image {pair.image} is {width} x {height} pixels, its labels {pair.labels} are {columns} x {rows}{turned}"
