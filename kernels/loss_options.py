"""Options of ``upsample_cross_entropy`` as the backends hand them on."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LossOptions(NamedTuple):
    """Pixels and classes that count, as in ``torch.nn.functional.cross_entropy``."""

    ignore_index: int
    weight: Tensor | None  # (K,)
    label_smoothing: float
