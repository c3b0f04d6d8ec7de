"""Labels of bilinearly upsampled masks in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import reference


def upsample_argmax(masks: Tensor, size: Sequence[int], crop: Sequence[int], align_corners: bool) -> Tensor:
    """``(B, K, h, w)`` -> ``(B, H, W)``."""
    return reference.upsample_argmax(masks, tuple(size), tuple(crop), align_corners).contiguous()
