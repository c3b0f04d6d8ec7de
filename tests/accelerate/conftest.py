"""The ops that a test called; linear layers are as on most machines."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from segmenter_fast import kernels
from segmenter_fast.accelerate import forwards


@pytest.fixture(autouse=True)
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the linear layers also where oneDNN is faster."""
    monkeypatch.setattr(forwards, "onednn_beats_mkl", lambda: False)


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
