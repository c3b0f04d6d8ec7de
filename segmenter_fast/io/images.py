"""From whatever holds an image to RGB pixels, and from pixels to what the model takes."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray

# What Pillow raises for files that are cut short or hold something else.
_UNREADABLE = (OSError, SyntaxError, EOFError, ValueError, struct.error, Image.DecompressionBombError)


def read_image(image: ImageSource) -> np.ndarray:
    """The RGB pixels of an image: ``(H, W, 3)`` uint8.

    Files and PIL images are turned upright as their EXIF orientation says. Transparency is dropped, not blended, as
    the official program does. 16-bit grey values (modes I;16 and I) are divided by 257 and rounded. Of a file with
    several frames the first is taken.

    Args:
        image: a path, a PIL image, or a uint8 array ``(H, W, 3)``, ``(H, W, 1)`` or ``(H, W)``.

    Raises:
        TypeError: neither path, PIL image nor uint8 array.
        ValueError: no pixels, a wrong number of channels, a mode without a defined range (F), or 32-bit values outside
            16 bits.
        OSError: a file that does not exist or cannot be decoded, naming it.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Image.Image):
        return _to_rgb(ImageOps.exif_transpose(image))
    if isinstance(image, (str, os.PathLike)):
        return _to_rgb(_open(image))
    hint = "; the model's own methods take tensors" if isinstance(image, Tensor) else ""
    raise TypeError(f"image must be a path, a PIL image or a uint8 array, got {type(image).__name__}{hint}")


def normalise(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float], device: torch.device) -> Tensor:
    """``(H, W, 3)`` uint8 -> ``(1, 3, H, W)`` float32 on the device: scaled to [0, 1], minus mean, divided by std."""
    images = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).to(device)
    images = images.permute(2, 0, 1)[None].contiguous().to(torch.float32)
    shift, scale = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (mean, std))
    return images.div_(255).sub_(shift).div_(scale)


def _open(path: str | os.PathLike[str]) -> Image.Image:
    try:
        with Image.open(path) as opened:
            opened.load()
            return ImageOps.exif_transpose(opened)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise  # these name the file themselves
    except _UNREADABLE as error:
        raise OSError(f"image {os.fspath(path)} cannot be read: {error}") from error


def _from_array(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8:
        hint = ""
        if array.dtype.kind == "f":
            hint = "; for values in [0, 1] give (image * 255).round().astype('uint8')"
        elif array.dtype == np.uint16:
            hint = "; for 16-bit values give (image // 257).astype('uint8')"
        raise TypeError(f"image must be a uint8 array, got {array.dtype}{hint}")
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3):
        hint = "; move the channels last" if array.ndim == 3 and array.shape[0] in (1, 3) else ""
        raise ValueError(f"image must be (H, W, 3), (H, W, 1) or (H, W), got {array.shape}{hint}")
    if array.size == 0:
        raise ValueError(f"image must have at least one pixel, got {array.shape}")
    return np.broadcast_to(array, (*array.shape[:2], 3))


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


def to_eight_bits(values: np.ndarray) -> np.ndarray:
    """Grey values of 16 bits -> uint8, rounded to nearest."""
    low, high = values.min(), values.max()
    if low < 0 or high > 65535:
        raise ValueError(f"image of integers must lie within 0 to 65535 (16 bits), got {low} to {high}")
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
