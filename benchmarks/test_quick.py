"""The quick cases under pytest-benchmark: ``pytest benchmarks --benchmark-only [--benchmark-json=FILE]``.

Every op, one small whole model and one training step. Good for comparing two commits (``--benchmark-compare``). They
are timed one after the other here; for a claim of one against another use the commands, which take them in turns.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from segmenter_fast import Segmenter
from segmenter_fast.benchmarks.cases import OURS, TOLERANCE, Case, Variant
from segmenter_fast.benchmarks.device import resolve
from segmenter_fast.benchmarks.ops import OPS
from segmenter_fast.benchmarks.training import Point, make_case
from segmenter_fast.reference import ReferenceSegmenter

DEVICE = resolve("auto")
SMALL = Point(size=128, batch=1)


def whole_model() -> Case:
    """Labels of a small model in float32; the error is the share of labels that differ from the reference's."""
    torch.manual_seed(0)
    model = Segmenter(SMALL.config).to(DEVICE).eval()
    reference = ReferenceSegmenter(SMALL.config).to(DEVICE).eval()
    reference.load_state_dict(model.state_dict())

    def images(generator: torch.Generator) -> tuple[Tensor]:
        return (torch.randn(1, 3, SMALL.size, SMALL.size, generator=generator, device=DEVICE),)

    def differing(expected: Tensor, labels: Tensor) -> float:
        return (labels != expected).float().mean().item()

    return Case(
        parameters={"op": "segment", "model": "seg_t_mask_16", "size": SMALL.size},
        device=DEVICE,
        dtype=torch.float32,
        make_inputs=images,
        judge=lambda inputs: partial(differing, reference.segment(*inputs)),
        variants={
            "eager": Variant(torch.no_grad()(reference.segment)),
            OURS: Variant(model.optimize(torch.float32, compile=False).segment),
        },
    )


CASES = [case for cases in OPS.values() for case in cases(DEVICE, True)]
CASES += [whole_model(), make_case(DEVICE, torch.float32, SMALL, compiled=False)]


@pytest.mark.parametrize("name", ["eager", OURS])
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_case(benchmark: Any, case: Case, name: str) -> None:
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
