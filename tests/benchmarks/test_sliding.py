"""Sliding windows: the canvas method and ours agree, large canvases are absent, a wrong result is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from segmenter_fast.benchmarks import ops, runner
from segmenter_fast.benchmarks.ops import run_ops, sliding
from segmenter_fast.benchmarks.ops.sliding import sliding_case
from segmenter_fast.benchmarks.results import read
from support.benchmarks import CEILINGS, CPU, timed_rows


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WINDOW", 64), ("STRIDE", 48), ("CLASSES", 7)):
        monkeypatch.setattr(sliding, name, value)
    monkeypatch.setitem(sliding.SMALL, "depth", 1)
    monkeypatch.setattr(runner, "measure_ceilings", lambda *args, **kwargs: CEILINGS)


@pytest.mark.parametrize("side", [100, 150])
def test_both_agree_and_are_timed(side: int) -> None:
    rows = timed_rows(sliding_case(CPU, side))
    assert list(rows) == ["eager", "ours"]
    for row in rows.values():
        assert row.status == "ok", row.note
        assert row.timing is not None
        assert row.error is not None
        assert row.error < 1e-5


def test_a_canvas_that_is_too_large_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sliding, "LARGEST_CANVAS", 1000)
    rows = timed_rows(sliding_case(CPU, 100))
    assert rows["eager"].status == "absent"
    assert "the canvas takes" in rows["eager"].note
    assert rows["ours"].status == "ok"


def test_the_command_writes_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ops.NAMED, "sliding", lambda device, quick: [sliding_case(device, 80)])
    assert run_ops(["sliding"], device=CPU, quick=True, out=tmp_path) == 0
    (path,) = tmp_path.glob("*/sliding.json")
    ((parameters, rows),) = read(path).cases
    assert parameters["side"] == 80
    assert [row.status for row in rows] == ["ok", "ok"]
    path.unlink()
    monkeypatch.setattr(sliding, "slide", lambda *_: torch.zeros(80, 80, dtype=torch.uint8))
    assert run_ops(["sliding"], device=CPU, quick=True, out=tmp_path) == 1
    assert not path.exists()
    assert "refused" in capsys.readouterr().out
