"""Cases of every fused op against its peers. A list of cases begins with the most valuable one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from segmenter_fast.devices import cpu_is_fast_in_bfloat16

from ..case import Case
from ..deadline import deadline_after
from ..results import RESULTS
from ..runner import Runner
from . import attention, mask_scores, sliding, tokens, upsample

# (device, quick) -> the cases of an op.
MakeCases = Callable[[torch.device, bool], list[Case]]
OPS: dict[str, MakeCases] = {
    **{op: partial(upsample.cases, op) for op in upsample.OPS},
    "attention": attention.cases,
    "mask_scores": mask_scores.cases,
}
# The number of cases of an op that come before all others: both passes at the main shape, and attention at each length.
FIRST, FIRST_OF = 2, {"attention": 2 * len(attention.FILLING)}
# Measured only where it is named.
NAMED: dict[str, MakeCases] = {"sliding": sliding.cases, "tokens": tokens.cases}


def run_ops(
    ops: Sequence[str] = (),
    *,
    device: torch.device,
    quick: bool = False,
    out: Path = RESULTS,
    budget: float | None = None,
) -> int:
    """Time ``ops``, by default all of OPS, within ``budget`` seconds and write ``<out>/<device>/<op>.json``.

    The ops take turns, so that the most valuable case of each comes before the second of any.

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
    runner = Runner.start(device, dtypes, out, quick, 0.3 if device.type == "cuda" else 0.5 if quick else 2.0)
    return runner.run(in_turns({op: known[op](device, quick) for op in ops or OPS}), end)


def in_turns(cases: dict[str, list[Case]], first: dict[str, int] = FIRST_OF) -> list[tuple[str, Case]]:
    """Each op's first case, then each one's second, and so on, but the ``first`` ones of every op before all others.

    Late variants come after the first cases and after the others.
    """
    parts: tuple[list[tuple[str, Case]], list[tuple[str, Case]]] = [], []
    for number, turn in enumerate(itertools.zip_longest(*cases.values())):
        for op, case in zip(cases, turn, strict=True):
            if case is not None:
                parts[number >= first.get(op, FIRST)].append((op, case))
    found: list[tuple[str, Case]] = []
    for part in parts:
        found += [(op, case.early()) for op, case in part]
        found += [(op, case) for op, case in part if case.early().variants != case.variants]
    return found
