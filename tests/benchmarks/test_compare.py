"""Two folders of made-up results: only a difference beyond the noise of both is a change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from segmenter_fast.benchmarks.case import OURS, Row
from segmenter_fast.benchmarks.device import Ceilings, describe
from segmenter_fast.benchmarks.report.compare import compare
from segmenter_fast.benchmarks.results import RESULTS, Result, write
from segmenter_fast.cli import app
from support.benchmarks import timing_of

MIB = 2**20
CASE = {"op": "attention", "tokens": 17}


def row(variant: str, median: float, mebibytes: int = 10) -> Row:
    """Ten percent of spread to either side."""
    return Row(variant, "ok", "", 1e-7, timing_of(median, peak_bytes=mebibytes * MIB), 1.0, None, 0.1)


def folder(path: Path, *rows: Row, slug: str = "one-device", kind: str = "cpu", case: dict[str, object] = CASE) -> Path:
    record = replace(describe(torch.device("cpu")), slug=slug, type=kind)
    found = Result("attention", record, Ceilings(10.0, {}), "2026-01-01T00:00:00+00:00", True, [(case, list(rows))])
    return write(found, path).parent


def command(before: Path, after: Path, *options: str, code: int = 0) -> str:
    """The output of ``segmenter-fast bench compare``, which has to end with exit code ``code``."""
    result = CliRunner().invoke(app, ["bench", "compare", str(before), str(after), *options])
    assert result.exit_code == code, result.output
    return result.output


def test_what_is_within_the_noise_is_no_news(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a", row(OURS, 1.0)), folder(tmp_path / "b", row(OURS, 1.2))
    assert "0 worse, 0 better, 1 within the noise" in command(a, b), "0.9 .. 1.1 and 1.08 .. 1.32 touch"


def test_a_slower_one_of_ours_is_a_regression(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a", row(OURS, 1.0)), folder(tmp_path / "b", row(OURS, 1.3))
    out = command(a, b, code=1)
    assert "1.30x" in out
    assert "op=attention, tokens=17" in out
    assert "0 worse, 1 better" in command(b, a), "the other way round it got faster"


def test_a_slower_peer_is_told_but_no_regression(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", row(OURS, 1.0), row("eager", 1.0))
    b = folder(tmp_path / "b", row(OURS, 1.0), row("eager", 2.0))
    assert "1 worse" in command(a, b)


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
        assert {change.variant: change.worse for change in compare(a, b).changes} == news, number


def test_runs_of_one_program_differ_by_more_than_their_spreads(tmp_path: Path) -> None:
    def narrow(median: float) -> Row:
        return Row(OURS, "ok", "", 1e-7, timing_of(median, 0.0, None), 1.0, None, 0.1)

    a = folder(tmp_path / "a", narrow(1.0))
    assert compare(a, folder(tmp_path / "b", narrow(1.029))).same == 1
    assert compare(a, folder(tmp_path / "c", narrow(1.031))).regressed


@pytest.mark.parametrize(("kind", "before", "little", "much"), [("cuda", 100, 104, 106), ("cpu", 100, 139, 141)])
def test_ours_compiled_is_ours_and_memory_counts(
    tmp_path: Path, kind: str, before: int, little: int, much: int
) -> None:
    a, same, more = (
        folder(tmp_path / str(size), row("ours compiled", 1.0, mebibytes=size), kind=kind)
        for size in (before, little, much)
    )
    (change,) = compare(a, more).changes
    assert (change.figure, change.worse) == ("peak memory", True)
    command(a, more, code=1)
    assert not compare(a, same).changes


def test_figures_that_are_gone_are_a_regression(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", row(OURS, 1.0))
    b = folder(tmp_path / "b", Row(OURS, "out of memory", "no room"))
    assert "out of memory: no room" in command(a, b, code=1)


def test_what_a_budget_left_out_is_in_one_folder_only(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", row(OURS, 1.0), row("eager", 1.0))
    found = compare(a, folder(tmp_path / "b", Row(OURS, "not run", "no time"), row("eager", 1.0)))
    assert (found.regressed, found.same, found.only) == (False, 1, 1)


def test_a_case_that_is_refused_now_is_a_regression(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", row(OURS, 1.0))
    record = replace(describe(torch.device("cpu")), slug="one-device")
    cases = [(CASE, [row(OURS, 1.0)])]
    found = Result("attention", record, Ceilings(10.0, {}), "", True, cases, refused=["attention: ours disagrees"])
    assert compare(a, write(found, tmp_path / "b").parent).regressed


def test_other_parameters_are_other_rows(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", row(OURS, 1.0))
    b = folder(tmp_path / "b", row(OURS, 9.0), case=CASE | {"tokens": 18})
    assert "no case and variant in common" in command(a, b, code=2)


def test_other_devices_are_refused_unless_forced(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", row(OURS, 1.0))
    b = folder(tmp_path / "b", row(OURS, 0.1), slug="another-device")
    assert "one-device" in command(a, b, code=2)
    command(a, b, "--force")


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    assert "no result files" in command(tmp_path, tmp_path, code=2)


def test_every_committed_file_is_read_and_equals_itself() -> None:
    for folder in RESULTS.iterdir():
        if any("cases" in json.loads(path.read_text()) for path in folder.glob("*.json")):
            found = compare(folder, folder)
            assert found.same > 0
            assert not found.changes
