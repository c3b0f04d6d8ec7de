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
    before, after = (static.read(static.FOLDER / f"{name}.json") for name in ("before", "after"))
    text = README.read_text()
    assert rewritten(text, "static", static.table(before, after)) == text, (
        "run python -m segmenter_fast.benchmarks.report.static"
    )


def test_a_line_compares_a_problem_with_its_floor() -> None:
    text = static.table({"a": problem("a", 10, 20)}, {"a": problem("a", 5), "b": problem("b", 7)})
    assert text.startswith("Static bound, not a time")
    assert "| a | 30 -> 5 | 60 -> 10 | 4 (exponentials) | 120 -> 105 | 8 -> 8 |" in text
    assert "| b | 7 | 14 | 4 (exponentials) | 107 | 8 |" in text


def test_counting_again_writes_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = pytest.importorskip("segmenter_fast.kernels.problems", reason="needs Triton")
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- static -->\n<!-- /static -->\n")
    (tmp_path / "before.json").write_text(json.dumps([problem("a", 10)]))
    monkeypatch.setattr(static, "README", readme)
    monkeypatch.setattr(static, "FOLDER", tmp_path)
    monkeypatch.setattr(problems, "measure", lambda: [problem("a", 5)])
    static.main()
    assert "| a | 10 -> 5 |" in readme.read_text()
    assert json.loads((tmp_path / "after.json").read_text()) == [problem("a", 5)]
    assert (tmp_path / "bounds.png").stat().st_size > 0
