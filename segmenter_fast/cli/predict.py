"""``segmenter-fast predict``."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from .. import VARIANTS
from . import options
from .app import Terminated, app, default_batch_size, load_for_inference, say, short_warnings

if TYPE_CHECKING:
    from ..inference.folders import Job
    from ..processes import PredictionReport, World


@app.command()
def predict(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT", help="Image files and folders of them.")],
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="Checkpoint: folder, file or hub id; a variant's name: random weights."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for labels/* and overlays/*.png.")],
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Skip finished images and continue interrupted large ones.")
    ] = False,
    scales: Annotated[str, options.SCALES] = "1",
    flip: options.FlipOption = False,
    window: options.WindowOption = None,
    stride: options.StrideOption = None,
    overlap: Annotated[int | None, typer.Option(metavar="N", help="Same as --stride WINDOW - N.")] = None,
    batch_size: options.BatchSizeOption = None,
    optimize: options.OptimizeOption = True,
    merge: options.MergeOption = None,
    bands: options.BandsOption = None,
    scale: options.ScaleOption = None,
    overlay: Annotated[bool, typer.Option(help="Write overlays.")] = True,
    show_tokens: Annotated[
        bool, typer.Option("--show-tokens", help="Draw the merged tokens, tokens/*.png, of images of one window.")
    ] = False,
    page: options.PageOption = None,
    overwrite: options.OverwriteOption = False,
    root: Annotated[
        Path | None, typer.Option(help="Folder that holds all inputs; outputs keep the path below it.")
    ] = None,
    keep_suffix: Annotated[bool, typer.Option("--keep-suffix", help="Name outputs x.jpg.png, not x.png.")] = False,
    format: Annotated[
        Literal["auto", "png", "tiff"],
        typer.Option(help="Format of the labels. auto: PNG up to 8192 x 8192 pixels, tiled TIFF above."),
    ] = "auto",
) -> None:
    """Segment images: a file of class indices, and an overlay, for each.

    Images above 8192 x 8192 pixels are read, segmented and written by rows; their overlays are reduced to 2048 pixels.
    Under torchrun each process takes its share of the images.
    """
    factors, numbers = options.parse_scales(scales), options.parse_numbers("--bands", bands, int)
    options.check_windows(window, stride, batch_size)
    if stride is not None and overlap is not None:
        raise typer.BadParameter(f"give --stride or --overlap, not both; got --stride {stride}, --overlap {overlap}")
    if overlap is not None and overlap < 0:
        raise typer.BadParameter(f"--overlap must be at least 0 and below the window, got {overlap}")
    if show_tokens and (merge == "none" or flip or factors != (1.0,)):
        raise typer.BadParameter(
            "--show-tokens draws one run of a model that merges: no --merge none, --scales, --flip"
        )
    if (known := window or _known_window(model)) is not None:
        _stride(stride, overlap, known)
    from ..captions import RANDOM
    from ..inference.folders import make_writable, plan
    from ..inference.pipeline import run_all
    from ..inference.records import unfinished
    from ..inference.resume import describe_run
    from ..inference.settings import Settings
    from ..processes import PredictionReport, World

    world = World.from_environment()
    with short_warnings(show=world.rank == 0):
        jobs = plan(inputs, out, overlay, format, root=root, keep_suffix=keep_suffix, tokens=show_tokens)
    world = world.for_prediction()
    leads = world.rank == 0 or world.store is None  # a rank that no store connects to others reports on its own
    note = RANDOM if model in VARIANTS and not Path(model).exists() else ""
    jobs = [dataclasses.replace(job, page=page, note=note) for job in jobs[world.rank :: world.size]]
    done, total = 0, len(jobs)
    report = PredictionReport()
    try:
        missing = sum(not (resume and (job.labels.exists() or job.tiled.exists())) for job in jobs)
        segmenter = load_for_inference(model, device, dtype, optimize, missing, merge)
        if show_tokens and segmenter.config.merging is None:
            raise ValueError(f"--show-tokens: {model} merges no tokens; give a --merge, such as fast")
        stride = _stride(stride, overlap, window or segmenter.config.window_size)
        batch_size = default_batch_size(segmenter) if batch_size is None else batch_size
        settings = Settings.of(segmenter.config, window, stride, factors, flip, batch_size, numbers, scale)
        run = describe_run(segmenter, settings)
        run["options"] |= {"page": page} if page else {}
        remaining, report.restarts, report.failures = unfinished(jobs, run, resume, overwrite)
        refused = len(report.failures)
        report.skipped = len(jobs) - len(remaining) - refused
        make_writable(out, overlay, show_tokens)
        total = len(remaining) + refused
        done, total = world.count(refused, total) or (refused, total)
        segment_all = functools.partial(run_all, segmenter, remaining, settings, run=run, resume=resume)
        start = time.perf_counter()
        bars = Progress(
            *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn()),
            console=Console(stderr=True),
            disable=not leads,
        )
        bars.add_task("segmenting", completed=done, total=total, unit="images/s")
        bars.add_task("", total=None, visible=False, unit="windows/s")
        with short_warnings():
            _segment_all(jobs, segment_all, report, world, bars)
    except KeyboardInterrupt as interrupt:
        if leads:
            done = report.written + len(report.failures)
            say(
                f"interrupted: {done} of {len(jobs) - report.skipped} images done; --resume goes on from here",
                "yellow",
            )
        raise typer.Exit(143 if isinstance(interrupt, Terminated) else 130) from None
    if leads:
        _summarise(report, time.perf_counter() - start, out)


def _known_window(model: str) -> int | None:
    """Return the window of a variant, or of a checkpoint whose configuration is a file of its own; else None."""
    path = Path(model)
    if model in VARIANTS and not path.exists():
        return VARIANTS[model].window_size
    folder = path.parent if path.name in ("model.safetensors", "checkpoint.pth") else path
    try:
        if (folder / "variant.yml").exists():  # of the official program
            from ..weights.reading import read_mapping

            described = read_mapping(folder / "variant.yml")
            side = described["net_kwargs"]["image_size"]
            found = described.get("inference_kwargs", {}).get("window_size", side if isinstance(side, int) else side[0])
        else:
            found = json.loads((folder / "config.json").read_text(encoding="utf-8"))["window_size"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return found if isinstance(found, int) and found > 0 else None


def _stride(stride: int | None, overlap: int | None, window: int) -> int | None:
    """Return ``--stride``, or that of ``--overlap`` for windows of this side."""
    if overlap is None:
        return stride
    if overlap >= window:
        allowed = f"at least 0 and below the window of {window} pixels"
        raise typer.BadParameter(f"--overlap must be {allowed}, got {overlap}")
    return window - overlap


def _segment_all(
    jobs: Sequence[Job], segment_all: Callable[..., None], report: PredictionReport, world: World, bars: Progress
) -> None:
    """Segment the images of this rank, and complete the report: on rank 0 by those of all ranks.

    Args:
        jobs: all images of this rank, those that need nothing included.
        segment_all: ``run_all`` for ``begin`` and ``end``.
        bars: the display, with a bar of the images and one of an image's windows.
    """
    images, windows = bars.task_ids
    places = {str(job.source): place for place, job in enumerate(jobs)}

    def begin(job: Job) -> functools.partial[None]:
        bars.reset(windows, description=job.source.name, visible=False)
        return functools.partial(bars.update, windows, visible=True)

    from ..io.walk import reason_of

    def end(job: Job, restarted: str | None, error: Exception | None) -> None:
        source = str(job.source)
        if error is not None:
            report.failures.append((source, reason_of(error)))
        else:
            report.written += 1
            report.restarts += [(source, restarted)] if restarted else []
        bars.update(windows, visible=False)
        done, total = world.count(done=1) or (report.written + len(report.failures), bars.tasks[0].total)
        bars.update(images, completed=done, total=total)

    with bars:
        segment_all(begin, end)
        report.failures.sort(key=lambda failure: places[failure[0]])
        world.collect(report, functools.partial(bars.update, images))


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.completed / task.elapsed if task.elapsed else 0:.2f} {task.fields['unit']}")


def _summarise(report: PredictionReport, seconds: float, out: Path) -> None:
    written = report.written
    rate = f" in {seconds:.1f} s ({written / seconds:.2f} images/s)" if written else ""
    typer.echo(f"{written} written{rate}, {report.skipped} skipped, {len(report.failures)} failed; see {out}")
    for reason in dict.fromkeys(reason for _, reason in report.restarts):
        sources = [source for source, why in report.restarts if why == reason]
        more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
        say(f"restarted: {sources[0]}{more}: {reason}", "yellow")
    for source, reason in report.failures:
        say(f"failed: {source}: {reason}", "red")
    if report.failures:
        raise typer.Exit(1)
