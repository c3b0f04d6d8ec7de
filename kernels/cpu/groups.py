"""Groups of patches that share their scores, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor


def used_groups(index: Tensor, groups: int, name: str = "index") -> int:
    """Number of groups up to the last one that an ``index``, called ``name``, has; those behind it may hold anything.

    Raises:
        IndexError: an index is not in [0, ``groups``).
    """
    if not index.numel():
        return groups
    smallest, largest = (int(value) for value in index.aminmax())
    if smallest < 0 or largest >= groups:
        raise IndexError(f"{name} must be in [0, {groups}), got {smallest if smallest < 0 else largest}")
    return largest + 1
