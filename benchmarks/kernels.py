"""Ours against every peer, op by op: ``python -m segmenter_fast.benchmarks.kernels upsample_argmax attention``.

Writes ``<out>/<device>/<op>.json`` after each case, so that an interrupted run keeps what it has.
"""

from __future__ import annotations

import argparse
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .cases import OURS, Case, DisagreementError, Row, run_case
from .device import Ceilings, DeviceRecord, describe, measure_ceilings, resolve
from .ops import OPS
from .results import Result, write

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = ("variant", "median ms", "p20 .. p80", "x eager", "peak MiB", "TFLOP/s", "GB/s", "share", "error", "status")


def main(arguments: list[str] | None = None) -> int:
    """0; 1 where a case was refused because our output was wrong."""
    parser = argparse.ArgumentParser(prog="segmenter_fast.benchmarks.kernels", description=__doc__)
    parser.add_argument("ops", nargs="+", choices=sorted(OPS), metavar="OP", help=", ".join(OPS))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="a few small cases, made for two CPU cores")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (%(default)s)")
    parser.add_argument("--budget", type=float, help="seconds for all ops together; the most valuable cases go first")
    options = parser.parse_args(arguments)
    try:
        device = resolve(options.device)
    except ValueError as error:
        parser.error(str(error))
    console = Console()
    if not console.is_terminal:  # a log has no width to keep to
        console.width = 120
    start = time.monotonic()
    record = describe(device)
    console.print(f"{record.name}, PyTorch {record.torch}, Triton {record.triton}, commit {record.commit}")
    dtypes = (torch.float32, torch.bfloat16) + ((torch.float16,) if device.type == "cuda" else ())
    ceilings = measure_ceilings(device, dtypes, seconds=0.3 if options.quick or device.type == "cuda" else 1.0)
    rates = ", ".join(f"{name} {rate:.3g} TFLOP/s" for name, rate in ceilings.matmul_tflops.items())
    console.print(f"measured ceilings: copy {ceilings.copy_gb_s:.4g} GB/s, matrix product {rates}")
    wrong = 0
    for index, op in enumerate(options.ops):
        deadline = None
        if options.budget is not None:
            now = time.monotonic()
            deadline = now + (start + options.budget - now) / (len(options.ops) - index)
        wrong += _run_op(op, device, record, ceilings, options, deadline, console)
    return 1 if wrong else 0


def _run_op(
    op: str,
    device: torch.device,
    record: DeviceRecord,
    ceilings: Ceilings,
    options: argparse.Namespace,
    deadline: float | None,
    console: Console,
) -> int:
    """Run the cases of ``op`` until ``deadline``; return how many were refused."""
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    result = Result(op, record, ceilings, started, options.quick)
    seconds = 0.5 if options.quick or device.type == "cuda" else 2.0
    cases = OPS[op](device, options.quick)
    with console.status("") as status:
        for index, case in enumerate(cases):
            status.update(f"{op}, {index + 1} of {len(cases)}: {case.name}")
            if deadline is not None and time.monotonic() > deadline:
                result.not_run = [late.name for late in cases[index:]]
                break
            try:
                rows = run_case(case, ceilings, seconds)
            except DisagreementError as error:
                result.refused.append(str(error))
                console.print(f"[bold red]refused[/] {error}", highlight=False)
                continue
            result.cases.append((case.parameters, rows))
            write(result, options.out)
            console.print(_table(case, rows))
    if result.not_run:
        console.print(f"{op}: {len(result.not_run)} of {len(cases)} cases not run, the time is used up")
    if result.cases:
        console.print(f"{op}: wrote {write(result, options.out)}")
    return len(result.refused)


def _table(case: Case, rows: list[Row]) -> Table:
    table = Table(title=case.name, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, no_wrap=column != COLUMNS[-1])
    baseline = next((row.timing.median_ms for row in rows if row.variant == "eager" and row.timing), None)
    for row in rows:
        label = f"[green]{row.variant}[/]" if row.variant == OURS else row.variant
        timing = row.timing
        if timing is None:
            table.add_row(label, *[""] * 8, f"[yellow]{row.status}[/]: {escape(row.note)}")
            continue
        table.add_row(
            label,
            f"{timing.median_ms:.4g}",
            f"{timing.p20_ms:.4g} .. {timing.p80_ms:.4g}",
            f"{baseline / timing.median_ms:.2f}" if baseline else "",
            "" if timing.peak_bytes is None else f"{timing.peak_bytes / 2**20:.1f}",
            "" if row.tflops is None else f"{row.tflops:.4g}",
            "" if row.gb_s is None else f"{row.gb_s:.4g}",
            "" if row.share is None else f"{row.share:.0%}",
            f"{row.error:.1g}",
            row.status,
        )
    return table


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted: the cases that were finished are written")
