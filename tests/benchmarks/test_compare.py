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


def folder(path: Path, *rows: Row, slug: str = "one-device", kind: str = "cpu", case: dict[str, object] = CASE) -> Path:
    record = replace(describe(torch.device("cpu")), slug=slug, type=kind)
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


def test_what_all_peers_did_is_the_machine(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", row(OURS, 1.0), row("eager", 1.0), row("compile", 1.0))
    for number, (ours, eager, compiled, news) in enumerate(
        [
            (1.6, 1.5, 1.4, {}),
            (2.0, 1.5, 1.4, {OURS: True}),
            (1.6, 1.6, 0.6, {OURS: True, "eager": True, "compile": False}),
            (0.5, 0.6, 0.5, {}),
        ]
    ):
        b = folder(tmp_path / f"b{number}", row(OURS, ours), row("eager", eager), row("compile", compiled))
        assert {change.variant: change.worse for change in compare.compare(a, b).changes} == news, number


def test_runs_of_one_program_differ_by_more_than_their_spreads(tmp_path: Path) -> None:
    def narrow(median: float) -> Row:
        return Row(OURS, "ok", "", 1e-7, Timing(median, median, median, 10, 1, 1, "perf_counter", None), 1.0, None, 0.1)

    a = folder(tmp_path / "a", narrow(1.0))
    assert compare.compare(a, folder(tmp_path / "b", narrow(1.029))).same == 1
    assert compare.compare(a, folder(tmp_path / "c", narrow(1.031))).regressed


@pytest.mark.parametrize(("kind", "before", "little", "much"), [("cuda", 100, 104, 106), ("cpu", 100, 139, 141)])
def test_ours_compiled_is_ours_and_memory_counts(
    tmp_path: Path, kind: str, before: int, little: int, much: int
) -> None:
    a, same, more = (
        folder(tmp_path / str(size), row("ours compiled", 1.0, mebibytes=size), kind=kind)
        for size in (before, little, much)
    )
    (change,) = compare.compare(a, more).changes
    assert (change.figure, change.worse) == ("peak memory", True)
    assert compare.main([str(a), str(more)]) == 1
    assert not compare.compare(a, same).changes


def test_figures_that_are_gone_are_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = folder(tmp_path / "a", row(OURS, 1.0))
    b = folder(tmp_path / "b", Row(OURS, "out of memory", "no room"))
    assert compare.main([str(a), str(b)]) == 1
    assert "out of memory: no room" in capsys.readouterr().out


def test_what_a_budget_left_out_is_in_one_folder_only(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", row(OURS, 1.0), row("eager", 1.0))
    found = compare.compare(a, folder(tmp_path / "b", Row(OURS, "not run", "no time"), row("eager", 1.0)))
    assert (found.regressed, found.same, found.only) == (False, 1, 1)


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
