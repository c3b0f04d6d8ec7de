"""An image in memory, read as if it were a file of rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Pixels:
    """``(H, W, 3)`` uint8 as a ``Raster``."""

    pixels: np.ndarray

    @property
    def height(self) -> int:
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        return int(self.pixels.shape[1])

    def read(self, top: int, bottom: int) -> np.ndarray:
        return self.pixels[top:bottom]
