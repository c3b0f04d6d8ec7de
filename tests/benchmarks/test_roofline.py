"""The README beside the benchmarks shows what is committed, and the arithmetic of its tables is right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from segmenter_fast.benchmarks import roofline
from segmenter_fast.benchmarks.cases import Row
from segmenter_fast.benchmarks.device import Ceilings, describe
from segmenter_fast.benchmarks.results import Result, write
from segmenter_fast.benchmarks.timing import Timing


def test_the_readme_shows_the_committed_figures() -> None:
    readme = roofline.README.read_text()
    assert roofline.rewritten(readme, roofline.RESULTS) == readme, "run python -m segmenter_fast.benchmarks.roofline"


def test_attainable_is_the_longer_of_bytes_and_flops(tmp_path: Path) -> None:
    timing = Timing(4.0, 3.9, 4.1, 9, 1, 1, "perf_counter", None)
    rows = [Row("eager", "out of memory"), Row("ours", "ok", "", 0.0, timing, 5.0, 0.1, 0.2)]
    case = {"op": "attention", "pass": "forward", "tokens": 9, "dtype": "float32"}
    ceilings = Ceilings(10.0, {"float32": 0.2})
    found = Result("attention", describe(torch.device("cpu")), ceilings, "2026-01-02T03:04:05", False, [(case, rows)])
    line = roofline.markdown(write(found, tmp_path).parent).splitlines()[-1]
    # 20 MB at 10 GB/s are 2 ms, 0.4 GFLOP at 0.2 TFLOP/s as many.
    assert line == "| `attention`, forward, tokens 9, float32 | 20.00 | 0.40 | 2 | 4 | 50.0% | out of memory |"


def test_a_folder_without_results_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no result file"):
        roofline.markdown(tmp_path)
