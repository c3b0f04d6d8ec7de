"""Large images of any format through libvips (pyvips), a band of rows at a time."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .images import to_eight_bits
from .tiff import NotByRowsError


class VipsRaster:
    """A file that libvips reads, upright and as RGB."""

    def __init__(self, path: str) -> None:
        """Opens ``path``.

        Raises:
            NotByRowsError: pyvips is not installed, or libvips knows no such pixels or format.
        """
        try:
            import pyvips
        except (ImportError, OSError) as error:  # OSError: the package without its library
            raise NotByRowsError("pyvips is not installed") from error
        self.path, self._error = path, pyvips.Error
        try:
            self._image = pyvips.Image.new_from_file(path, access="random", fail_on="error").autorot()
        except pyvips.Error as error:
            raise NotByRowsError(f"libvips cannot open it: {_first_line(error)}") from error
        self.height, self.width = int(self._image.height), int(self._image.width)
        kind = self._image.format, self._image.interpretation
        if self._image.format not in ("uchar", "ushort") or kind[1] in ("lab", "labs", "labq", "xyz", "multiband"):
            raise NotByRowsError(f"libvips gives pixels of {kind[0]} {kind[1]}, which have no defined RGB of 8 bits")

    def read(self, top: int, bottom: int) -> np.ndarray:
        try:
            pixels = self._image.crop(0, top, self.width, bottom - top).numpy()
        except self._error as error:
            raise OSError(f"image {self.path} cannot be read: {_first_line(error)}") from error
        pixels = pixels.reshape(bottom - top, self.width, -1)
        if self._image.interpretation == "cmyk":
            whole = np.ascontiguousarray(pixels[..., :4])
            return np.asarray(Image.frombytes("CMYK", (self.width, bottom - top), whole.tobytes()).convert("RGB"))
        grey = pixels.shape[2] < 3
        if pixels.dtype == np.uint16:
            pixels = to_eight_bits(pixels[..., :1]) if grey else (pixels >> 8).astype(np.uint8)
        return np.repeat(pixels[..., :1], 3, 2) if grey else np.ascontiguousarray(pixels[..., :3])


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[-1].strip()
