"""The canvas method and ours: agreement before time, canvases that are too large, a wrong result refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from segmenter_fast.benchmarks import run as run_module
from segmenter_fast.benchmarks import sliding
from segmenter_fast.benchmarks.cases import Case, Row, run_case
from segmenter_fast.benchmarks.device import Ceilings
from segmenter_fast.benchmarks.results import read
from segmenter_fast.benchmarks.sliding import make_case

CPU = torch.device("cpu")
CEILINGS = Ceilings(10.0, {"float32": 0.1})


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WINDOW", 64), ("STRIDE", 48), ("CLASSES", 7)):
        monkeypatch.setattr(sliding, name, value)
    monkeypatch.setitem(sliding.SMALL, "depth", 1)
    monkeypatch.setattr(run_module, "measure_ceilings", lambda *args, **kwargs: CEILINGS)


def run(case: Case) -> dict[str, Row]:
    return {row.variant: row for row in run_case(case, CEILINGS, seconds=0.02, min_samples=2)}


@pytest.mark.parametrize(("side", "scales", "flip"), [(150, (1.0,), False), (100, (0.75, 1.25), True)])
def test_both_agree_and_are_timed(side: int, scales: tuple[float, ...], flip: bool) -> None:
    rows = run(make_case(CPU, side, scales, flip))
    assert list(rows) == ["eager", "ours"]
    for row in rows.values():
        assert row.status == "ok", row.note
        assert row.timing is not None
        assert row.error is not None
        assert row.error < 1e-5


def test_a_canvas_that_is_too_large_is_absent() -> None:
    rows = run(make_case(CPU, 100, largest_canvas=1000))
    assert rows["eager"].status == "absent"
    assert "--largest-canvas" in rows["eager"].note
    assert rows["ours"].status == "ok"


def test_the_command_writes_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--sides", "80", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert sliding.main(arguments) == 0
    (path,) = tmp_path.glob("*/sliding.json")
    ((parameters, rows),) = read(path).cases
    assert parameters["side"] == 80
    assert [row.status for row in rows] == ["ok", "ok"]
    path.unlink()
    monkeypatch.setattr(sliding, "slide", lambda *_: torch.zeros(80, 80, dtype=torch.uint8))
    assert sliding.main(arguments) == 1
    assert not path.exists()
    assert "refused" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        sliding.main(["--sides", "10"])
