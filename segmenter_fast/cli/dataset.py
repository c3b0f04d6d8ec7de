"""``segmenter-fast dataset check`` and ``dataset make``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .app import app, say

if TYPE_CHECKING:
    from ..train.datasets.pairs import PairedFiles

dataset = typer.Typer(help="Images with labels, to train on.", no_args_is_help=True)
app.add_typer(dataset, name="dataset")


@dataset.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the data set.")],
    kind: Annotated[
        str, typer.Option(help="ade20k, cityscapes, pascal_context, folder, or auto: by content.")
    ] = "auto",
    show: Annotated[int, typer.Option(min=1, help="Most problems to print.")] = 100,
) -> None:
    """Read every file of a data set, report problems and the pixels of each class. Exit code 1: problems."""
    from ..train.datasets.layouts import LAYOUTS, SPLITS, kind_of, open_files

    kind = kind_of(folder) if kind == "auto" else kind
    if kind not in LAYOUTS:
        raise ValueError(f"--kind must be auto or one of {', '.join(LAYOUTS)}, got {kind!r}")
    splits: dict[str, PairedFiles] = {}
    problems: list[str] = []
    for split in SPLITS:
        try:
            splits[split] = open_files(folder, kind, split)
        except (OSError, ValueError) as error:
            problems.append(str(error))
    if not splits:
        raise ValueError(problems[0])
    table = Table("class", *splits, title=f"pixels of each class, {kind}")
    columns = []
    for split, files in splits.items():
        column, found = _checked(split, files)
        columns.append(column)
        problems += found
    names = (*next(iter(splits.values())).class_names, "(ignored)")
    for name, *counts in zip(names, *columns, strict=True):
        table.add_row(name, *(f"{count:,}" for count in counts))
    Console().print(table)
    typer.echo(", ".join(f"{split}: {len(files)} images" for split, files in splits.items()))
    for problem in problems[:show]:
        say(f"problem: {problem}", "red")
    if len(problems) > show:
        say(f"and {len(problems) - show} more; --show prints more of them", "red")
    if problems:
        raise typer.Exit(1)
    typer.echo("no problems")


def _checked(split: str, files: PairedFiles) -> tuple[list[int], list[str]]:
    """Return the pixels of each class and of none, and the problems of one split; shows a progress bar."""
    import numpy as np

    from ..train.datasets.pairs import check_files

    pixels, ignored = np.zeros(len(files.class_names), np.int64), 0
    problems = [f"labels {path} belong to no image" for path in files.strays]
    checks = track(check_files(files), f"checking {split}", len(files), console=Console(stderr=True))
    for checked in checks:
        pixels += checked.pixels
        ignored += checked.ignored
        problems += checked.problems
    return [*pixels.tolist(), ignored], problems


@dataset.command()
def make(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write; new or empty.")],
    images: Annotated[int, typer.Option(help="Number of images; a fifth of them is for validation.")] = 40,
    size: Annotated[int, typer.Option(help="Their side in pixels.")] = 128,
    seed: Annotated[int, typer.Option(help="Other seeds give other images.")] = 0,
) -> None:
    """Write a small data set of drawn shapes: images, labels and a class list, in the layout of a folder of yours."""
    from ..train.datasets.shapes import make_folder

    with Console(stderr=True).status(f"drawing {images} images ..."):
        counts = make_folder(folder, images, size, seed)
    typer.echo(f"wrote {folder}: {counts['train']} images to train on, {counts['val']} to validate with")
