"""What the benchmarks print is whole in a terminal of 80 columns and 24 lines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from segmenter_fast.benchmarks import demo, run
from segmenter_fast.benchmarks.board import Board
from segmenter_fast.benchmarks.cases import Row
from segmenter_fast.benchmarks.demo import VARIANTS, Comparison
from segmenter_fast.benchmarks.models import MODELS, Point
from segmenter_fast.benchmarks.timing import Timing

POINT = Point("seg_t_mask_16", torch.float32)
TIMING = Timing(1234.5, 1233.4, 1235.6, 3, 1, 1, "perf_counter", 1753 * 2**20)
ROW = Row("ours", "ok", "", 2.1e-6, TIMING, 12.34, 0.1234, 0.98, 0.0343, 1.0)


def printed(what: Any, width: int = 80, height: int = 24) -> list[str]:
    console = Console(width=width, height=height)
    with console.capture() as capture:
        console.print(what)
    lines = capture.get().splitlines()
    assert "…" not in capture.get(), "a cell was cut"
    return lines


@pytest.fixture
def board() -> Board:
    """Nineteen of twenty cases are done, one of them a row for each part."""
    result = Board([POINT] * 20, None)
    rows = [replace(ROW, variant=name) for name in MODELS]
    for number in range(18):
        result.end("throughput", [(replace(POINT, batch=number + 1).parameters, rows)])
    result.end("split", [(POINT.parameters | {"part": part}, rows) for part in ("encoder", "decoder", "upsample")])
    result.begin("the last of all")
    return result


def test_a_live_table_keeps_the_newest_rows_and_the_progress_in_sight(board: Board) -> None:
    lines = printed(board)
    assert len(lines) < 24
    assert "512 px, batch 1, 150 classes, float32" in lines[0]
    cells = "0.0343 0.0343 0.0343 1.0x 1.0x 98% 1753/1753 100/100%"
    assert any(" ".join(line.split()).endswith(cells) for line in lines)
    second_lines = [line.strip() for line in lines]  # "batch 18" breaks before its number
    assert second_lines.count("upsample") == second_lines.count("18") == 1
    assert "2" not in second_lines
    assert lines[-1].startswith("20 of 20")
    assert "the last of all" in lines[-1]


def test_in_the_end_all_rows_stand_there(board: Board) -> None:
    board.end("throughput", [(POINT.parameters, [Row(name, "not run", "no time") for name in MODELS])])
    lines = printed(board)
    assert sum("seg_t_mask_16" in line for line in lines) == 22
    assert lines[-1].split() == ["seg_t_mask_16", "not", "run", "not", "run", "not", "run"]


def test_a_case_says_below_why_a_variant_has_no_figures() -> None:
    rows = [replace(ROW, variant=name) for name in ("eager float32", "ours compiled")]
    lines = printed(run.table(SimpleNamespace(name="a case"), [*rows, Row("compile", "failed", "no [compiler]")]))
    assert lines[0].strip() == "a case"
    assert " ".join(lines[4].split()) == "ours compiled 1234 1233..1236 1753 0.123 0.0343 img/s 98% 2e-06"
    assert "compile: failed: no [compiler]" in lines


def test_the_demo_shows_every_figure(tmp_path: Path) -> None:
    rows = [
        Comparison(name, torch.bfloat16, TIMING, TIMING, TIMING, 0.02, 0.01, 0.999, 1.0, 1.0, tmp_path)
        for name in VARIANTS
    ]
    text = " ".join(printed(demo.table(rows)))
    assert text.count("0.81") == 3 * len(VARIANTS)
    assert "2.0e-02" in text
    assert "99.9%" in text
