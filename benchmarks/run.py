"""What the commands over cases share: a run on one device, its tables, its result files, its time."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from .cases import Case, DisagreementError, Row, is_ours, run_case
from .device import Ceilings, DeviceRecord, describe, measure_ceilings
from .results import Result, write

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = ("variant", "ms", "p20..p80", "x eager", "MiB", "TFLOP/s", "rate", "share", "error")


@dataclass(frozen=True)
class Run:
    """One command on one device. ``seconds`` is the time of a case once its variants are warm."""

    record: DeviceRecord
    ceilings: Ceilings
    out: Path
    quick: bool
    seconds: float
    console: Console

    @classmethod
    def begin(cls, device: torch.device, dtypes: Iterable[torch.dtype], out: Path, quick: bool, seconds: float) -> Run:
        """Measure the ceilings of ``dtypes`` on ``device`` and print what is there."""
        console = Console()
        if not console.is_terminal:  # a log has no width to keep to
            console.width = 120
        record = describe(device)
        console.print(f"{record.name}, PyTorch {record.torch}, Triton {record.triton}, commit {record.commit}")
        ceilings = measure_ceilings(device, tuple(dtypes), seconds=0.3 if quick or device.type == "cuda" else 1.0)
        console.print(f"measured ceilings: {ceilings}")
        return cls(record, ceilings, out, quick, seconds, console)

    def cases(self, op: str, cases: list[Case], deadline: float | None = None) -> int:
        """Run ``cases``, of which the list is emptied, until ``deadline`` (of ``time.monotonic``).

        Each case is dropped when it is done, and the memory it holds with it. ``<out>/<device>/<op>.json`` is written
        after each, so that an interrupted run keeps what it has.

        Returns:
            How many cases were refused because an output of ours was wrong.
        """
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        result = Result(op, self.record, self.ceilings, started, self.quick)
        count = len(cases)
        with self.console.status("") as status:
            while cases:
                if deadline is not None and time.monotonic() > deadline:
                    result.not_run = [late.name for late in cases]
                    self.console.print(f"{op}: {len(cases)} of {count} cases not run, the time is used up")
                    break
                case = cases.pop(0)
                status.update(f"{op}, {count - len(cases)} of {count}: {case.name}")
                try:
                    rows = run_case(case, self.ceilings, self.seconds)
                except DisagreementError as error:
                    result.refused.append(str(error))
                    self.console.print(f"[bold red]refused[/] {escape(str(error))}", highlight=False)
                    continue
                result.cases.append((case.parameters, rows))
                write(result, self.out)
                self.console.print(table(case, rows))
        if result.cases:
            self.console.print(f"{op}: wrote {write(result, self.out)}")
        return len(result.refused)


def add_options(parser: argparse.ArgumentParser, timed: bool = True) -> None:
    """``--device`` and ``--out``; ``--quick`` and ``--budget`` where cases are timed. Every command has the same."""
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (%(default)s)")
    if timed:
        parser.add_argument("--quick", action="store_true", help="a few small cases, made for two CPU cores")
        parser.add_argument("--budget", type=float, help="seconds for everything; the most valuable cases go first")


def narrow_table(title: str, headings: Sequence[str]) -> Table:
    """A table without rows or frame, one space between columns; only its first column may break into lines."""
    result = Table(title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    for number, heading in enumerate(headings):
        result.add_column(heading, justify="right" if number else "left", no_wrap=bool(number))
    return result


def table(case: Case, rows: Sequence[Row]) -> RenderableType:
    """The rows of a case as they are printed, in 80 columns, and below them why variants have no figures."""
    result = narrow_table(case.name, COLUMNS)
    result.title_justify = "left"
    baseline = next((row.timing.median_ms for row in rows if row.variant == "eager" and row.timing), None)
    reasons = []
    for row in rows:
        label = f"[green]{row.variant}[/]" if is_ours(row.variant) else row.variant
        timing = row.timing
        if timing is None:
            reasons.append(f"{row.variant}: [yellow]{row.status}[/]: {escape(row.note)}")
            continue
        rate = f"{row.images_s:.3g} img/s" if row.images_s else f"{row.gb_s:.3g} GB/s" if row.gb_s else ""
        result.add_row(
            label,
            f"{timing.median_ms:.4g}",
            f"{timing.p20_ms:.4g}..{timing.p80_ms:.4g}",
            f"{baseline / timing.median_ms:.3g}" if baseline else "",
            "" if timing.peak_bytes is None else f"{timing.peak_bytes / 2**20:.0f}",
            "" if row.tflops is None else f"{row.tflops:.3g}",
            rate,
            "" if row.share is None else f"{row.share:.0%}",
            f"{row.error:.1g}",
        )
    return Group(result, *reasons, "")
