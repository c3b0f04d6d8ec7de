"""The README shows what is committed, and the tables are whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from segmenter_fast.benchmarks.case import OURS, Row
from segmenter_fast.benchmarks.device import describe
from segmenter_fast.benchmarks.models.comparison import MODELS, ONNX_RUNTIME, OPENVINO, PEER, REFERENCE, RUNTIMES
from segmenter_fast.benchmarks.models.peers import ModelCase
from segmenter_fast.benchmarks.models.summary import models_table
from segmenter_fast.benchmarks.report.tables import FIRST_PAGE, README, figures, measured, rewritten, tables
from segmenter_fast.benchmarks.results import RESULTS, Result, write
from support.benchmarks import CEILINGS, CPU, timing_of


def test_the_readme_shows_the_committed_figures() -> None:
    for page, name, block in ((README, "measured", tables(RESULTS)), (FIRST_PAGE, "figures", figures(RESULTS))):
        text = page.read_text()
        assert rewritten(text, name, block) == text, "run python -m segmenter_fast.benchmarks.report.tables"


def test_other_figures_are_other_tables(tmp_path: Path) -> None:
    committed = sorted(RESULTS.glob("*/throughput.json"))
    assert committed
    content = json.loads(committed[0].read_text())
    timed = next(row for case in content["cases"] for row in case["rows"] if row["timing"])
    timed["images_s"] *= 2
    (tmp_path / "throughput.json").write_text(json.dumps(content))
    assert measured(tmp_path) not in measured(committed[0].parent)
    with pytest.raises(ValueError, match="one block"):
        rewritten("no block", "measured", "")


def test_the_defaults_have_a_table(tmp_path: Path) -> None:
    times = {REFERENCE: 20.0, "SDPA": 10.0, "ours optimize": 5.0}
    result = Result("defaults", describe(CPU), CEILINGS, "2026", False)
    rows = [Row(name, "ok", timing=timing_of(ms)) for name, ms in times.items()]
    result.cases = [(ModelCase("seg_t_mask_16", torch.float32).parameters | {"output": "labels"}, rows)]
    table = measured(write(result, tmp_path).parent)
    assert "| `optimize` | 1 | 0.50 | 0.50 | seg_t_mask_16 512 px, batch 1, 150 classes, float32, labels |" in table


def test_a_folder_without_results_has_no_table(tmp_path: Path) -> None:
    assert measured(tmp_path) == figures(tmp_path) == ""


def test_the_runtimes_are_columns_and_rivals(tmp_path: Path) -> None:
    speeds = {REFERENCE: 1.0, PEER: 2.0, OPENVINO: 2.5, OURS: 3.0}
    rows = [Row(name, "ok", timing=timing_of(1e3 / s, peak_bytes=2**20), images_s=s) for name, s in speeds.items()]
    rows.append(Row(ONNX_RUNTIME, "absent", "needs onnx"))
    result = Result("throughput", describe(CPU), CEILINGS, "2026", False)
    result.cases = [(ModelCase(f"seg_s_mask_{patch}", torch.float32).parameters, rows) for patch in (16, 32)]
    folder = write(result, tmp_path).parent
    table = measured(folder)
    assert "| reference | peer | OpenVINO | ours |" in table
    assert "| 1 (3.00x) | 2 (1.50x) | 2.5 (1.20x) | **3** |" in table
    page = figures(tmp_path)
    assert "official arithmetic: **3.00x** with ViT-S/16, **3.00x** with S/32" in page
    assert "(PyTorch compiled, OpenVINO): **1.20x** with ViT-S/16" in page
    assert describe(CPU).name in page
    console = Console(width=80)
    with console.capture() as capture:
        console.print(models_table(result.cases))
    lines = capture.get().splitlines()
    assert [line.split() for line in lines if line.startswith("seg_s_mask_16")] == [
        ["seg_s_mask_16", "1", "2", "2.5", "3", "3.00x", "1.20x", "1/1"]
    ]


def test_the_table_of_models_is_whole_in_80_columns() -> None:
    first = ModelCase("seg_t_mask_16", torch.float32)
    row = Row("", "ok", "", 2.1e-6, timing_of(1234.5, 0.001, 1753 * 2**20), 12.34, 0.1234, 0.98, 0.0343, 1.0)
    rows = [replace(row, variant=name) for name in MODELS if name not in RUNTIMES]
    cases = [(first.parameters, rows), (replace(first, batch=18).parameters, rows)]
    cases += [(first.parameters | {"part": part}, rows) for part in ("encoder", "upsample")]
    cases += [(first.parameters, [Row(name, "not run", "no time") for name in (REFERENCE, PEER, OURS)])]
    console = Console(width=80)
    with console.capture() as capture:
        console.print(models_table(cases))
    assert "…" not in capture.get(), "a cell was cut"
    lines = capture.get().splitlines()
    assert "512 px, batch 1, 150 classes, float32" in lines[0]
    ratios = "0.0343 0.0343 0.0343 1.00x 1.00x 1753/1753 98% 100/100%"
    assert sum(" ".join(line.split()).endswith(ratios) for line in lines) == 4
    assert [line.strip() for line in lines if line.startswith(" ")][-2:] != lines[-2:]
    assert {"upsample", "encoder", "18"} <= {word for line in lines for word in line.split()}
    assert lines[-1].split() == ["seg_t_mask_16", "not", "run", "not", "run", "not", "run"]


def test_a_gpu_has_its_own_figures(tmp_path: Path) -> None:
    gpu = replace(describe(CPU), type="cuda", name="Some GPU", slug="some-gpu")
    speeds = {REFERENCE: 1.0, PEER: 2.0, OURS: 3.0}
    rows = [Row(name, "ok", timing=timing_of(1e3 / s, peak_bytes=2**20), images_s=s) for name, s in speeds.items()]
    result = Result("throughput", gpu, CEILINGS, "2026", False)
    cases = [ModelCase("seg_b_mask_16", torch.bfloat16, batch=batch) for batch in (1, 32)]
    result.cases = [(case.parameters, rows) for case in cases]
    write(result, tmp_path)
    page = figures(tmp_path)
    assert "On Some GPU, ViT-B/16, 512 px, 150 classes, bfloat16, at batch 1 and 32" in page
    assert "official arithmetic: **3.00x** and **3.00x**" in page
    assert "fused attention: **1.50x** and **1.50x**" in page

    attention = Result("attention", gpu, CEILINGS, "2026", False)
    parameters = {"op": "attention", "pass": "forward", "tokens": 257, "batch": 8, "heads": 12, "head_dim": 64}
    times = {"SDPA flash": 2.0, "SDPA cuDNN": 1.5, OURS: 1.0}
    own = [Row(name, "ok", timing=timing_of(ms), tflops=300 / ms) for name, ms in times.items()]
    attention.cases = [(parameters | {"dtype": "bfloat16"}, own)]
    table = measured(write(attention, tmp_path).parent)
    assert "| 257, batch 8, bfloat16, forward | SDPA cuDNN | 200 (1.5 ms) | 300 (1 ms) | 1.50x |" in table
