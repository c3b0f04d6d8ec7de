"""Two folders of made results: news is only what lies outside the noise of both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from segmenter_fast.benchmarks import compare
from segmenter_fast.benchmarks.cases import OURS, Row
from segmenter_fast.benchmarks.device import Ceilings, describe
from segmenter_fast.benchmarks.results import Result, write
from segmenter_fast.benchmarks.timing import Timing

MIB = 2**20
CASE = {"op": "attention", "tokens": 17}


def row(variant: str, median: float, mebibytes: int = 10) -> Row:
    """Ten percent of spread to either side."""
    timing = Timing(median, 0.9 * median, 1.1 * median, 10, 1, 1, "perf_counter", mebibytes * MIB)
    return Row(variant, "ok", "", 1e-7, timing, 1.0, None, 0.1)


def folder(path: Path, *rows: Row, slug: str = "one-device", case: dict[str, object] = CASE) -> Path:
    record = replace(describe(torch.device("cpu")), slug=slug)
    found = Result("attention", record, Ceilings(10.0, {}), "2026-01-01T00:00:00+00:00", True, [(case, list(rows))])
    return write(found, path).parent


def test_what_is_within_the_noise_is_no_news(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = folder(tmp_path / "a", row(OURS, 1.0)), folder(tmp_path / "b", row(OURS, 1.2))
    assert compare.main([str(a), str(b)]) == 0, "0.9 .. 1.1 and 1.08 .. 1.32 touch"
    assert "0 worse, 0 better, 1 within the noise" in capsys.readouterr().out


def test_a_slower_one_of_ours_is_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = folder(tmp_path / "a", row(OURS, 1.0)), folder(tmp_path / "b", row(OURS, 1.3))
    assert compare.main([str(a), str(b)]) == 1
    out = capsys.readouterr().out
    assert "1.30x" in out
    assert "op=attention, tokens=17" in out
    assert compare.main([str(b), str(a)]) == 0, "the other way round it got faster"
    assert "0 worse, 1 better" in capsys.readouterr().out


def test_a_slower_peer_is_told_but_no_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = folder(tmp_path / "a", row(OURS, 1.0), row("eager", 1.0))
    b = folder(tmp_path / "b", row(OURS, 1.0), row("eager", 2.0))
    assert compare.main([str(a), str(b)]) == 0
    assert "1 worse" in capsys.readouterr().out


def test_ours_compiled_is_ours_and_memory_counts(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", row("ours compiled", 1.0, mebibytes=100))
    b = folder(tmp_path / "b", row("ours compiled", 1.0, mebibytes=110))
    (change,) = compare.compare(a, b).changes
    assert (change.figure, change.worse) == ("peak memory", True)
    assert compare.main([str(a), str(b)]) == 1
    nearly = folder(tmp_path / "c", row("ours compiled", 1.0, mebibytes=104))
    assert not compare.compare(a, nearly).changes


def test_figures_that_are_gone_are_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = folder(tmp_path / "a", row(OURS, 1.0))
    b = folder(tmp_path / "b", Row(OURS, "out of memory", "no room"))
    assert compare.main([str(a), str(b)]) == 1
    assert "out of memory: no room" in capsys.readouterr().out


def test_a_case_that_is_refused_now_is_a_regression(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", row(OURS, 1.0))
    record = replace(describe(torch.device("cpu")), slug="one-device")
    cases = [(CASE, [row(OURS, 1.0)])]
    found = Result("attention", record, Ceilings(10.0, {}), "", True, cases, refused=["attention: ours disagrees"])
    assert compare.compare(a, write(found, tmp_path / "b").parent).regressed


def test_other_parameters_are_other_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = folder(tmp_path / "a", row(OURS, 1.0))
    b = folder(tmp_path / "b", row(OURS, 9.0), case=CASE | {"tokens": 18})
    assert compare.main([str(a), str(b)]) == 2
    assert "no case and variant in common" in capsys.readouterr().err


def test_other_devices_are_refused_unless_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = folder(tmp_path / "a", row(OURS, 1.0))
    b = folder(tmp_path / "b", row(OURS, 0.1), slug="another-device")
    assert compare.main([str(a), str(b)]) == 2
    assert "one-device" in capsys.readouterr().err
    assert compare.main([str(a), str(b), "--force"]) == 0


def test_an_empty_folder_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([str(tmp_path), str(tmp_path)]) == 2
    assert "no result files" in capsys.readouterr().err
