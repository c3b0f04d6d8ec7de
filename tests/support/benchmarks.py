"""Small cases and made-up figures for the tests of the benchmarks."""

from __future__ import annotations

from dataclasses import replace

import torch

from segmenter_fast.benchmarks.case import Case, Row, run_case
from segmenter_fast.benchmarks.device import Ceilings
from segmenter_fast.benchmarks.ops import attention, mask_scores, tokens, upsample
from segmenter_fast.benchmarks.timing import Timing

CPU = torch.device("cpu")
CEILINGS = Ceilings(10.0, {"float32": 0.1, "bfloat16": 1.0})


def timed_rows(case: Case) -> dict[str, Row]:
    return {row.variant: row for row in run_case(case, CEILINGS, seconds=0.02, min_samples=2)}


def small_case(op: str, pass_: str, dtype: torch.dtype = torch.float32, map_: str = "noise") -> Case:
    """A case of 7 classes, 4x4 patches and 32 pixels (17 tokens), without the peer that is slow to compile."""
    if op == "attention":
        case = attention.attention_case(CPU, dtype, 2, 17, pass_)
    elif op == "mask_scores":
        case = mask_scores.scores_case(CPU, dtype, 2, pass_, 17, 8, 7)
    elif op in tokens.OPS:
        case = tokens.tokens_case(op, CPU, dtype, 2, 17, 64)
    else:
        case = upsample.upsample_case(op, CPU, dtype, 2, pass_, upsample.Masks(map_, 7, 8, 32))
    return replace(case, variants={name: v for name, v in case.variants.items() if name != "compile"})


def timing_of(median_ms: float, spread: float = 0.1, peak_bytes: int | None = 10 * 2**20) -> Timing:
    """A made-up timing whose p20 and p80 lie ``spread`` of the median away."""
    low, high = median_ms * (1 - spread), median_ms * (1 + spread)
    return Timing(median_ms, low, high, 10, 1, 1, "perf_counter", peak_bytes)
