"""Cases of every fused op against its peers. A list of cases begins with the most valuable one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from segmenter_fast.devices import cpu_is_fast_in_bfloat16

from ..case import Case
from ..results import RESULTS
from ..runner import Runner, deadline_after
from . import attention, mask_scores, sliding, upsample

# (device, quick) -> the cases of an op.
MakeCases = Callable[[torch.device, bool], list[Case]]
OPS: dict[str, MakeCases] = {
    **{op: partial(upsample.cases, op) for op in upsample.OPS},
    "attention": attention.cases,
    "mask_scores": mask_scores.cases,
}
# Measured only where it is named.
NAMED: dict[str, MakeCases] = {"sliding": sliding.cases}


def run_ops(
    ops: Sequence[str] = (),
    *,
    device: torch.device,
    quick: bool = False,
    out: Path = RESULTS,
    budget: float | None = None,
) -> int:
    """Time ``ops``, by default all of OPS, within ``budget`` seconds and write ``<out>/<device>/<op>.json``.

    Returns:
        The number of cases that were refused because an output of ours was wrong.

    Raises:
        ValueError: an unknown op.
    """
    known = OPS | NAMED
    if unknown := sorted(set(ops) - set(known)):
        raise ValueError(f"unknown ops {', '.join(unknown)}; known are {', '.join(known)}")
    end = deadline_after(budget)
    dtypes = [torch.float32]
    if device.type == "cuda":
        dtypes += [torch.bfloat16, torch.float16]
    elif cpu_is_fast_in_bfloat16():  # elsewhere the matrix product takes minutes and is no ceiling
        dtypes += [torch.bfloat16]
    runner = Runner.start(device, dtypes, out, quick, 0.5 if quick or device.type == "cuda" else 2.0)
    refused = 0
    names = ops or tuple(OPS)
    for index, op in enumerate(names):
        now = time.monotonic()
        refused += runner.run(op, known[op](device, quick), now + (end - now) / (len(names) - index))
    return refused
