"""``swap_in.json``: models of others before and after ``accelerate``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from segmenter_fast.benchmarks.models import swap_in
from segmenter_fast.benchmarks.report.tables import measured


def test_loops_of_both_forms_are_measured(tmp_path: Path) -> None:
    cases = swap_in.run_swap_in(device=torch.device("cpu"), seconds=0.01, out=tmp_path, side=32)
    assert [case["loop"] for case, _ in cases] == ["forward, argmax", "training step", "loss, backward"]
    assert all(row.timing and row.timing.peak_bytes is not None for _, rows in cases for row in rows)
    (folder,) = tmp_path.iterdir()
    table = measured(folder)
    assert "official T/16 32 px, training step |" in table
    assert "SegFormer's scores 64 px, loss, backward |" in table


def test_a_result_that_differs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap_in, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="forward, argmax: the results of the accelerated model differ"):
        swap_in.run_swap_in(device=torch.device("cpu"), seconds=0.01, out=tmp_path, side=32)
