"""The README shows what is committed, and the tables are whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from segmenter_fast.benchmarks.case import Row
from segmenter_fast.benchmarks.models.comparison import MODELS, models_table
from segmenter_fast.benchmarks.models.peers import ModelCase
from segmenter_fast.benchmarks.report.tables import README, measured, rewritten
from segmenter_fast.benchmarks.results import RESULTS
from support.benchmarks import timing_of


def test_the_readme_shows_the_committed_figures() -> None:
    text = README.read_text()
    assert rewritten(text, RESULTS) == text, "run python -m segmenter_fast.benchmarks.report.tables"


def test_other_figures_are_other_tables(tmp_path: Path) -> None:
    committed = sorted(RESULTS.glob("*/throughput.json"))
    assert committed
    content = json.loads(committed[0].read_text())
    timed = next(row for case in content["cases"] for row in case["rows"] if row["timing"])
    timed["images_s"] *= 2
    (tmp_path / "throughput.json").write_text(json.dumps(content))
    assert measured(tmp_path) not in measured(committed[0].parent)
    with pytest.raises(ValueError, match="one block"):
        rewritten("no block", RESULTS)


def test_a_folder_without_results_has_no_table(tmp_path: Path) -> None:
    assert measured(tmp_path) == ""


def test_the_table_of_models_is_whole_in_80_columns() -> None:
    first = ModelCase("seg_t_mask_16", torch.float32)
    row = Row("", "ok", "", 2.1e-6, timing_of(1234.5, 0.001, 1753 * 2**20), 12.34, 0.1234, 0.98, 0.0343, 1.0)
    rows = [replace(row, variant=name) for name in MODELS]
    cases = [(first.parameters, rows), (replace(first, batch=18).parameters, rows)]
    cases += [(first.parameters | {"part": part}, rows) for part in ("encoder", "upsample")]
    cases += [(first.parameters, [Row(name, "not run", "no time") for name in MODELS])]
    console = Console(width=80)
    with console.capture() as capture:
        console.print(models_table(cases))
    assert "…" not in capture.get(), "a cell was cut"
    lines = capture.get().splitlines()
    assert "512 px, batch 1, 150 classes, float32" in lines[0]
    figures = "0.0343 0.0343 0.0343 1.0x 1.0x 98% 1753/1753 100/100%"
    assert sum(" ".join(line.split()).endswith(figures) for line in lines) == 4
    assert [line.strip() for line in lines if line.startswith(" ")][-2:] != lines[-2:]
    assert {"upsample", "encoder", "18"} <= {word for line in lines for word in line.split()}
    assert lines[-1].split() == ["seg_t_mask_16", "not", "run", "not", "run", "not", "run"]
