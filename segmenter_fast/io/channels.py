"""Bands of an image as the channels of a model: which are taken, and which value stands for 1."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

DARK = 1 / 8
"""Share of the range; an image that stays below it was probably scaled by another value than its own."""


@dataclass(frozen=True)
class Channels:
    """Bands of an image that a model takes, in their order.

    Raises:
        ValueError: bands that are not ``count`` numbers from 1 on, or a scale that is not positive.
    """

    count: int = 3
    bands: tuple[int, ...] = ()
    """Counted from 1, as GDAL counts them; empty: the file's colours, or all bands."""
    scale: float | None = None
    """Value that stands for 1; None: 255 for 8 bits, 65535 for 16."""

    def __post_init__(self) -> None:
        if self.bands and (len(self.bands) != self.count or min(self.bands) < 1):
            given = ",".join(map(str, self.bands))
            raise ValueError(f"--bands must name {self.count} bands, counted from 1, as the model takes, got {given}")
        if self.scale is not None and not 0 < self.scale < float("inf"):
            raise ValueError(f"--scale must be a positive number, got {self.scale}")

    @property
    def colours(self) -> bool:
        """True where an image's colours are wanted as RGB of 8 bits, the default."""
        return self == RGB

    def pick(self, found: int, alpha: int = 0) -> list[int]:
        """Return the indices of the bands of an image; grey becomes three equal channels.

        Args:
            found: bands of the image.
            alpha: how many of them, the last, are transparency, which is left out where the model takes fewer.

        Raises:
            ValueError: the image has another number of bands than the model takes, and none are named.
        """
        pages = "" if found > 1 else "; bands that are pages of a file are not read: write them into one page"
        if self.bands:
            if max(self.bands) > found:
                have = f"{found} band{'s' if found > 1 else ''}"
                raise ValueError(f"the image has {have}, there is no band {max(self.bands)} for --bands{pages}")
            return [band - 1 for band in self.bands]
        if self.count in (found, found - alpha):
            return list(range(self.count))
        if (self.count, found - alpha) == (3, 1):
            return [0] * 3
        some = ",".join(str(band % found + 1) for band in range(self.count))
        raise ValueError(
            f"the image has {found} band{'s' if found > 1 else ''} (1 to {found}), and the model takes {self.count}: "
            f"name them by --bands, such as --bands {some} (bands= in Python){pages}"
        )


RGB = Channels()


def to_unit(values: np.ndarray, scale: float | None) -> np.ndarray:
    """``(h, w, C)`` -> float32, where ``scale`` stands for 1; uint8 without a scale is returned as it is.

    Raises:
        ValueError: values of a dtype without a defined range and no scale, or values that are NaN or infinite.
    """
    if scale is None and values.dtype == np.uint8:
        return values
    if scale is None and values.dtype != np.uint16:
        raise ValueError(
            f"image has values of {values.dtype}, which have no defined range: name the value that stands for 1 by "
            "--scale (scale= in Python)"
        )
    pixels = values.astype(np.float32)
    if not np.isfinite(pixels).all():
        raise ValueError("image has pixels that are NaN or infinite; fill them, with gdal_fillnodata for example")
    pixels /= np.float32(scale or 65535)
    return pixels


def warn_if_dark(pixels: np.ndarray, scale: float | None) -> None:
    """Warn of pixels, uint8 or with 1 for ``scale``, that use a small part of the range, but are not blank."""
    if 0 < float(pixels.max()) / (255 if pixels.dtype == np.uint8 else 1) < DARK:
        used = "range of its values; if they have 12 bits in a file of 16, --scale 4095"
        if scale is not None:
            used = f"range up to the scale, {scale:g}; a smaller --scale"
        told = f"an image uses less than an eighth of the {used} (scale= in Python) makes it as bright as others"
        warnings.warn(told, stacklevel=3)
