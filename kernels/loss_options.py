"""Options of ``upsample_cross_entropy`` as its backends take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class LossOptions(NamedTuple):
    """The options of the public op, checked, in the order of the operator's schema."""

    size: Sequence[int]  # (H, W) of the resize; the target is its top-left crop
    ignore_index: int
    weight: Tensor | None  # (K,), contiguous, in the dtype of statistics
    label_smoothing: float
    reduction: str  # "mean", "sum" or "none"
    align_corners: bool
