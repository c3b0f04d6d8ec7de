"""The quick cases under pytest-benchmark: ``pytest benchmarks --benchmark-only [--benchmark-json=FILE]``.

Good for comparing two commits (``--benchmark-compare``). Variants are timed one after the other here; for a claim of
one against another use ``python -m segmenter_fast.benchmarks.kernels``, which takes them in turns.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from segmenter_fast.benchmarks.cases import OURS, TOLERANCE, Variant
from segmenter_fast.benchmarks.device import resolve
from segmenter_fast.benchmarks.ops import OPS

DEVICE = resolve("auto")
CASES = [pytest.param(case, id=case.name) for cases in OPS.values() for case in cases(DEVICE, True)]


@pytest.mark.parametrize("name", ["eager", OURS])
@pytest.mark.parametrize("case", CASES)
def test_kernel(benchmark: Any, case: Any, name: str) -> None:
    variant = case.variants[name]
    assert isinstance(variant, Variant)
    inputs = case.make_inputs(torch.Generator(DEVICE).manual_seed(0))
    call = variant.bind(inputs)
    error = case.judge(inputs)(call())
    assert error <= TOLERANCE[case.dtype], "nothing is timed that disagrees"

    def synchronised() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)

    benchmark.group = case.name
    benchmark.extra_info.update(case.parameters, variant=name, error=error, device=str(DEVICE))
    benchmark(synchronised)
