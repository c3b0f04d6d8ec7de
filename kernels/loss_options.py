"""Options of ``upsample_cross_entropy`` as its backends take them, and the size of what its Triton kernel leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

SEGMENT = 4  # cells of one row that a program of the Triton kernel owns, one after the other


class LossOptions(NamedTuple):
    """The options of the public op, checked, in the order of the operator's schema."""

    size: Sequence[int]  # (H, W) of the resize; the target is its top-left crop
    ignore_index: int
    weight: Tensor | None  # (K,), contiguous, in the dtype of statistics
    label_smoothing: float
    reduction: str  # "mean", "sum" or "none"
    align_corners: bool
    groups: Tensor | None = None  # (B, h, w), of the patches: the masks are those of groups


def size_of_parts(batch: int, num_classes: int, height: int, width: int) -> int:
    """Elements of the parts ``(B, h, columns, 2, K)`` of a gradient, and one for the scale behind them.

    Each row of cells has parts for the inputs above and below it. A segment has one column more than cells, except the
    last one, whose last cell has no inputs to the right.
    """
    return batch * height * (width + -(-width // SEGMENT) - 1) * 2 * num_classes + 1
