"""What the training program takes as a data set."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ...classes import Color

IGNORE = 255
"""The label of pixels that count neither in the loss nor in the scores."""


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
        """``(H, W, 3)`` uint8 RGB and ``(H, W)`` uint8 or int32: 0 to K - 1, or ``ignore_index``.

        Raises:
            SampleError: a file is missing or unreadable, or image and labels differ in size.
            ValueError: a label that is none of the classes: a mistake in the class list rather than in one file.
        """
        ...

    def name(self, index: int) -> str:
        """For messages and output files: relative, without a suffix, different for every index."""
        ...
