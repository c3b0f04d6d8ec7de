"""Images per second of whole models: the reference, strong peers and ours, over variants and inputs.

After each case (on CUDA after each model) ``throughput.json`` (the models), ``split.json`` (time of the parts) and
``classes.json`` (memory against classes) are written to the device's folder, at the end their plots. A case that the
budget has no time for has rows with the status "not run". On CUDA the peers that take longest to compile come last.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich.console import Console

from segmenter_fast.devices import choose_dtype

from ..case import Row
from ..deadline import deadline_after
from ..device import Ceilings
from ..results import RESULTS, CaseRows, write
from ..runner import Runner, case_table
from .comparison import Plan, compare_models, in_stages, names_of
from .parts import GROUPS, Groups
from .peers import ModelCase
from .summary import case_name, models_table

DEFAULT = tuple(f"seg_{size}_mask_{patch}" for size, patch in (
    ("s", 16), ("t", 16), ("b", 16), ("s", 32), ("s", 8), ("t", 32), ("t", 8), ("b", 32), ("b", 8),
))  # fmt: skip
PLOTS = ("throughput", "split", "classes")
# Cases before those of parts and classes.
BEFORE_EXTRAS = 3
CLASSES = (19, 60, 150, 1000)


@dataclass(frozen=True)
class Job:
    """One case for the file ``op``, or with ``groups`` a case for each of them.

    It takes about as long as ``calls`` calls of its reference. A ``late`` one is the same case with more peers.
    """

    op: str
    case: ModelCase
    late: bool = field(default=False, compare=False)
    groups: Groups | None = field(default=None, compare=False)
    calls: int = 12

    def run(self, device: torch.device, ceilings: Ceilings, seconds: float, plan: Plan) -> CaseRows:
        if self.groups:
            return self.groups.measure(self.case, device, seconds)
        return [(self.case.parameters, compare_models(self.case, device, ceilings, seconds, plan))]

    def not_run(self, note: str) -> CaseRows:
        if self.groups:
            return self.groups.without_figures(self.case, "not run", note)
        return [(self.case.parameters, [Row(name, "not run", note) for name in names_of(self.case)])]


@dataclass
class TimeEstimate:
    """Expected seconds of a case: ``overhead``, mostly of the compiler, and the calls of the reference.

    The reference runs at ``guess`` TFLOP/s until a case is done, then at the median of those before.
    """

    guess: float
    overhead: float = 60.0
    measured: list[float] = field(default_factory=list)

    def expect(self, job: Job, seconds: float) -> float:
        calls = job.calls * job.case.flops / median(self.measured or [self.guess]) / 1e12
        return max(calls, seconds) + (self.overhead if job.case.compile else 0)

    def update(self, job: Job, found: CaseRows, took: float) -> None:
        reference = found[0][1][0]
        if job.op in ("throughput", "defaults") and reference.timing and reference.tflops:
            self.measured.append(reference.tflops)
            if job.case.compile:
                self.overhead = max(5.0, took - job.calls * reference.timing.median_ms / 1e3)


def run_models(
    variants: Sequence[str] = (),
    sizes: Sequence[int] = (),
    batches: Sequence[int] = (),
    classes: Sequence[int] = (),
    dtypes: Sequence[str] = (),
    merge: Sequence[str] = (),
    *,
    device: torch.device,
    compile: bool = True,
    extras: bool = True,
    seconds: float = 3.0,
    budget: float | None = None,
    out: Path = RESULTS,
) -> int:
    """Compare whole models, ``seconds`` for the timing of each case, ``budget`` seconds for everything.

    All combinations of the arguments are cases; ``extras`` are the parts, and memory against classes. Each schedule of
    token merging in ``merge`` gives every case a row more of ours.

    Returns:
        The number of cases that were refused because our output was wrong.

    Raises:
        ValueError: an unknown variant, or numbers that no model has.
    """
    kinds = dict.fromkeys(choose_dtype(name, device) for name in dtypes or ["auto"])
    batches = batches or ((1, 32) if device.type == "cuda" else (1,))
    grid = itertools.product(kinds, sizes or (512,), classes or (150,), variants or DEFAULT, batches)
    cases = [
        ModelCase(variant, dtype, size, batch, count, compile, tuple(dict.fromkeys(merge)))
        for dtype, size, count, variant, batch in grid
    ]
    for case, name in itertools.product(cases, merge):
        case.flops_with(name)  # raises where the schedule does not fit
    jobs = [Job("throughput", case) for case in cases]
    if extras:
        jobs[BEFORE_EXTRAS:BEFORE_EXTRAS] = _extra_jobs(cases)
    if in_stages(device) and compile:
        jobs += [Job("throughput", case, late=True) for case in cases]
    found, refused, console = run_jobs(jobs, kinds, device=device, seconds=seconds, budget=budget, out=out, plots=PLOTS)
    console.print(models_table(found))
    return refused


def run_jobs(
    jobs: Sequence[Job],
    dtypes: Iterable[torch.dtype],
    *,
    device: torch.device,
    seconds: float,
    budget: float | None,
    out: Path,
    plots: Sequence[str] = (),
) -> tuple[CaseRows, int, Console]:
    """Run ``jobs`` as far as ``budget`` has time for them, and write their files after each.

    Returns:
        All cases; the number of jobs that were refused because our output was wrong; the console of the run.
    """
    deadline = deadline_after(budget)
    found = {job: job.not_run("the run ended before it") for job in jobs}
    runner = Runner.start(device, {torch.float32, *dtypes}, out, False, seconds)
    start = time.monotonic()
    stages = in_stages(device)
    estimate = TimeEstimate(runner.ceilings.matmul_tflops["float32"] / 2, 20.0 if stages else 60.0)

    def keep(job: Job, cases: CaseRows) -> None:
        """Write the rows of a job; those of a late one only where they have figures, or where ours is wrong."""
        if not job.late or any(row.timing or row.status == "refused" for _, rows in cases for row in rows):
            found[job] = cases
        result = runner.result(job.op)
        for other, own in found.items():
            if other.op == job.op:
                result.cases += own
                result.refused += _notes(other, own, "refused")
                result.not_run += _notes(other, own, "not run")
        write(result, out)

    with runner.console.status("") as status:
        for number, job in enumerate(jobs, 1):
            begin = time.monotonic()
            position = f"[{number}/{len(jobs)}, {begin - start:.0f} s] {job.op}: "
            expected = estimate.expect(job, seconds)
            if begin + expected > deadline:
                left = max(0.0, deadline - begin)
                keep(job, job.not_run(f"takes about {expected:.0f} s, {left:.0f} s of the budget were left"))
            else:
                status.update(position + case_name(job.case.parameters, {}))
                plan = Plan(job.late, deadline if stages else math.inf, partial(_report, keep, job))
                keep(job, job.run(device, runner.ceilings, seconds, plan))
                estimate.update(job, found[job], time.monotonic() - begin)
            for case, rows in found[job]:
                runner.console.print(case_table(position + case_name(case, {}), rows))
    if plots:
        runner.draw(plots)
    refused = sum(bool(_notes(job, cases, "refused")) for job, cases in found.items())
    return [case for cases in found.values() for case in cases], refused, runner.console


def _report(keep: Callable[[Job, CaseRows], None], job: Job, rows: list[Row]) -> None:
    keep(job, [(job.case.parameters, rows)])


def _notes(job: Job, found: CaseRows, status: str) -> list[str]:
    """The job and the reason, if its rows have this status and none has figures."""
    notes = [row.note for _, rows in found for row in rows if row.status == status]
    if any(row.timing for _, rows in found for row in rows):
        return []
    return [f"{case_name(job.case.parameters, {})}: {note}" for note in notes[:1]]


def _extra_jobs(cases: Sequence[ModelCase]) -> Iterator[Job]:
    """Memory of the first case against classes, and the parts of the first cases that differ in the variant alone."""
    first = replace(cases[0], compile=False, merge=())
    for count in CLASSES:
        yield Job("classes", replace(first, classes=count))
    alike = [case for case in cases if replace(case, variant=first.variant, compile=False, merge=()) == first]
    for case in alike[:BEFORE_EXTRAS]:
        yield Job("split", replace(case, compile=False, merge=()), groups=GROUPS)
