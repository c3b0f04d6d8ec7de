"""``segmenter-fast evaluate`` and ``plot``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .. import SegmenterConfig
from ..io.atomic import atomic_path
from ..processes import process_group
from .app import Device, DeviceOption, Dtype, DtypeOption, app, factors, model_of

if TYPE_CHECKING:
    from ..train.metrics import Scores


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="M", help="Checkpoint: folder, file or hub id.")],
    data: Annotated[str, typer.Option(help="Folder of images and labels; shapes, or shapes:SEED, needs none.")],
    kind: Annotated[str, typer.Option(help="ade20k, cityscapes, pascal_context, folder, shapes; auto: see DIR.")] = (
        "auto"
    ),
    split: Annotated[str, typer.Option(help="val or train.")] = "val",
    multiscale: Annotated[bool, typer.Option("--multiscale", help="The paper's six scales, mirrored, too.")] = False,
    scales: Annotated[str | None, typer.Option(help="Factors to average over, such as 0.75,1,1.5.")] = None,
    flip: Annotated[bool, typer.Option("--flip", help="Average over the mirrored image, too.")] = False,
    resize: Annotated[int | None, typer.Option(help="Pixels of the smaller side. Default: the recipe's.")] = None,
    window: Annotated[int | None, typer.Option(help="Side of the windows. Default: the model's.")] = None,
    stride: Annotated[int | None, typer.Option(help="Pixels between windows. Default: the model's.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows at once.")] = 2,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.auto,
    out: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Where to write all figures.")] = None,
) -> None:
    """Compare a model's labels with those of a data set: IoU for each class, mIoU, mAcc, aAcc.

    With torchrun (torchrun --nproc-per-node 2 -m segmenter_fast.cli evaluate ...) the images are shared out.
    """
    from ..train.datasets import open_dataset
    from ..train.evaluation import MULTISCALE, check_classes
    from ..train.evaluation import evaluate as scores_of

    with process_group(device.value) as world:
        dataset = open_dataset(data, kind, split)
        segmenter = model_of(model, device, dtype)
        check_classes(segmenter, dataset)
        config = segmenter.config
        window = config.window_size if window is None else window
        settings: dict[str, Any] = {
            "resize": _resize(data, kind, config) if resize is None else resize,
            "window": window,
            "stride": min(config.window_stride, window) if stride is None else stride,
            "scales": factors(scales) if scales else MULTISCALE if multiscale else (1.0,),
            "flip": flip or multiscale,
            "batch_size": batch_size,
        }
        with Progress(console=Console(stderr=True), disable=not world.leads) as progress:
            task = progress.add_task("evaluating", total=None)
            scores = scores_of(
                segmenter,
                dataset,
                rank=world.rank,
                world_size=world.size,
                progress=lambda done, share: progress.update(task, completed=done, total=share),
                **settings,
            )
        if not world.leads:
            return
    names = tuple(dataset.class_names)
    Console().print(_table(scores, names))
    typer.echo(_totals(scores, len(dataset)))
    if out is not None:
        described = {"model": model, "data": data, "split": split, "images": len(dataset), **settings}
        _write_json({**described, "dtype": str(next(segmenter.parameters()).dtype), "classes": names}, scores, out)
        typer.echo(f"written: {out}")


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of training runs.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The PNG file to write.")] = Path("curves.png"),
) -> None:
    """Draw the loss and mIoU curves of training runs."""
    from ..train.curves import draw_curves, read_runs

    curves = read_runs(runs)
    path = draw_curves(curves, out)
    for run in curves:
        loss = f"{len(run.loss)} losses, last {list(run.loss.values())[-1]:.4g}; " if run.loss else ""
        best = max(run.miou, key=lambda step: run.miou[step], default=None)
        reached = f", best mIoU {run.miou[best]:.4f} at step {best}" if best is not None else ""
        typer.echo(f"{run.name}: {loss}{len(run.miou)} evaluations{reached}")
    typer.echo(f"written: {path}")


def _resize(data: str, kind: str, config: SegmenterConfig) -> int:
    """The recipe's where its windows are the model's; else the window, so that it covers the smaller side."""
    from ..train.datasets.layouts import kind_of
    from ..train.presets import PRESETS

    if kind == "auto" and Path(data).is_dir():
        kind = kind_of(Path(data))
    recipe = PRESETS.get(kind)
    return recipe.resize if recipe is not None and recipe.window == config.window_size else config.window_size


def _table(scores: Scores, names: tuple[str, ...]) -> Table:
    table = Table("class", header_style="bold")
    for title in ("IoU", "accuracy"):
        table.add_column(title, justify="right")
    for name, *values in zip(names, scores.iou, scores.accuracy, strict=True):
        table.add_row(name, *("-" if value is None else f"{value:.4f}" for value in values))
    return table


def _totals(scores: Scores, images: int) -> str:
    totals = f"mIoU {scores.miou:.4f}, mAcc {scores.macc:.4f}, aAcc {scores.aacc:.4f}"
    return f"{totals}; {images:,} images, {scores.pixels:,} labelled pixels"


def _write_json(described: dict[str, Any], scores: Scores, path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({**described, **scores.to_dict()}, indent=1, allow_nan=False) + "\n")
