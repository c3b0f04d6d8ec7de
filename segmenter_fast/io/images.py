"""Images as pixels of the channels that a model takes, in memory or read by rows, and their normalisation."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .channels import RGB, Channels, to_unit, warn_if_dark
from .large_images import NotByRowsError, TiffRaster, VipsRaster
from .pillow_images import UNREADABLE, check_regular, count_pages, read_by_pillow, register_heif, seek_page, to_pixels

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray

LARGE_PIXELS = 1 << 26
"""Images with more pixels, 8192 x 8192, are read by rows, and their labels are written as tiled TIFF."""

_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class Raster(Protocol):
    """Pixels of the channels that a model takes, by default RGB, that are read a band of rows at a time."""

    height: int
    width: int

    def read(self, top: int, bottom: int) -> np.ndarray:
        """``(bottom - top, width, C)`` uint8, or float32 with 1 for the value 255 of 8 bits.

        Raises:
            OSError: the file cannot be decoded, naming it.
            ValueError: pixels without a defined meaning, such as NaN.
        """


class Pixels:
    """``(H, W, C)`` in memory as a ``Raster``."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels, self.height, self.width = pixels, pixels.shape[0], pixels.shape[1]

    def read(self, top: int, bottom: int) -> np.ndarray:
        return self.pixels[top:bottom]


def open_raster(image: ImageSource, page: int | None = None, channels: Channels = RGB) -> Raster:
    """Open an image with the pixels of ``read_image``, by rows where its file is large and its format allows it.

    Above ``LARGE_PIXELS`` a TIFF is read by tifffile, tile by tile or strip by strip, and any other file, or a TIFF
    that tifffile cannot decode by rows, by libvips; formats without random access (JPEG, PNG) libvips decodes once to
    a temporary file. Where neither is installed Pillow holds the whole image, up to its own limit.

    Args:
        page: of a file, from 0 on, as Pillow and tifffile count; None: the first, with a warning if there are others.
        channels: bands of the image that are wanted.

    Raises:
        TypeError, ValueError, OSError: as ``read_image``, and a file larger than what is installed can read.
    """
    if not isinstance(image, (str, os.PathLike)):
        return Pixels(read_image(image, 0, channels))
    path = os.fspath(image)
    tiff, reasons = _open_tiff(path, page or 0, channels)
    if page is None and (pages := count_pages(path)) > 1:
        warnings.warn(f"{path} has {pages} pages; the first is read, --page 1 is the second", stacklevel=2)
    page = page or 0
    if tiff is not None and tiff.height * tiff.width > LARGE_PIXELS:
        try:
            tiff.check_decodes()
            if tiff.wide:
                rows = range(0, tiff.height, -(-tiff.height // 8))
                warn_if_dark(np.concatenate([tiff.read(row, row + 1) for row in rows]), channels.scale)
            return tiff
        except NotByRowsError as reason:
            reasons.append(str(reason))
    with warnings.catch_warnings():  # a warning below Pillow's limit is about attacks, but the file is the user's
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        picked = tiff.picked if tiff is not None else None
        large = tiff.height * tiff.width > LARGE_PIXELS if tiff is not None and picked else _is_large(path, page)
        if not large:
            return Pixels(read_image(path, page, channels))
        try:
            return VipsRaster(path, page, channels, picked)
        except NotByRowsError as reason:
            reasons.append(str(reason))
        try:
            return Pixels(read_image(path, page, channels))
        except (OSError, MemoryError) as error:
            install = "pip install 'segmenter-fast[large]' has what large images need"
            raise OSError(f"{error}; by rows: {'; '.join(reasons)}; {install}") from error


def read_image(image: ImageSource, page: int = 0, channels: Channels = RGB) -> np.ndarray:
    """Read the pixels of an image, by default as RGB: ``(H, W, 3)`` uint8.

    Files and PIL images are turned upright as their EXIF orientation says. Transparency is dropped, not blended, as
    the official program does. 16-bit grey values (modes I;16 and I) are divided by 257 and rounded. A TIFF of several
    grey bands, and whatever is read for other ``channels``, gives ``(H, W, C)``: uint8, or float32 where values are not
    of 8 bits or a scale is named.

    Args:
        image: a path, a PIL image, or a uint8 array ``(H, W, 3)``, ``(H, W, 1)`` or ``(H, W)``. For other channels an
            array ``(H, W, bands)`` of any numbers.
        page: of a file: frame of an animation or page of a TIFF, from 0 on.
        channels: bands of the image that are wanted.

    Raises:
        TypeError: neither path, PIL image nor uint8 array.
        ValueError: no pixels, a wrong number of channels, values without a defined range (float) and no scale, or
            32-bit values outside 16 bits.
        OSError: a file that does not exist, cannot be decoded or has no such page, naming it.
    """
    if isinstance(image, Image.Image):
        return to_pixels(ImageOps.exif_transpose(image), channels)
    if isinstance(image, (str, os.PathLike)):
        path = os.fspath(image)
        tiff, reasons = _open_tiff(path, page, channels)
        if tiff is not None and tiff.picked is not None:
            return _read_bands(path, tiff, page, channels)
        return read_by_pillow(path, page, channels, reasons)
    if not isinstance(image, np.ndarray):
        hint = "; the model's own methods take tensors" if isinstance(image, Tensor) else ""
        raise TypeError(f"image must be a path, a PIL image or a uint8 array, got {type(image).__name__}{hint}")
    pixels = image[..., None] if image.ndim == 2 else image
    if not channels.colours:
        if pixels.ndim != 3 or pixels.size == 0 or pixels.dtype.kind not in "uif":
            raise ValueError(f"image must be (H, W, bands) numbers, got {pixels.shape} {pixels.dtype}")
        if pixels.shape[0] < pixels.shape[2]:
            raise ValueError(f"image must be (H, W, bands), got {pixels.shape}: fewer rows than bands; move bands last")
        return to_unit(pixels[..., channels.pick(pixels.shape[2])], channels.scale)
    if image.dtype != np.uint8:
        hint = ""
        if image.dtype.kind == "f":
            hint = "; for values in [0, 1] give (image * 255).round().astype('uint8'), or scale=1"
        elif image.dtype == np.uint16:
            hint = "; for 16-bit values give (image // 257).astype('uint8'), or scale=65535"
        raise TypeError(f"image must be a uint8 array, got {image.dtype}{hint}")
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        hint = "; bands= names three of its bands" if pixels.ndim == 3 else ""
        hint = "; move the channels last" if pixels.ndim == 3 and pixels.shape[0] in (1, 3) else hint
        raise ValueError(f"image must be (H, W, 3), (H, W, 1) or (H, W), got {pixels.shape}{hint}")
    if pixels.size == 0:
        raise ValueError(f"image must have at least one pixel, got {pixels.shape}")
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def normalise(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float], device: torch.device) -> Tensor:
    """``(H, W, C)`` -> ``(1, C, H, W)`` float32 on the device, minus mean, divided by std.

    uint8 is divided by 255 before; floating point is taken as it is.
    """
    images = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).to(device).permute(2, 0, 1)[None]
    if pixels.dtype == np.uint8:
        images = images.contiguous().to(torch.float32).div_(255)
    else:
        images = images.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    shift, scale = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std))
    return images.sub_(shift).div_(scale)


def _open_tiff(path: str, page: int, channels: Channels) -> tuple[TiffRaster | None, list[str]]:
    """Open a TIFF; None for another file, and where tifffile cannot: then with the reason."""
    check_regular(path)
    register_heif(path)
    with open(path, "rb") as file:
        is_tiff = file.read(4) in _TIFF_STARTS
    try:
        return (TiffRaster(path, page, channels) if is_tiff else None), []
    except NotByRowsError as reason:
        return None, [str(reason)]


def _read_bands(path: str, tiff: TiffRaster, page: int, channels: Channels) -> np.ndarray:
    """Read a whole TIFF that Pillow does not read, by libvips where tifffile lacks the codec.

    Raises:
        OSError: neither can, naming the file.
    """
    raster: TiffRaster | VipsRaster = tiff
    try:
        tiff.check_decodes()
    except NotByRowsError as reason:
        try:
            raster = VipsRaster(path, page, channels, tiff.picked)
        except NotByRowsError as other:
            raise OSError(f"image {path} cannot be read: {reason}; {other}") from other
    pixels = raster.read(0, raster.height)
    if tiff.wide:
        warn_if_dark(pixels, channels.scale)
    return pixels


def _is_large(path: str, page: int) -> bool:
    try:
        with Image.open(path) as opened:
            seek_page(opened, page)
            return opened.width * opened.height > LARGE_PIXELS
    except Image.DecompressionBombError:
        return True
    except UNREADABLE:
        return False  # read_image raises a better error
