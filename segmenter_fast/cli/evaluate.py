"""``segmenter-fast evaluate``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .. import SegmenterConfig
from . import options
from .app import app, check_new, counted, default_batch_size, load_for_inference, say, short_warnings


@app.command()
def evaluate(
    model: options.CheckpointArgument,
    data: Annotated[str, typer.Option(help="Folder of images and labels; shapes, or shapes:SEED, needs none.")],
    kind: Annotated[str, typer.Option(help="ade20k, cityscapes, pascal_context, folder, shapes; auto: see DIR.")] = (
        "auto"
    ),
    split: Annotated[str, typer.Option(help="val or train.")] = "val",
    palette: options.PaletteOption = None,
    reduce_zero_label: options.ReduceZeroLabelOption = False,
    page: options.PageOption = None,
    class_map: options.ClassMapOption = None,
    multiscale: Annotated[bool, typer.Option("--multiscale", help="The paper's six scales, mirrored, too.")] = False,
    scales: Annotated[str | None, options.SCALES] = None,
    flip: options.FlipOption = False,
    resize: Annotated[int | None, typer.Option(help="Pixels of the smaller side. Default: the recipe's.")] = None,
    window: options.WindowOption = None,
    stride: options.StrideOption = None,
    batch_size: options.BatchSizeOption = None,
    optimize: options.OptimizeOption = True,
    merge: options.MergeOption = None,
    bands: options.BandsOption = None,
    scale: options.ScaleOption = None,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    out: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="File for all figures.")] = None,
    overwrite: options.OverwriteOption = False,
) -> None:
    """Compare a model's labels with those of a data set: IoU for each class, mIoU, mAcc, aAcc.

    With torchrun (torchrun --nproc-per-node 2 -m segmenter_fast.cli evaluate ...) the images are shared out.
    """
    from ..inference.settings import Settings
    from ..io.atomic import write_json
    from ..processes import process_group
    from ..train.datasets import open_dataset
    from ..train.datasets.class_lists import ReadOptions
    from ..train.datasets.matching import match_classes
    from ..train.datasets.pairs import with_channels
    from ..train.evaluation import MULTISCALE, check_classes
    from ..train.evaluation import evaluate as scores_of

    numbers = options.parse_numbers("--bands", bands, int)
    factor_list = options.parse_scales(scales) if scales else MULTISCALE if multiscale else (1.0,)
    options.check_windows(window, stride, batch_size)
    inputs = {"model": model, "data": data, "split": split}
    if out is not None:
        check_new(out, overwrite, _inputs(out) == inputs)
    with process_group(device) as world:
        dataset = open_dataset(data, kind, split, ReadOptions(palette, reduce_zero_label, page))
        segmenter = load_for_inference(model, device, dtype, optimize, len(dataset) // world.size, merge)
        batch_size = default_batch_size(segmenter) if batch_size is None else batch_size
        given = window, stride, factor_list, flip or multiscale, batch_size, numbers, scale
        settings = Settings.of(segmenter.config, *given)
        trained, read = segmenter.config.label_values, getattr(dataset, "label_values", ())
        if trained and trained != read and world.rank == 0:
            held = ", ".join(map(str, read or range(len(dataset.class_names))))
            hint = "" if reduce_zero_label else "; --reduce-zero-label reads 0 as no class"
            say(
                f"the model's classes have the label values {', '.join(map(str, trained))}, the data's {held}{hint}",
                "yellow",
            )
        dataset = match_classes(segmenter.config, with_channels(dataset, settings.channels), class_map or ())
        check_classes(segmenter, dataset)
        resize = _resize(data, kind, segmenter.config) if resize is None else resize
        with (
            short_warnings(show=world.rank == 0),
            Progress(console=Console(stderr=True), disable=world.rank > 0) as progress,
        ):
            task = progress.add_task("evaluating", total=None)

            def show(done: int, share: int) -> None:
                progress.update(task, completed=done, total=share)

            scores = scores_of(segmenter, dataset, resize, settings, world, show)
        if world.rank > 0:
            return
    table = Table("class", header_style="bold")
    for title in ("IoU", "accuracy"):
        table.add_column(title, justify="right")
    for name, *values in zip(dataset.class_names, scores.iou, scores.accuracy, strict=True):
        table.add_row(name, *("-" if value is None else f"{value:.4f}" for value in values))
    Console().print(table)
    if absent := [dataset.class_names[index] for index in sorted(getattr(dataset, "absent", ()))]:
        typer.echo(f"not in the means, as no class of the data is mapped to them: {', '.join(absent)}")
    totals = f"mIoU {scores.miou:.4f}, mAcc {scores.macc:.4f}, aAcc {scores.aacc:.4f}"
    typer.echo(f"{totals}; {counted(len(dataset), 'image')}, {counted(scores.pixels, 'labelled pixel')}")
    if out is not None:
        content = {
            **inputs,
            "images": len(dataset),
            "resize": resize,
            **asdict(settings),
            "dtype": str(next(segmenter.parameters()).dtype),
            "optimized": optimize,
            "merging": segmenter.config.merging and asdict(segmenter.config.merging),
            "classes": list(dataset.class_names),
            **asdict(scores),
        }
        write_json(out, content, indent=1, allow_nan=False)
        typer.echo(f"written: {out}")


def _inputs(path: Path) -> dict[str, object] | None:
    """Return model, data and split of figures that an earlier call wrote; None for another file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: found[name] for name in ("model", "data", "split")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _resize(data: str, kind: str, config: SegmenterConfig) -> int:
    """Return the recipe's size where its windows are the model's, else the window, which then covers the side."""
    from ..train.datasets.layouts import kind_of
    from ..train.presets import PRESETS

    if kind == "auto" and Path(data).is_dir():
        kind = kind_of(Path(data))
    recipe = PRESETS.get(kind)
    return recipe.resize if recipe is not None and recipe.window == config.window_size else config.window_size
