"""Plots come from the JSON alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from segmenter_fast.benchmarks.case import OURS, Row
from segmenter_fast.benchmarks.device import Ceilings, describe
from segmenter_fast.benchmarks.ops import OPS
from segmenter_fast.benchmarks.plots import draw
from segmenter_fast.benchmarks.results import RESULTS, Result, read, write
from support.benchmarks import CPU, timing_of

OPS_DRAWN = ("attention", "training", "split", "classes", "throughput")
COMMITTED = sorted(path for path in RESULTS.glob("*/*.json") if path.stem in OPS_DRAWN)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_committed_file_is_drawn(path: Path, tmp_path: Path) -> None:
    found = read(path)
    (drawn,) = draw(write(found, tmp_path).parent)
    assert drawn.name == f"{path.stem}.png"
    assert drawn.stat().st_size > 10_000


def test_absent_variants_and_cases_without_figures_are_left_out(tmp_path: Path) -> None:
    rows = [Row(OURS, "ok", "", 1e-7, timing_of(2.0), 1.0, 0.1, 0.3), Row("SDPA cuDNN", "absent", "for CUDA only")]
    cases = [(case.parameters, rows) for case in OPS["attention"](CPU, True)]
    result = Result("attention", describe(CPU), Ceilings(10.0, {"float32": 0.3}), "2026", True, cases)
    (plot,) = draw(write(result, tmp_path).parent)
    assert plot.name == "attention.png"
    nothing = Result("attention", result.device, result.ceilings, "2026", True, [(cases[0][0], rows[1:])])
    assert draw(write(nothing, tmp_path / "nothing").parent) == []
