"""Images as RGB pixels, in memory or read by rows, and their normalisation."""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .large_images import NotByRowsError, TiffRaster, VipsRaster, to_eight_bits
from .walk import HEIF_SUFFIXES

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray

LARGE_PIXELS = 1 << 26
"""Images with more pixels, 8192 x 8192, are read by rows, and their labels are written as tiled TIFF."""

_PAGED = ("GIF", "PNG", "TIFF", "WEBP")
_SUBFILE, _REDUCED_OR_MASK = 254, 5
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Errors of Pillow on files that are cut short or no images.
_UNREADABLE = (OSError, SyntaxError, EOFError, ValueError, struct.error, Image.DecompressionBombError)


class Raster(Protocol):
    """RGB pixels that are read a band of rows at a time."""

    height: int
    width: int

    def read(self, top: int, bottom: int) -> np.ndarray:
        """``(bottom - top, width, 3)`` uint8.

        Raises:
            OSError: the file cannot be decoded, naming it.
            ValueError: pixels without a defined meaning in 8 bits.
        """


class Pixels:
    """``(H, W, 3)`` uint8 in memory as a ``Raster``."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels, self.height, self.width = pixels, pixels.shape[0], pixels.shape[1]

    def read(self, top: int, bottom: int) -> np.ndarray:
        return self.pixels[top:bottom]


def open_raster(image: ImageSource, page: int | None = None) -> Raster:
    """Open an image with the pixels of ``read_image``, by rows where its file is large and its format allows it.

    Above ``LARGE_PIXELS`` a TIFF is read by tifffile, tile by tile or strip by strip, and any other file, or a TIFF
    that tifffile cannot decode by rows, by libvips; formats without random access (JPEG, PNG) libvips decodes once to
    a temporary file. Where neither is installed Pillow holds the whole image, up to its own limit.

    Args:
        page: of a file, from 0 on, as Pillow and tifffile count; None: the first, with a warning if there are others.

    Raises:
        TypeError, ValueError, OSError: as ``read_image``, and a file larger than what is installed can read.
    """
    if not isinstance(image, (str, os.PathLike)):
        return Pixels(read_image(image))
    path, reasons = os.fspath(image), []
    check_regular(path)
    _register_heif(path)
    with open(path, "rb") as file:
        is_tiff = file.read(4) in _TIFF_STARTS
    if page is None and (pages := count_pages(path)) > 1:
        warnings.warn(f"{path} has {pages} pages; the first is read, --page 1 is the second", stacklevel=2)
    page = page or 0
    if is_tiff:
        try:
            raster = TiffRaster(path, page)
            if raster.height * raster.width > LARGE_PIXELS:
                return raster
        except NotByRowsError as reason:
            reasons.append(str(reason))
    with warnings.catch_warnings():  # a warning below Pillow's limit is about attacks, but the file is the user's
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        if not _is_large(path, page):
            return Pixels(read_image(path, page))
        try:
            return VipsRaster(path, page)
        except NotByRowsError as reason:
            reasons.append(str(reason))
        try:
            return Pixels(read_image(path, page))
        except (OSError, MemoryError) as error:
            install = "pip install 'segmenter-fast[large]' has what large images need"
            raise OSError(f"{error}; by rows: {'; '.join(reasons)}; {install}") from error


def read_image(image: ImageSource, page: int = 0) -> np.ndarray:
    """Read the RGB pixels of an image: ``(H, W, 3)`` uint8.

    Files and PIL images are turned upright as their EXIF orientation says. Transparency is dropped, not blended, as
    the official program does. 16-bit grey values (modes I;16 and I) are divided by 257 and rounded.

    Args:
        image: a path, a PIL image, or a uint8 array ``(H, W, 3)``, ``(H, W, 1)`` or ``(H, W)``.
        page: of a file: frame of an animation or page of a TIFF, from 0 on.

    Raises:
        TypeError: neither path, PIL image nor uint8 array.
        ValueError: no pixels, a wrong number of channels, a mode without a defined range (F), or 32-bit values outside
            16 bits.
        OSError: a file that does not exist, cannot be decoded or has no such page, naming it.
    """
    if isinstance(image, Image.Image):
        return _to_rgb(ImageOps.exif_transpose(image))
    if isinstance(image, (str, os.PathLike)):
        check_regular(image)
        _register_heif(image)
        try:
            with Image.open(image) as opened:
                seek_page(opened, page)
                opened.load()
                upright = ImageOps.exif_transpose(opened)
        except (FileNotFoundError, IsADirectoryError, PermissionError):
            raise  # these name the file themselves
        except _UNREADABLE as error:
            raise OSError(f"image {os.fspath(image)} cannot be read: {error}") from error
        return _to_rgb(upright)
    if not isinstance(image, np.ndarray):
        hint = "; the model's own methods take tensors" if isinstance(image, Tensor) else ""
        raise TypeError(f"image must be a path, a PIL image or a uint8 array, got {type(image).__name__}{hint}")
    if image.dtype != np.uint8:
        hint = ""
        if image.dtype.kind == "f":
            hint = "; for values in [0, 1] give (image * 255).round().astype('uint8')"
        elif image.dtype == np.uint16:
            hint = "; for 16-bit values give (image // 257).astype('uint8')"
        raise TypeError(f"image must be a uint8 array, got {image.dtype}{hint}")
    pixels = image[..., None] if image.ndim == 2 else image
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        hint = "; move the channels last" if pixels.ndim == 3 and pixels.shape[0] in (1, 3) else ""
        raise ValueError(f"image must be (H, W, 3), (H, W, 1) or (H, W), got {pixels.shape}{hint}")
    if pixels.size == 0:
        raise ValueError(f"image must have at least one pixel, got {pixels.shape}")
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def normalise(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float], device: torch.device) -> Tensor:
    """``(H, W, 3)`` uint8 -> ``(1, 3, H, W)`` float32 on the device: scaled to [0, 1], minus mean, divided by std."""
    images = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).to(device)
    images = images.permute(2, 0, 1)[None].contiguous().to(torch.float32)
    shift, scale = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (mean, std))
    return images.div_(255).sub_(shift).div_(scale)


def seek_page(opened: Image.Image, page: int) -> None:
    """Go to a page of an open image.

    Raises:
        ValueError: it has no such page.
    """
    if page:
        pages = getattr(opened, "n_frames", 1)
        if not 0 < page < pages:
            known = f"the pages 0 to {pages - 1}" if pages > 1 else "one page, 0,"
            raise ValueError(f"it has {known} and no page {page}")
        opened.seek(page)


def count_pages(path: str | os.PathLike[str]) -> int:
    """Return the frames of an animation or the pages of a TIFF, without thumbnails and masks; 1 for other files."""
    try:
        with warnings.catch_warnings(), Image.open(path) as opened:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            if opened.format not in _PAGED or not getattr(opened, "is_animated", False):
                return 1
            kinds = []  # of the pages of a TIFF
            for page in range(opened.n_frames):  # type: ignore[attr-defined]
                opened.seek(page)
                kinds.append(getattr(opened, "tag_v2", {}).get(_SUBFILE, 0))
            return sum(not kind & _REDUCED_OR_MASK for kind in kinds)
    except (*_UNREADABLE, TypeError):
        return 1  # the reader raises a better error


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuse a pipe, a socket or a device: reading it could wait for ever."""
    if not os.path.isfile(path) and not os.path.isdir(path) and os.path.exists(path):
        raise OSError(f"image {os.fspath(path)} cannot be read: it is no regular file")


def _register_heif(path: str | os.PathLike[str]) -> None:
    """Let Pillow read HEIC where pillow-heif is installed.

    Raises:
        OSError: it is not.
    """
    if not os.fspath(path).lower().endswith(HEIF_SUFFIXES):
        return
    try:
        import pillow_heif
    except ImportError:
        raise OSError(f"image {os.fspath(path)} cannot be read: HEIC needs pip install pillow-heif") from None
    pillow_heif.register_heif_opener()


def _is_large(path: str, page: int) -> bool:
    try:
        with Image.open(path) as opened:
            seek_page(opened, page)
            return opened.width * opened.height > LARGE_PIXELS
    except Image.DecompressionBombError:
        return True
    except (OSError, SyntaxError, ValueError):
        return False  # read_image raises a better error


def _to_rgb(image: Image.Image) -> np.ndarray:
    if min(image.size) < 1:
        raise ValueError(f"image must have at least one pixel, got {image.width} x {image.height}")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return np.stack([to_eight_bits(np.asarray(image))] * 3, 2)
    if image.mode == "F":
        raise ValueError("image has mode F, whose floating point values have no defined range; convert it to uint8")
    try:
        return np.array(image.convert("RGB"))
    except ValueError as error:
        raise ValueError(f"image has mode {image.mode}, which cannot be converted to RGB: {error}") from error
