"""Plots come from the JSON alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from segmenter_fast.benchmarks.case import OURS, Row
from segmenter_fast.benchmarks.device import Ceilings, describe
from segmenter_fast.benchmarks.ops import OPS
from segmenter_fast.benchmarks.plot_style import TITLES
from segmenter_fast.benchmarks.plots import UPSAMPLE, draw
from segmenter_fast.benchmarks.results import RESULTS, Result, read, write
from support.benchmarks import CPU, timing_of

OPS_DRAWN = ("attention", "training", "split", "classes", "throughput", "upsample_argmax", "upsample_softmax")
COMMITTED = sorted(path for path in RESULTS.glob("*/*.json") if path.stem in OPS_DRAWN)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_committed_file_is_drawn(path: Path, tmp_path: Path) -> None:
    found = read(path)
    (drawn,) = draw(write(found, tmp_path).parent)
    assert drawn.name == f"{'upsample' if path.stem in UPSAMPLE else path.stem}.png"
    assert drawn.stat().st_size > 10_000


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_plots_are_complete(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Figure] = []
    monkeypatch.setattr("matplotlib.pyplot.close", kept.append)
    draw(write(read(path), tmp_path).parent)
    (figure,) = kept
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert shown
    assert all(axes.get_title() and axes.get_ylabel() for axes in shown)
    times = [axes for axes in shown if "MiB" not in axes.get_ylabel()]
    assert all(any(isinstance(each, ErrorbarContainer) for each in axes.containers) for axes in times)
    assert figure.get_suptitle().splitlines()[0] in TITLES.values()
    width = figure.bbox.width
    (legend,) = figure.legends
    for box in (legend.get_window_extent(), figure._suptitle.get_window_extent()):
        assert 0 <= box.x0 < box.x1 <= width


def test_absent_variants_and_cases_without_figures_are_left_out(tmp_path: Path) -> None:
    rows = [Row(OURS, "ok", "", 1e-7, timing_of(2.0), 1.0, 0.1, 0.3), Row("SDPA cuDNN", "absent", "for CUDA only")]
    cases = [(case.parameters, rows) for case in OPS["attention"](CPU, True)]
    result = Result("attention", describe(CPU), Ceilings(10.0, {"float32": 0.3}), "2026", True, cases)
    (plot,) = draw(write(result, tmp_path).parent)
    assert plot.name == "attention.png"
    nothing = Result("attention", result.device, result.ceilings, "2026", True, [(cases[0][0], rows[1:])])
    assert draw(write(nothing, tmp_path / "nothing").parent) == []
