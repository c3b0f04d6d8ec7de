"""The page of static bounds shows what is committed, and calls no bound a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from segmenter_fast.benchmarks.report import static
from segmenter_fast.benchmarks.report.tables import README, rewritten


def problem(name: str, *issue: float) -> dict[str, object]:
    launches = [{"us": {"issue": us, "fma": 2 * us}, "registers": 100 + us, "warps_sm": 8} for us in issue]
    return {"problem": name, "floor_us": {"bytes": 3.0, "exponentials": 4.0}, "launches": launches}


def test_the_page_shows_the_committed_counts() -> None:
    text = README.read_text()
    assert rewritten(text, "static", static.table(json.loads(static.BOUNDS.read_text()))) == text, (
        "run python -m segmenter_fast.benchmarks.report.static"
    )


def test_a_line_compares_a_problem_with_its_floor() -> None:
    text = static.table([problem("a", 10, 20), problem("b", 7)])
    assert text.startswith("Static bound, not a time")
    assert "| a | 30 | 60 | 4 (exponentials) | 120 | 8 |" in text
    assert "| b | 7 | 14 | 4 (exponentials) | 107 | 8 |" in text


def test_counting_again_writes_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = pytest.importorskip("segmenter_fast.kernels.problems", reason="needs Triton")
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- static -->\n<!-- /static -->\n")
    monkeypatch.setattr(static, "README", readme)
    monkeypatch.setattr(static, "BOUNDS", tmp_path / "bounds.json")
    monkeypatch.setattr(problems, "measure", lambda: [problem("a", 5)])
    static.main()
    assert "| a | 5 |" in readme.read_text()
    assert json.loads((tmp_path / "bounds.json").read_text()) == [problem("a", 5)]
