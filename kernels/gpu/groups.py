"""Groups of patches that share their scores: where kernels find those."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def strides_on_grid(masks: Tensor, index: Tensor | None) -> Sequence[int]:
    """Strides ``(B, K, h, w)`` of masks; with an index ``(B, K, 0, groups)``."""
    strides = masks.stride()
    return strides if index is None else (*strides[:2], 0, strides[2])


def contiguous(index: Tensor | None) -> Tensor | None:
    """The index as the kernels take it."""
    return None if index is None else index.contiguous()
