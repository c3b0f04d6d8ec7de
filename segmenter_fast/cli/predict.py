"""``segmenter-fast predict``."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from .. import Segmenter
from ..inference.folders import Job, make_writable, plan, run
from ..inference.predict import Settings
from ..processes import PredictionReport, World
from .app import Device, DeviceOption, Dtype, DtypeOption, ModelOption, app, factors, model_of, say


class Format(str, Enum):
    auto = "auto"
    png = "png"
    tiff = "tiff"


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which a batch system or torchrun sends."""


@app.command()
def predict(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT", help="Image files and folders of them.")],
    model: ModelOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for labels/* and overlays/*.png.")],
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.auto,
    resume: Annotated[
        bool, typer.Option("--resume", help="Skip finished images, and go on inside of interrupted large ones.")
    ] = False,
    scales: Annotated[str, typer.Option(help="Factors to average over, such as 0.75,1,1.5.")] = "1",
    flip: Annotated[bool, typer.Option("--flip", help="Average over the mirrored image, too.")] = False,
    window: Annotated[int | None, typer.Option(help="Side of the windows in pixels. Default: the model's.")] = None,
    overlap: Annotated[int | None, typer.Option(help="Pixels that windows share. Default: the model's.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows that go through the model at once.")] = 2,
    overlay: Annotated[bool, typer.Option(help="Whether to write overlays.")] = True,
    format: Annotated[
        Format, typer.Option(help="Of the labels. auto: PNG up to 8192 x 8192 pixels, tiled TIFF above.")
    ] = Format.auto,
) -> None:
    """Segment images: a file of class indices, and an overlay, for each.

    Images above 8192 x 8192 pixels are read, segmented and written by rows; their overlays are reduced to 2048 pixels.
    Under torchrun each process takes its share of the images.
    """
    settings = Settings(factors(scales), flip, window, None, batch_size)
    if window is not None:
        settings = _overlapping(settings, window, overlap)
    with _ending_on_sigterm():
        world = World.from_environment().with_store()
        jobs = world.share(plan(inputs, out, overlay, format.value))
        make_writable(out, overlay)
        remaining = [job for job in jobs if not (resume and job.finished)]
        report = PredictionReport(skipped=len(jobs) - len(remaining))
        world.begin(len(remaining))
        try:
            segmenter = None
            if remaining:
                world.use_own_gpu()
                segmenter = model_of(model, device, dtype)
                settings = _overlapping(settings, window or segmenter.config.window_size, overlap)
            start = time.perf_counter()
            with _progress(world.leads) as progress:
                images = _Images(progress, world, len(remaining))
                if segmenter is not None:
                    _segment(segmenter, remaining, settings, model, resume, world, images, report)
                report = world.collect(report, images.show)
        except KeyboardInterrupt as interrupt:
            if world.leads:
                done = report.written + len(report.failures)
                say(f"interrupted: {done} of {len(remaining)} images done; --resume goes on from here", "yellow")
            raise typer.Exit(143 if isinstance(interrupt, _Terminated) else 130) from None
    if world.leads:
        _summarise(report, time.perf_counter() - start, out)


def _segment(
    model: Segmenter,
    jobs: list[Job],
    settings: Settings,
    name: str,
    resume: bool,
    world: World,
    images: _Images,
    report: PredictionReport,
) -> None:
    """Runs the jobs and notes in ``report`` what became of each."""
    for job in jobs:
        try:
            restarted = run(model, job, settings, name=name, resume=resume, progress=images.windows_of(job.source.name))
        except (OSError, ValueError, RuntimeError, MemoryError) as error:  # RuntimeError: PyTorch's out of memory
            report.failures.append((str(job.source), str(error)))
        else:
            report.written += 1
            if restarted:
                report.restarts.append((str(job.source), restarted))
        world.advance()
        images.add()


class _Images:
    """The bars: one of the images, of all ranks where they can tell, and one of the windows of the image at hand."""

    def __init__(self, progress: Progress, world: World, total: int) -> None:
        self._progress, self._world, self._done, self._total = progress, world, 0, total
        self._images = progress.add_task("segmenting", total=total, unit="images/s")
        self._windows = progress.add_task("", total=None, visible=False, unit="windows/s")
        self.show()

    def add(self) -> None:
        self._done += 1
        self._progress.update(self._windows, visible=False)
        self.show()

    def show(self) -> None:
        done, total = self._world.counts() or (self._done, self._total)
        self._progress.update(self._images, completed=done, total=total)

    def windows_of(self, name: str) -> Callable[[int, int], None]:
        """What an image's progress is reported to; a single window is not worth a bar."""
        self._progress.reset(self._windows, description=name, visible=False)

        def report(done: int, total: int) -> None:
            self._progress.update(self._windows, completed=done, total=total, visible=total > 1)

        return report


def _summarise(report: PredictionReport, seconds: float, out: Path) -> None:
    written = report.written
    rate = f" in {seconds:.1f} s ({written / seconds:.2f} images/s)" if written else ""
    typer.echo(f"{written} written{rate}, {report.skipped} skipped, {len(report.failures)} failed; see {out}")
    for source, reason in report.restarts:
        say(f"begun anew: {source}: {reason}", "yellow")
    for source, reason in report.failures:
        say(f"failed: {source}: {reason}", "red")
    if report.failures:
        raise typer.Exit(1)


def _overlapping(settings: Settings, window: int, overlap: int | None) -> Settings:
    """The stride that leaves ``overlap`` pixels of the window to the next one; the model's where it is None."""
    if window < 1 or settings.batch_size < 1:
        name, given = ("--window", window) if window < 1 else ("--batch-size", settings.batch_size)
        raise typer.BadParameter(f"{name} must be at least 1, got {given}")
    if overlap is None:
        return settings
    if not 0 <= overlap < window:
        raise typer.BadParameter(f"--overlap must be at least 0 and below the window of {window} pixels, got {overlap}")
    return Settings(settings.scales, settings.flip, settings.window, window - overlap, settings.batch_size)


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does."""

    def end(number: int, frame: Any) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.completed / task.elapsed if task.elapsed else 0:.2f} {task.fields['unit']}")


def _progress(shown: bool) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True), disable=not shown)
