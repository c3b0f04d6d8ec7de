"""Images with labels: folders, and a procedural set."""

from __future__ import annotations

import re
from pathlib import Path

from .base import IGNORE, SampleError, SegmentationDataset
from .layouts import LAYOUTS, SPLITS, kind_of, open_files
from .shapes import Shapes

__all__ = ["IGNORE", "KINDS", "SampleError", "SegmentationDataset", "open_dataset"]

KINDS = ("auto", *LAYOUTS, "shapes")


def open_dataset(data: str | Path, kind: str = "auto", split: str = "train") -> SegmentationDataset:
    """Open a split, "train" or "val", of the data set in a folder, or of the procedural one.

    Args:
        data: a folder, or "shapes" or "shapes:SEED" for the procedural data set.
        kind: one of ``KINDS``; "auto" goes by the content of the folder.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: an unknown kind or split, a folder of another layout, a split without images, or a class list that
            is missing or wrong; names what was looked for.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    shapes = re.fullmatch(r"shapes(?::(\d+))?", str(data))
    if kind == "shapes" or (kind == "auto" and shapes and not Path(data).exists()):
        if not shapes:
            raise ValueError(f"the shapes data set is 'shapes' or 'shapes:SEED', such as shapes:7, got {str(data)!r}")
        return Shapes.of_split(split, int(shapes[1] or 0))
    folder = Path(data)
    return open_files(folder, kind_of(folder) if kind == "auto" else kind, split)
