"""Images that Pillow reads: their pages, and their bands as pixels."""

from __future__ import annotations

import os
import struct
import warnings

import numpy as np
from PIL import Image, ImageOps

from .channels import Channels, to_unit, warn_if_dark
from .large_images import to_eight_bits
from .walk import HEIF_SUFFIXES

_PAGED = ("GIF", "PNG", "TIFF", "WEBP")
_SUBFILE, _REDUCED_OR_MASK = 254, 5
# Errors of Pillow on files that are cut short or no images.
UNREADABLE = (OSError, SyntaxError, EOFError, ValueError, struct.error, Image.DecompressionBombError)


def read_by_pillow(path: str, page: int, channels: Channels, reasons: list[str]) -> np.ndarray:
    """Read the pixels of a file, see ``read_image``.

    Args:
        reasons: why another reader could not.
    """
    try:
        with Image.open(path) as opened:
            seek_page(opened, page)
            raw = opened.tile[0][3] if opened.tile else ""
            opened.load()
            upright = ImageOps.exif_transpose(opened)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise  # these name the file themselves
    except UNREADABLE as error:
        more = f"; {'; '.join(reasons)}" if reasons else ""
        raise OSError(f"image {path} cannot be read: {error}{more}") from error
    wide = ";16" in str(raw) or upright.mode.startswith("I")
    if wide and not channels.colours and not upright.mode.startswith("I"):
        raise OSError(f"image {path} cannot be read: Pillow makes 8 bits of its 16; convert it to TIFF")
    pixels = to_pixels(upright, channels)
    if wide:
        warn_if_dark(pixels, channels.scale)
    return pixels


def to_pixels(image: Image.Image, channels: Channels) -> np.ndarray:
    """Return the bands of an image in memory; colours that are no RGB, grey or transparency become R, G, B."""
    if min(image.size) < 1:
        raise ValueError(f"image must have at least one pixel, got {image.width} x {image.height}")
    if channels.colours:
        return _to_rgb(image)
    if image.mode not in ("L", "LA", "RGB", "RGBA", "I", "F") and not image.mode.startswith("I;16"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    values = np.asarray(image)
    if image.mode == "I" and values.min() >= 0 and values.max() <= 65535:
        values = values.astype(np.uint16)  # as older Pillow reads 16-bit PNG
    values = values[..., None] if values.ndim == 2 else values
    return to_unit(values[..., channels.pick(values.shape[2], image.mode.endswith("A"))], channels.scale)


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
    except (*UNREADABLE, TypeError):
        return 1  # the reader raises a better error


def check_regular(path: str | os.PathLike[str], what: str = "image") -> None:
    """Refuse a pipe, a socket or a device: reading it could wait for ever."""
    if not os.path.isfile(path) and not os.path.isdir(path) and os.path.exists(path):
        raise OSError(f"{what} {os.fspath(path)} cannot be read: it is no regular file")


def register_heif(path: str | os.PathLike[str]) -> None:
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


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return np.stack([to_eight_bits(np.asarray(image))] * 3, 2)
    if image.mode == "F":
        raise ValueError("image has mode F, floating point without a defined range: name what stands for 1 by --scale")
    try:
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except ValueError as error:
        raise ValueError(f"image has mode {image.mode}, which cannot be converted to RGB: {error}") from error
