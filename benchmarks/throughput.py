"""Whole models: images per second of the reference, strong peers and ours, over variants and what they are fed.

``segmenter-fast bench`` is this. A script calls ``python -m segmenter_fast.benchmarks.throughput --device cuda --budget
SECONDS --out DIR``. After each case ``throughput.json`` (the matrix), ``split.json`` (time of the parts) and
``classes.json`` (memory against classes) are written to the device's folder below DIR, at the end their plots. Cases
that the budget has no time for are rows that say "not run".
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.live import Live

from segmenter_fast import VARIANTS
from segmenter_fast.devices import choose_dtype

from .board import Board
from .cases import Row
from .device import describe, measure_ceilings, resolve
from .models import MODELS, PEER, REFERENCE, Point, run_point
from .results import Result, write
from .run import RESULTS
from .split import PARTS, split_point
from .throughput_plots import draw

# Most valuable first; the cases about parts and classes come after the third.
DEFAULT = tuple(f"seg_{size}_mask_{patch}" for size, patch in (
    ("s", 16), ("t", 16), ("b", 16), ("s", 32), ("s", 8), ("t", 32), ("t", 8), ("b", 32), ("b", 8),
))  # fmt: skip
BEFORE_EXTRAS = 3
CLASSES = (19, 60, 150, 1000)
OPS = ("throughput", "split", "classes")
# Calls of a case in units of the reference's, before anything is known of how fast peers and ours are.
CALLS = 12
Found = list[tuple[dict[str, Any], list[Row]]]


@dataclass(frozen=True)
class Job:
    """One case, or for "split" one for each part."""

    op: str
    point: Point

    def run(self, device: torch.device, ceilings: Any, seconds: float, tell: Callable[[str], None]) -> Found:
        if self.op == "split":
            tell("encoder, decoder, upsampling one by one")
            return split_point(self.point, device, seconds / 3)
        return [(self.point.parameters, run_point(self.point, device, ceilings, seconds, tell))]

    def not_run(self, note: str) -> Found:
        names = (REFERENCE, PEER, "ours") if self.op == "split" else MODELS
        rows = [Row(name, "not run", note) for name in names]
        if self.op == "split":
            return [(self.point.parameters | {"part": part}, rows) for part in PARTS]
        return [(self.point.parameters, rows)]


@dataclass
class Pace:
    """How long a case takes: ``overhead`` seconds, mostly of the compiler, and the models' calls.

    Those run at ``guess`` TFLOP/s until a case is done, then at the median of the references before: the upsampling,
    which counts as no FLOPs, takes most of the time of the fastest, and attention that is written out that of the
    slowest.
    """

    guess: float
    overhead: float
    learnt: list[float] = field(default_factory=list)

    def expects(self, job: Job, seconds: float) -> float:
        models = CALLS * job.point.flops / median(self.learnt or [self.guess]) / 1e12
        return max(models, seconds) + (self.overhead if job.point.compile else 0)

    def learn(self, job: Job, found: Found, took: float) -> None:
        reference = found[0][1][0]
        if job.op != "throughput" or reference.timing is None or reference.tflops is None:
            return
        self.learnt.append(reference.tflops)
        if job.point.compile:
            self.overhead = max(5.0, took - CALLS * reference.timing.median_ms / 1e3)


@dataclass
class Matrix:
    """Jobs on one device, until ``deadline`` (of ``time.monotonic``), and the result files that they fill."""

    device: torch.device
    out: Path
    seconds: float
    deadline: float | None
    console: Console
    results: dict[str, Result] = field(default_factory=dict)

    def run(self, jobs: Sequence[Job]) -> int:
        """Run all jobs there is time for. Returns how many were refused because our output was wrong."""
        record = describe(self.device)
        self.console.print(f"{record.name}, {record.threads} threads, PyTorch {record.torch}, commit {record.commit}")
        dtypes = tuple({torch.float32, *(job.point.dtype for job in jobs)})
        ceilings = measure_ceilings(self.device, dtypes, seconds=0.3)
        self.console.print(f"measured ceilings: {ceilings}")
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        for op in dict.fromkeys(job.op for job in jobs):
            self.results[op] = Result(op, record, ceilings, started, False)
        pace = Pace(ceilings.matmul_tflops["float32"] / 2, 60.0)
        board = Board([job.point for job in jobs], self.deadline)
        with Live(board, console=self.console, refresh_per_second=2) as live:
            for index, job in enumerate(jobs):
                board.begin(f"{job.op}: {job.point.name}")
                start = time.monotonic()
                expected = pace.expects(job, self.seconds)
                if self.deadline is not None and start + expected > self.deadline:
                    left = max(0.0, self.deadline - start)
                    found = job.not_run(f"takes about {expected:.0f} s, {left:.0f} s of the budget were left")
                else:
                    found = job.run(self.device, ceilings, self.seconds, board.tell)
                    pace.learn(job, found, time.monotonic() - start)
                self._keep(job, found, jobs[index + 1 :])
                line = board.end(job.op, found)
                if not self.console.is_terminal:  # a log shows no live table
                    live.console.print(line, highlight=False)
        if not self.console.is_terminal:
            self.console.print(board)
        return sum(len(result.refused) for result in self.results.values())

    def _keep(self, job: Job, found: Found, later: Sequence[Job]) -> None:
        """Write the file of the job's result; what is still to come stands in it as not run."""
        result = self.results[job.op]
        result.cases += found
        for status, names in (("refused", result.refused), ("not run", result.not_run)):
            rows = [row for _, rows in found for row in rows if row.status == status]
            if rows:
                names.append(f"{job.point.name}: {rows[0].note}")
        rest = [other for other in later if other.op == job.op]
        waiting = [case for other in rest for case in other.not_run("the run ended before it")]
        names = result.not_run + [f"{other.point.name}: the run ended before it" for other in rest]
        write(Result(**(vars(result) | {"cases": result.cases + waiting, "not_run": names})), self.out)


def main(arguments: list[str] | None = None) -> int:
    """0; 1 where a case was refused because our output was wrong."""
    parser = argparse.ArgumentParser(prog="segmenter_fast.benchmarks.throughput", description=__doc__)
    parser.add_argument(
        "--variant", action="append", help=f"may repeat, as the next four; default: {' '.join(DEFAULT)}"
    )
    parser.add_argument("--size", action="append", type=int, help="pixels a side (512)")
    parser.add_argument("--batch", action="append", type=int, help="images at once (1; on a GPU also 32)")
    parser.add_argument("--classes", action="append", type=int, help="number of classes (150)")
    parser.add_argument("--dtype", action="append", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, for peers and ours")
    parser.add_argument("--no-extras", action="store_true", help="the matrix only, without parts and classes")
    parser.add_argument("--seconds", type=float, default=3.0, help="for the timing of a case (%(default)s)")
    parser.add_argument("--budget", type=float, help="seconds for everything; the most valuable cases go first")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (%(default)s)")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    try:
        jobs = chosen(options, device := resolve(options.device))
    except ValueError as error:
        parser.error(str(error))
    console = Console()
    if not console.is_terminal:  # a log has no width to keep to
        console.width = 140
    deadline = None if options.budget is None else start + options.budget
    matrix = Matrix(device, options.out, options.seconds, deadline, console)
    wrong = matrix.run(jobs)
    for reason in (reason for result in matrix.results.values() for reason in result.refused):
        console.print(f"refused: {reason}", style="bold red", markup=False)
    folder = options.out / next(iter(matrix.results.values())).device.slug
    console.print(f"results in {folder}: {', '.join(path.name for path in draw(folder)) or 'nothing to draw'}")
    return 1 if wrong else 0


def chosen(options: argparse.Namespace, device: torch.device) -> list[Job]:
    """The jobs that the options ask for, most valuable first.

    Raises:
        ValueError: an unknown variant, or numbers that are not positive.
    """
    variants = options.variant or DEFAULT
    if unknown := sorted(set(variants) - set(VARIANTS)):
        raise ValueError(f"unknown variants {', '.join(unknown)}; known are {', '.join(VARIANTS)}")
    batches = options.batch or ((1, 32) if device.type == "cuda" else (1,))
    sizes, classes = options.size or (512,), options.classes or (150,)
    if min(*sizes, *batches, *classes, 1) < 1:
        raise ValueError(f"sizes, batches and classes must be positive, got {sizes}, {batches}, {classes}")
    dtypes = list(dict.fromkeys(choose_dtype(name, device) for name in options.dtype or ["auto"]))
    grid = itertools.product(dtypes, batches, sizes, classes, variants)
    points = [Point(v, d, s, b, k, not options.no_compile) for d, b, s, k, v in grid]
    matrix = [Job("throughput", point) for point in points]
    if options.no_extras:
        return matrix
    first = points[0]
    about = [Point(first.variant, first.dtype, first.size, first.batch, k, compile=False) for k in CLASSES]
    same = [p for p in points if (p.dtype, p.size, p.batch, p.classes) == vars_of(first)][:BEFORE_EXTRAS]
    parts = [Point(p.variant, p.dtype, p.size, p.batch, p.classes, compile=False) for p in same]
    extras = [Job("classes", point) for point in about] + [Job("split", point) for point in parts]
    return matrix[:BEFORE_EXTRAS] + extras + matrix[BEFORE_EXTRAS:]


def vars_of(point: Point) -> tuple[torch.dtype, int, int, int]:
    return point.dtype, point.size, point.batch, point.classes


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted: the cases that were finished are written")
