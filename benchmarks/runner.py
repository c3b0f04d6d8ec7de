"""Runs commands and lists of cases on one device: budget, progress, tables, result files."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from .case import Case, DisagreementError, Row, is_ours, run_case
from .device import Ceilings, DeviceRecord, describe, measure_ceilings
from .results import Result, write


def run_command(function: Callable[..., None]) -> None:
    """Run a function with typer's annotations as a program."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(function)
    try:
        app()
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def make_console() -> Console:
    """The console of a command; a log has no width to keep to."""
    console = Console()
    if not console.is_terminal:
        console.width = 140
    return console


@dataclass(frozen=True)
class Runner:
    """One command on one device. ``seconds`` is the time of a case once its variants are warm."""

    record: DeviceRecord
    ceilings: Ceilings
    out: Path
    quick: bool
    seconds: float
    console: Console
    started: str

    @classmethod
    def start(
        cls, device: torch.device, dtypes: Iterable[torch.dtype], out: Path, quick: bool, seconds: float
    ) -> Runner:
        """Measure the ceilings of ``dtypes`` on ``device`` and print them with the device's record."""
        console, record = make_console(), describe(device)
        console.print(f"{record.name}, PyTorch {record.torch}, Triton {record.triton}, commit {record.commit}")
        ceilings = measure_ceilings(device, tuple(dtypes), seconds=0.3 if quick or device.type == "cuda" else 1.0)
        console.print(f"measured ceilings: {ceilings}")
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return cls(record, ceilings, out, quick, seconds, console, started)

    def result(self, op: str) -> Result:
        """A result of this run, still without cases."""
        return Result(op, self.record, self.ceilings, self.started, self.quick)

    def keep(self, result: Result, parameters: dict[str, Any], rows: list[Row], title: str) -> None:
        """Add a case to a result, write the file and print the rows."""
        result.cases.append((parameters, rows))
        write(result, self.out)
        self.console.print(case_table(title, rows))

    def run(self, cases: list[tuple[str, Case]], deadline: float) -> int:
        """Run ``cases``, each with its op, until ``deadline`` and write ``<out>/<device>/<op>.json`` after each.

        A case that comes again, with more variants, replaces its rows. The list is emptied, so that a finished case
        frees its memory. Returns the number of cases that were refused because an output of ours was wrong.
        """
        results = {op: self.result(op) for op, _ in cases}
        count = len(cases)
        with self.console.status("") as status:
            while cases:
                if time.monotonic() > deadline:
                    self.console.print(f"{len(cases)} of {count} cases not run, the time is used up")
                    break
                op, case = cases.pop(0)
                result = results[op]
                status.update(f"{count - len(cases)} of {count}: {op}, {case.name}")
                result.not_run = [late.name for other, late in cases if other == op]
                rows = self._run_case(case, result, deadline)
                result.cases = [found for found in result.cases if found[0] != case.parameters]
                if rows:
                    result.cases.append((case.parameters, rows))
                    self.console.print(case_table(case.name, rows))
                if result.cases:
                    write(result, self.out)
        for result in results.values():
            if result.cases:
                self.console.print(f"{result.op}: wrote {write(result, self.out)}")
        return sum(len(result.refused) for result in results.values())

    def _run_case(self, case: Case, result: Result, deadline: float) -> list[Row]:
        """The rows of a case; none where our output is wrong, which ``result`` then tells."""
        try:
            return run_case(case, self.ceilings, self.seconds, deadline=deadline)
        except DisagreementError as error:
            result.refused.append(str(error))
            self.console.print(f"[bold red]refused[/] {escape(str(error))}", highlight=False)
            return []

    def draw(self, plots: Sequence[str]) -> None:
        """Draw the plots of the result files and print their names."""
        folder = self.out / self.record.slug
        try:
            from .plots import draw  # matplotlib is needed here alone
        except ImportError as error:
            self.console.print(f"results in {folder}; no plots: {error}")
            return
        names = ", ".join(path.name for path in draw(folder, plots)) or "nothing to draw"
        self.console.print(f"results in {folder}: {names}")


def narrow_table(title: str, headings: Sequence[str]) -> Table:
    """A table without frame, one space between columns; only its first column may break into lines."""
    result = Table(title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    for number, heading in enumerate(headings):
        result.add_column(heading, justify="right" if number else "left", no_wrap=bool(number))
    return result


def case_table(name: str, rows: Sequence[Row]) -> RenderableType:
    """The rows of a case in 80 columns, followed by the reasons of those without figures.

    The gain of a variant is its speed over the first one's.
    """
    result = narrow_table(name, ("variant", "ms", "p20..p80", "gain", "MiB", "TFLOP/s", "rate", "share", "error"))
    result.title_justify = "left"
    reasons: dict[str, list[str]] = {}
    for row in rows:
        timing = row.timing
        if timing is None:
            colour = "bold red" if row.status == "refused" else "yellow"
            reasons.setdefault(f"[{colour}]{row.status}[/]: {escape(row.note)}", []).append(row.variant)
            continue
        rate = f"{row.images_s:.3g} img/s" if row.images_s else f"{row.gb_s:.3g} GB/s" if row.gb_s else ""
        result.add_row(
            f"[green]{row.variant}[/]" if is_ours(row.variant) else row.variant,
            f"{timing.median_ms:.4g}",
            f"{timing.p20_ms:.4g}..{timing.p80_ms:.4g}",
            f"{rows[0].timing.median_ms / timing.median_ms:.3g}" if rows[0].timing else "",
            "" if timing.peak_bytes is None else f"{timing.peak_bytes / 2**20:.0f}",
            "" if row.tflops is None else f"{row.tflops:.3g}",
            rate,
            "" if row.share is None else f"{row.share:.0%}",
            "" if row.error is None else f"{row.error:.1g}",
        )
    return Group(result, *(f"{', '.join(names)}: {reason}" for reason, names in reasons.items()), "")
