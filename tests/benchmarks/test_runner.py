"""Commands over cases write nothing that is wrong, keep to their budget, and print whole tables in 80 columns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from segmenter_fast.benchmarks import runner
from segmenter_fast.benchmarks.case import Case, Row
from segmenter_fast.benchmarks.device import Ceilings
from segmenter_fast.benchmarks.ops import OPS, run_ops, upsample
from segmenter_fast.benchmarks.plots import draw
from segmenter_fast.benchmarks.results import read
from support.benchmarks import CPU, timing_of


def tiny(device: torch.device, quick: bool) -> list[Case]:
    cases = [
        upsample.upsample_case(
            "upsample_argmax", device, torch.float32, 1, "forward", upsample.Masks("smooth", k, 8, 32)
        )
        for k in (3, 5)
    ]
    return [replace(c, variants={k: v for k, v in c.variants.items() if k != "compile"}) for c in cases]


@pytest.fixture(autouse=True)
def _tiny_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "measure_ceilings", lambda *args, **kwargs: Ceilings(10.0, {"float32": 0.3}))
    monkeypatch.setitem(OPS, "upsample_argmax", tiny)


def run(out: Path, budget: float | None = None) -> int:
    return run_ops(["upsample_argmax"], device=CPU, quick=True, out=out, budget=budget)


def test_the_command_writes_and_the_plots_follow(tmp_path: Path) -> None:
    assert run(tmp_path) == 0
    (path,) = tmp_path.glob("*/*.json")
    found = read(path)
    assert [case["classes"] for case, _ in found.cases] == [3, 5]
    assert all(row.status == "ok" and row.timing for _, rows in found.cases for row in rows)
    (plot,) = draw(path.parent)
    assert plot.name == "upsample.png"
    assert plot.stat().st_size > 10_000


def test_a_wrong_kernel_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(upsample.OPS["upsample_argmax"], ours=lambda masks, size: masks.new_zeros((1, *size)).byte())
    monkeypatch.setitem(upsample.OPS, "upsample_argmax", wrong)
    assert run(tmp_path) == 2
    assert not list(tmp_path.rglob("*.json"))


def test_a_spent_budget_lists_what_was_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, budget=0) == 0
    assert "2 of 2 cases not run" in capsys.readouterr().out


def test_an_unknown_op_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown ops softmax; known are .*sliding"):
        run_ops(["softmax"], device=CPU)


def test_a_case_says_below_why_a_variant_has_no_figures() -> None:
    row = Row("", "ok", "", 2.1e-6, timing_of(1234.5, 0.001, 1753 * 2**20), 12.34, 0.1234, 0.98, 0.0343)
    rows = [replace(row, variant=name) for name in ("eager float32", "ours compiled")]
    console = Console(width=80)
    with console.capture() as capture:
        console.print(runner.case_table("a case", [*rows, Row("compile", "failed", "no [compiler]")]))
    assert "…" not in capture.get(), "a cell was cut"
    lines = capture.get().splitlines()
    assert lines[0].strip() == "a case"
    assert " ".join(lines[4].split()) == "ours compiled 1234 1233..1236 1 1753 0.123 0.0343 img/s 98% 2e-06"
    assert "compile: failed: no [compiler]" in lines
