"""``segmenter-fast bench``: whole models without a subcommand; kernels and others by theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import Device, DeviceOption, Dtype, DtypeOption, app

bench = typer.Typer(help="Measure speed and memory; every output is checked before it is timed.")
app.add_typer(bench, name="bench")

OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder of the results; each device has its own below.")]
BudgetOption = Annotated[float | None, typer.Option(min=0, help="Seconds; the most valuable cases go first.")]
RESULTS = Path("benchmarks") / "results"


@bench.callback(invoke_without_command=True)
def models(
    context: typer.Context,
    variant: Annotated[list[str] | None, typer.Option(help="Variant to run; may be given more than once.")] = None,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.auto,
    out: OutOption = RESULTS,
) -> None:
    """Images per second of whole models: the reference, strong peers and ours."""
    if context.invoked_subcommand is not None:
        return
    from ..benchmarks import throughput

    options = ["--device", device.value, "--dtype", dtype.value, "--out", str(out)]
    raise typer.Exit(throughput.main([*(variant or throughput.DEFAULT), *options]))


@bench.command()
def kernels(
    op: Annotated[list[str] | None, typer.Argument(help="Ops to run; default: all of them.")] = None,
    device: DeviceOption = Device.auto,
    quick: Annotated[bool, typer.Option("--quick", help="A few small cases, made for two CPU cores.")] = False,
    out: OutOption = RESULTS,
    budget: BudgetOption = None,
) -> None:
    """Every fused op against its peers."""
    from ..benchmarks import kernels as command
    from ..benchmarks.ops import OPS

    if unknown := set(op or ()) - set(OPS):
        raise ValueError(f"unknown ops {', '.join(sorted(unknown))}; known are {', '.join(OPS)}")
    options = ["--device", device.value, "--out", str(out), *(["--quick"] if quick else [])]
    if budget is not None:
        options += ["--budget", str(budget)]
    raise typer.Exit(command.main([*(op or OPS), *options]))
