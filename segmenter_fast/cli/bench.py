"""``segmenter-fast bench``: whole models without a subcommand; kernels and others by theirs."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .app import Device, DeviceOption, Dtype, DtypeOption, app

bench = typer.Typer(help="Measure speed and memory; every output is checked before it is timed.")
app.add_typer(bench, name="bench")

OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder of the results; each device has its own below.")]
BudgetOption = Annotated[float | None, typer.Option(min=0, help="Seconds; the most valuable cases go first.")]


class Size(str, Enum):
    t = "t"
    s = "s"
    b = "b"
    l = "l"  # noqa: E741


RESULTS = Path("benchmarks") / "results"
# Seconds; with the end of the last case it is less than ten minutes on two cores.
MODELS_BUDGET = 540.0


@bench.callback(invoke_without_command=True)
def models(
    context: typer.Context,
    variant: Annotated[list[str] | None, typer.Option(help="May be repeated, as size, batch, classes, dtype.")] = None,
    size: Annotated[list[int] | None, typer.Option(min=1, help="Pixels a side; default 512.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Images at once; default 1, on a GPU also 32.")] = None,
    classes: Annotated[list[int] | None, typer.Option(min=1, help="Number of classes; default 150.")] = None,
    dtype: Annotated[list[Dtype] | None, typer.Option(help="Default: bfloat16 where it is fast.")] = None,
    device: DeviceOption = Device.auto,
    compile: Annotated[bool, typer.Option(help="Whether peers and ours are compiled.")] = True,
    extras: Annotated[bool, typer.Option(help="Whether to measure parts, and memory against classes, too.")] = True,
    seconds: Annotated[float, typer.Option(min=0, help="For the timing of one case.")] = 3.0,
    budget: Annotated[float, typer.Option(min=0, help="Seconds for everything; the most valuable cases go first.")] = (
        MODELS_BUDGET
    ),
    out: OutOption = RESULTS,
) -> None:
    """Images per second of whole models, T, S and B at patch 8, 16, 32: the reference, strong peers and ours.

    Every output is checked before it is timed. Exit code 1 says that an output of ours was wrong.
    """
    if context.invoked_subcommand is not None:
        return
    from ..benchmarks import throughput

    repeated = {"variant": variant, "size": size, "batch": batch, "classes": classes}
    options = [f"--{name}={value}" for name, values in repeated.items() for value in values or ()]
    options += [f"--dtype={choice.value}" for choice in dtype or ()]
    options += ["--no-compile"] * (not compile) + ["--no-extras"] * (not extras)
    options += [f"--device={device.value}", f"--seconds={seconds}", f"--budget={budget}", f"--out={out}"]
    raise typer.Exit(throughput.main(options))


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


@bench.command()
def train(
    model: Annotated[list[Size] | None, typer.Option(help="Size of the model; this and the next two repeat.")] = None,
    patch: Annotated[list[int] | None, typer.Option(min=1, help="Patch size.")] = None,
    classes: Annotated[list[int] | None, typer.Option(min=1, help="Number of classes.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Of the images: pixels a side.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images a step.")] = None,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.auto,
    compile: Annotated[bool, typer.Option(help="Whether to measure what torch.compile makes of the step.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="A few small steps, made for two CPU cores.")] = False,
    out: OutOption = RESULTS,
    budget: BudgetOption = None,
) -> None:
    """Training steps of whole models: time, images per second and memory, against patch size and classes."""
    from ..benchmarks import training

    options = [f"--model={choice.value}" for choice in model or ()]
    options += [f"--patch={count}" for count in patch or ()] + [f"--classes={count}" for count in classes or ()]
    scalars = {"size": size, "batch": batch, "budget": budget}
    options += [f"--{name}={value}" for name, value in scalars.items() if value is not None]
    options += ["--quick"] * quick + ["--no-compile"] * (not compile)
    options += ["--device", device.value, "--dtype", dtype.value, "--out", str(out)]
    raise typer.Exit(training.main(options))


@bench.command()
def compare(
    before: Annotated[Path, typer.Argument(metavar="A", help="Folder of results, such as benchmarks/results/DEVICE.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="Folder of results to hold against them.")],
    force: Annotated[bool, typer.Option("--force", help="Compare results of different devices.")] = False,
) -> None:
    """What got slower or faster from A to B by more than the noise of both; exit code 1 if anything got slower."""
    from ..benchmarks import compare as command

    raise typer.Exit(command.main([str(before), str(after), *(["--force"] if force else [])]))
