"""The ops that a test called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from segmenter_fast import kernels


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the called ops, in order."""
    called: list[str] = []

    def counted(name: str) -> Callable[..., Tensor]:
        op = getattr(kernels, name)
        return lambda *args: called.append(name) or op(*args)

    for name in ("attention", "mask_scores"):
        monkeypatch.setattr(kernels, name, counted(name))
    return called
