"""Images with labels: folders, and a procedural set."""

from .base import IGNORE, SampleError, SegmentationDataset
from .layouts import KINDS, open_dataset

__all__ = ["IGNORE", "KINDS", "SampleError", "SegmentationDataset", "open_dataset"]
