"""Attention in Triton: what ``attention_forward`` and ``attention_backward`` hold, under one name."""

from __future__ import annotations

from collections.abc import Iterator

from . import attention_backward as _backward
from . import attention_forward as _forward
from .attention_backward import attention_backward
from .attention_forward import attention_forward
from .common import Specialization

__all__ = ["attention_backward", "attention_forward", "specializations"]


def specializations(arch: str) -> Iterator[Specialization]:
    """Every build of the three kernels that ``launch_config`` can ask for on ``arch``."""
    yield from _forward.specializations(arch)
    yield from _backward.specializations(arch)
