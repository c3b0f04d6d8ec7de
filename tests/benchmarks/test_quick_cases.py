"""One quick case of each op under pytest-benchmark, to compare two commits by ``--benchmark-compare``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from segmenter_fast.benchmarks.case import OURS, TOLERANCE
from segmenter_fast.benchmarks.ops import OPS
from support.benchmarks import CPU


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eager", OURS])
@pytest.mark.parametrize("op", OPS)
def test_quick_case(benchmark: Any, op: str, name: str) -> None:
    case = OPS[op](CPU, True)[0]
    inputs = case.make_inputs(torch.Generator(CPU).manual_seed(0))
    call = case.variant(name).bind(inputs)
    assert case.judge(inputs)(call()) <= TOLERANCE[case.dtype], "nothing is timed that disagrees"
    benchmark.group = case.name
    benchmark(call)
