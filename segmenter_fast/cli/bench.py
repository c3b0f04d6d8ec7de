"""``segmenter-fast bench``: whole models without a subcommand; ops, training steps and comparisons with one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app
from .options import Device, DeviceOption, DtypeOption

bench = typer.Typer(help="Measure speed and memory; every output is checked before it is timed.")
app.add_typer(bench, name="bench")

RESULTS = Path("benchmarks") / "results"
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder of the results; each device has its own below.")]
BudgetOption = Annotated[float | None, typer.Option(min=0, help="Seconds; the most valuable cases go first.")]


@bench.callback(invoke_without_command=True)
def models(
    context: typer.Context,
    variant: Annotated[list[str] | None, typer.Option(help="May be repeated, as size, batch, classes, dtype.")] = None,
    size: Annotated[list[int] | None, typer.Option(min=1, help="Pixels a side; default 512.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Images at once; default 1, on a GPU also 32.")] = None,
    classes: Annotated[list[int] | None, typer.Option(min=1, help="Number of classes; default 150.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="auto, float32, bfloat16 or float16. Default: auto.")] = None,
    merge: Annotated[
        list[str] | None, typer.Option(help="Rows of ours with token merging, too: fast, faster, or fields in JSON.")
    ] = None,
    device: DeviceOption = "auto",
    compile: Annotated[bool, typer.Option(help="Compile peers and ours.")] = True,
    extras: Annotated[bool, typer.Option(help="Measure parts, and memory against classes, too.")] = True,
    seconds: Annotated[float, typer.Option(min=0, help="For the timing of one case.")] = 3.0,
    # With the end of the last case it is less than ten minutes on two cores.
    budget: Annotated[float, typer.Option(min=0, help="Seconds for all cases; the most valuable go first.")] = 540.0,
    out: OutOption = RESULTS,
) -> None:
    """Images per second of whole models, T, S and B at patch 8, 16, 32: the reference, strong peers and ours.

    Every output is checked before it is timed. Exit code 1: an output of ours was wrong.
    """
    if context.invoked_subcommand is not None:
        return
    from ..benchmarks.models.throughput import run_models

    grid = variant or (), size or (), batch or (), classes or (), dtype or (), merge or ()
    options = {"compile": compile, "extras": extras, "seconds": seconds, "budget": budget}
    _measure(run_models, *grid, device=device, out=out, **options)


@bench.command()
def defaults(
    variant: Annotated[list[str] | None, typer.Option(help="May be repeated, as batch.")] = None,
    size: Annotated[int, typer.Option(min=1, help="Pixels a side.")] = 512,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Images at once; default 1, 2 and 4.")] = None,
    device: DeviceOption = "auto",
    seconds: Annotated[float, typer.Option(min=0, help="For the timing of one case.")] = 3.0,
    out: OutOption = RESULTS,
    budget: BudgetOption = 540.0,
) -> None:
    """`optimize()`, `accelerate(...)` and the model itself, with defaults, against plain PyTorch: the worst ratio."""
    from ..benchmarks.models.defaults import run_defaults

    grid = variant or (), size, batch or ()
    _measure(run_defaults, *grid, device=device, out=out, seconds=seconds, budget=budget)


@bench.command()
def kernels(
    op: Annotated[list[str] | None, typer.Argument(help="Ops to run; default: all of them.")] = None,
    device: DeviceOption = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="A few small cases, made for two CPU cores.")] = False,
    out: OutOption = RESULTS,
    budget: BudgetOption = None,
) -> None:
    """Every fused op against its peers; where named, `sliding` windows and the `tokens` that merge against theirs."""
    from ..benchmarks.ops import run_ops

    _measure(run_ops, op or (), device=device, out=out, quick=quick, budget=budget)


@bench.command()
def train(
    model: Annotated[list[str] | None, typer.Option(help="t, s, b or l; this and the next two repeat.")] = None,
    patch: Annotated[list[int] | None, typer.Option(min=1, help="Patch size.")] = None,
    classes: Annotated[list[int] | None, typer.Option(min=1, help="Number of classes.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Side of the images in pixels.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images a step.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    compile: Annotated[bool, typer.Option(help="Measure compiled steps, too.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="A few small steps, made for two CPU cores.")] = False,
    out: OutOption = RESULTS,
    budget: BudgetOption = None,
) -> None:
    """Training steps of whole models: time, images per second and memory, against patch size and classes."""
    from ..benchmarks.training import run_training

    grid = model or (), patch or (), classes or (), size, batch
    options = {"dtype": dtype, "compile": compile, "quick": quick, "budget": budget}
    _measure(run_training, *grid, device=device, out=out, **options)


@bench.command()
def compare(
    before: Annotated[Path, typer.Argument(metavar="A", help="Folder of results, such as benchmarks/results/DEVICE.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="Folder of results to compare with A.")],
    force: Annotated[bool, typer.Option("--force", help="Compare results of different devices.")] = False,
) -> None:
    """Changes from A to B beyond the noise of both. Exit code 1: something of ours got worse."""
    from ..benchmarks.report.compare import print_comparison

    raise typer.Exit(int(print_comparison(before, after, force)))


@bench.command()
def folder(
    variant: Annotated[list[str], typer.Option(help="May be repeated.")] = ["seg_t_mask_16", "seg_s_mask_16"],  # noqa: B006
    photographs: Annotated[int, typer.Option(min=5, help="Files of 512 x 512 pixels.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 2,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    out: OutOption = RESULTS,
) -> None:
    """The whole job of predict: files to labels, and to overlays, too, against the model alone."""
    from ..benchmarks.models.folder import run_folder

    _measure(run_folder, variant, photographs, batch, dtype, device=device, out=out)


@bench.command()
def merging(
    weights: Annotated[
        Path | None, typer.Argument(help="DINOv2 ViT-S/14, as for --pretrained. Without it only speed is measured.")
    ] = None,
    photos: Annotated[list[Path] | None, typer.Argument(help="Photographs whose labels are compared.")] = None,
    variant: Annotated[
        list[str] | None, typer.Option(help="Models of which the speed counts; may be repeated.")
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seconds: Annotated[float, typer.Option(min=0, help="For the timing of one model.")] = 6.0,
    out: OutOption = RESULTS,
) -> None:
    """Token merging: speed of schedules, and the share of the exact model's labels that they keep on photographs."""
    from ..benchmarks.models.merging import run_merging

    _measure(run_merging, weights, photos or (), variant or (), dtype, device=device, out=out, seconds=seconds)


def _measure(run: Callable[..., int], *arguments: Any, device: Device, **options: Any) -> None:
    """Run a benchmark; exit code 1 if an output of ours was wrong."""
    from ..devices import choose_device

    raise typer.Exit(int(run(*arguments, device=choose_device(device), **options) > 0))
