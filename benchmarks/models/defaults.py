"""Time of our defaults over that of plain PyTorch: the worst ratio over variants and batches.

Plain PyTorch is the faster of the reference and the reference with SDPA, both eager and in float32. Ours is everything
that a user gets by one line: ``optimize()`` with its defaults, ``segment`` and ``forward`` of the model itself, and
``accelerate`` of a model in the official program's structure. Labels are compared with labels, logits with logits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segmenter_fast import accelerate
from segmenter_fast.devices import choose_compile, choose_dtype
from segmenter_fast.reference import MaskTransformer

from ..case import OURS, DisagreementError, is_ours, time_once
from ..results import RESULTS, CaseRows
from ..runner import narrow_table
from .comparison import REFERENCE, SLOW_SECONDS, Accuracy, Limits, share
from .official import OfficialLike
from .parts import Calls, Groups
from .peers import ModelCase, build, with_sdpa
from .summary import case_name
from .swap_in import run_swap_in
from .throughput import DEFAULT, Job, run_jobs

SDPA, OPTIMIZE, SEGMENT, FORWARD, ACCELERATE = (
    "SDPA",
    *(f"{OURS} {name}" for name in ("optimize", "segment", "forward", "accelerate")),
)
BATCHES = (1, 2, 4)
# A reference beyond SDPA's time over this is not timed.
CLEARLY = 0.8
Call = Callable[..., Tensor]
# For each form the time over that of plain PyTorch, and the case.
Ratios = dict[str, list[tuple[float, str]]]
_NAMES = (REFERENCE, SDPA, OPTIMIZE, FORWARD, ACCELERATE)


def run_defaults(
    variants: Sequence[str] = (),
    size: int = 512,
    batches: Sequence[int] = (),
    *,
    device: torch.device,
    seconds: float = 3.0,
    budget: float | None = None,
    out: Path = RESULTS,
) -> int:
    """Measure all variants at each batch, the cheapest first, and print the worst ratio; write ``defaults.json``.

    Without ``variants``, ``swap_in.json`` follows: training steps and losses of models of others, see ``run_swap_in``.

    Returns:
        The number of cases that were refused because our output was wrong.

    Raises:
        ValueError: an unknown variant, numbers that no model has, or a budget in which no case fits.
    """
    dtype = choose_dtype("auto", device)
    case = ModelCase("", dtype, size, compile=choose_compile("auto", device, dtype))
    grid = itertools.product(batches or BATCHES, variants or DEFAULT)
    cases = (replace(case, variant=variant, batch=batch) for batch, variant in grid)
    jobs = [Job("defaults", one, groups=OUTPUTS, calls=60) for one in cases]
    jobs.sort(key=lambda job: job.case.flops)  # overhead weighs most in small cases, and most cases fit a budget
    found, refused, console = run_jobs(jobs, [dtype], device=device, seconds=seconds, budget=budget, out=out)
    table = narrow_table("time over that of plain PyTorch", ("", "best", "worst", "of", "worst case"))
    for form, ratios in ratios_of(found).items():
        worst, where = max(ratios)
        table.add_row(form, f"{min(ratios)[0]:.2f}x", f"{worst:.2f}x", str(len(ratios)), where)
    every = [ratio for ratios in ratios_of(found).values() for ratio in ratios]
    if not every:
        if not refused:
            raise ValueError("nothing was measured: no case fitted into the memory and the --budget of seconds")
        return refused
    console.print(table)
    if not variants:
        run_swap_in(device=device, seconds=seconds, out=out)
    worst, where = max(every)
    console.print(f"worst ratio: {worst:.2f}x the time of plain PyTorch, {where}")
    return refused


def ratios_of(cases: CaseRows) -> Ratios:
    """For each form of ours its time over that of plain PyTorch, with the case's name, in every case with figures.

    Both are the 20th percentile: a busy neighbour only adds to the samples.
    """
    found: Ratios = {}
    for case, rows in cases:
        times = {row.variant: row.timing.p20_ms for row in rows if row.timing}
        plain = min((times[name] for name in (REFERENCE, SDPA) if name in times), default=None)
        for form in filter(is_ours, times):
            if plain:
                ratio = times[form] / plain
                found.setdefault(form, []).append((ratio, f"{case_name(case, {})}, {case['output']}"))
    return found


def _calls(case: ModelCase, device: torch.device) -> tuple[Calls, dict[str, int]]:
    """The calls of each output by form, and options of ``timed_rows``.

    Slow calls have labels alone: the logits' share of the time is small. A reference that is clearly slower than SDPA
    has no calls: plain PyTorch is the faster one.
    """
    model, reference, images = build(case, device)
    forms: dict[str, Any] = {
        REFERENCE: reference,
        SDPA: with_sdpa(reference, torch.float32),
        OPTIMIZE: model.optimize(),
        FORWARD: model,
    }
    if isinstance(reference.decoder, MaskTransformer):
        forms[ACCELERATE] = accelerate(OfficialLike(reference).eval())
    expected, first = time_once(partial(_labels, reference, images), device)
    logits, second = time_once(partial(forms[SDPA], images), device)
    if second < CLEARLY * first:
        del forms[REFERENCE]
    low = with_sdpa(reference, case.dtype)(images.to(case.dtype))
    limits = Limits(Accuracy.of(low, logits), case.dtype)
    del logits, low
    labels: dict[str, Callable[[], Tensor]] = {name: partial(_labels, form, images) for name, form in forms.items()}
    labels |= {OPTIMIZE: partial(forms[OPTIMIZE].segment, images), SEGMENT: partial(model.segment, images)}
    for name, call in labels.items():
        if is_ours(name) and (fault := limits.labels_fault(share(call() == expected))):
            raise DisagreementError(f"{name}: {fault}")
    if device.type == "cpu" and second > SLOW_SECONDS:
        return {"labels": labels}, {"min_samples": 2, "max_samples": 3, "flops": case.flops}
    scores: dict[str, Callable[[], Tensor]] = {name: partial(_logits, form, images) for name, form in forms.items()}
    return {"labels": labels, "logits": scores}, {"min_samples": 4, "flops": case.flops}


def _logits(form: Call, images: Tensor) -> Tensor:
    return form(images).data  # those of ACCELERATE wait until they are read


def _labels(form: Call, images: Tensor) -> Tensor:
    return form(images).argmax(1)


OUTPUTS = Groups("output", {"labels": (*_NAMES[:3], SEGMENT, *_NAMES[3:]), "logits": _NAMES}, _calls)
