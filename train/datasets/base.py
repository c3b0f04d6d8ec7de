"""The interface of a data set."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ...classes import Color

IGNORE = 255
"""Label of pixels that count neither in the loss nor in the scores."""


class SampleError(OSError):
    """An image or its labels cannot be read, or do not fit each other. The message names the file."""


class SegmentationDataset(Protocol):
    """Images with a class for every pixel."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def palette(self) -> tuple[Color, ...]:
        """RGB, 0 to 255, one for each class."""
        ...

    @property
    def ignore_index(self) -> int: ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Read ``(H, W, C)`` pixels, see ``Raster.read``, and ``(H, W)`` uint8 or int32 labels.

        Labels are 0 to K - 1, or ``ignore_index``.

        Raises:
            SampleError: a file is missing or unreadable, or image and labels differ in size.
            ValueError: a label outside the classes, which is a mistake in the class list rather than in one file.
        """
        ...

    def name(self, index: int) -> str:
        """Return a name for messages and files: a relative path without suffix, different for every index."""
        ...
