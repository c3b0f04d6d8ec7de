"""``segmenter-fast predict``."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from .. import Segmenter
from ..predict_folder import Job, make_writable, plan, run
from .app import Device, DeviceOption, Dtype, DtypeOption, ModelOption, app, model_of, say


@app.command()
def predict(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT", help="Image files and folders of them.")],
    model: ModelOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for labels/*.png and overlays/*.png.")],
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.auto,
    resume: Annotated[bool, typer.Option("--resume", help="Skip images whose outputs are there.")] = False,
    scales: Annotated[str, typer.Option(help="Factors to average over, such as 0.75,1,1.5.")] = "1",
    flip: Annotated[bool, typer.Option("--flip", help="Average over the mirrored image, too.")] = False,
    overlay: Annotated[bool, typer.Option(help="Whether to write overlays.")] = True,
) -> None:
    """Segment images: a PNG of class indices, and an overlay, for each."""
    factors = _factors(scales)
    jobs = plan(inputs, out, overlay)
    make_writable(out, overlay)
    remaining = [job for job in jobs if not (resume and job.finished)]
    start, failures = time.perf_counter(), []
    if remaining:
        segmenter = model_of(model, device, dtype)
        start = time.perf_counter()
        failures = _segment(segmenter, remaining, factors, flip)
    seconds, written = time.perf_counter() - start, len(remaining) - len(failures)
    rate = f" in {seconds:.1f} s ({written / seconds:.2f} images/s)" if written else ""
    typer.echo(f"{written} written{rate}, {len(jobs) - len(remaining)} skipped, {len(failures)} failed; see {out}")
    for job, reason in failures:
        say(f"failed: {job.source}: {reason}", "red")
    if failures:
        raise typer.Exit(1)


def _segment(model: Segmenter, jobs: list[Job], scales: tuple[float, ...], flip: bool) -> list[tuple[Job, Exception]]:
    """Runs the jobs under a progress bar; what failed, and why."""
    failures: list[tuple[Job, Exception]] = []
    done = 0
    try:
        with _progress() as progress:
            for job in progress.track(jobs, description="segmenting"):
                try:
                    run(model, job, scales, flip)
                except (
                    OSError,
                    ValueError,
                    RuntimeError,
                    MemoryError,
                ) as error:  # RuntimeError: PyTorch's out of memory
                    failures.append((job, error))
                done += 1
    except KeyboardInterrupt:
        say(f"interrupted: {done} of {len(jobs)} images done; --resume goes on from here", "yellow")
        raise typer.Exit(130) from None
    return failures


def _factors(text: str) -> tuple[float, ...]:
    """ "0.75,1,1.5" -> the numbers."""
    try:
        factors = tuple(float(part) for part in text.split(","))
    except ValueError:
        factors = ()
    if not factors or not all(0 < factor < math.inf for factor in factors):
        raise typer.BadParameter(f"--scales must be positive numbers with commas between them, got {text!r}")
    return factors


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.completed / task.elapsed if task.elapsed else 0:.2f} images/s")


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True))
