"""``segmenter-fast dataset check`` and ``dataset make``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from . import options
from .app import app, check_new, say, short_warnings

dataset = typer.Typer(help="Images with labels, to train on.", no_args_is_help=True)
app.add_typer(dataset, name="dataset")


@dataset.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the data set.")],
    kind: Annotated[
        str, typer.Option(help="ade20k, cityscapes, pascal_context, folder, or auto: by content.")
    ] = "auto",
    palette: options.PaletteOption = None,
    reduce_zero_label: options.ReduceZeroLabelOption = False,
    page: options.PageOption = None,
    show: Annotated[int, typer.Option(min=1, help="Most problems to print.")] = 100,
    out: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="File for all figures.")] = None,
    overwrite: options.OverwriteOption = False,
    bands: options.BandsOption = None,
    scale: options.ScaleOption = None,
) -> None:
    """Read every file of a data set; report files, classes, values, sizes and problems. Exit code 1: problems."""
    from ..io.atomic import write_json
    from ..io.channels import Channels
    from ..io.walk import reason_of
    from ..train.datasets.class_lists import ReadOptions
    from ..train.datasets.findings import Findings, check_files
    from ..train.datasets.layouts import LAYOUTS, SPLITS, kind_of, open_files

    numbers = options.parse_numbers("--bands", bands, int) or ()
    channels = Channels(len(numbers) or 3, numbers, scale)
    kind = kind_of(folder) if kind == "auto" else kind
    if kind not in LAYOUTS:
        raise ValueError(f"--kind must be auto or one of {', '.join(LAYOUTS)}, got {kind!r}")
    if out is not None:
        check_new(out, overwrite)
    reading, found = ReadOptions(palette, reduce_zero_label, page), dict[str, Findings]()
    problems: list[str] = []
    for split in SPLITS:
        try:
            found[split] = Findings(replace(open_files(folder, kind, split, reading), channels=channels))
        except (OSError, ValueError) as error:
            problems.append(reason_of(error))
    if not found:
        raise ValueError(problems[0])
    for split, findings in found.items():
        files = findings.dataset
        with short_warnings():
            for checked in track(check_files(files), f"checking {split}", len(files), console=Console(stderr=True)):
                findings.add(checked)
    summaries = {split: findings.summary() for split, findings in found.items()}
    console = Console()
    console.print(_table(f"{folder}, {kind}", summaries, console.width))
    problems += [problem for summary in summaries.values() for problem in summary["problems"]]
    for split, summary in summaries.items():
        for warning in summary["warnings"]:
            say(f"warning: {split}: {warning}", "yellow")
    for problem in problems[:show]:
        say(f"problem: {problem}", "red")
    if len(problems) > show:
        say(f"and {len(problems) - show} more; --show prints more of them", "red")
    if out is not None:
        write_json(out, {"kind": kind, "problems": problems, "splits": summaries}, indent=1)
        typer.echo(f"written: {out}")
    if problems:
        raise typer.Exit(1)
    typer.echo("no problems")


def _table(title: str, summaries: dict[str, dict[str, Any]], width: int) -> Table:
    """Return one table of all figures, a column a split, with a bar for the share of each class.

    Args:
        width: of the terminal, which the bars fit.
    """
    table = Table("", *summaries, title=title, header_style="bold")
    names = [*next(iter(summaries.values()))["pixels"], "files of other values"]
    left = width - 4 - min(max(map(len, names)), 24)  # of the names, their borders and margins
    bar = max(min(left // len(summaries) - 3 - len(_bar(0, next(iter(summaries.values())), 0)), 10), 0)

    def add(name: str, figure: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(name, *map(figure, summaries.values()))

    for key in ("images", "labels", "pairs"):
        add(key, lambda summary, key=key: f"{summary[key]:,}")  # type: ignore[misc]
    for reason in dict.fromkeys(reason for summary in summaries.values() for reason in summary["ignored_files"]):
        add(f"not read: {reason}", lambda summary, r=reason: f"{len(summary['ignored_files'].get(r, ())):,}")  # type: ignore[misc]
    add("turned by EXIF", lambda summary: f"{summary['turned_by_exif']:,}")
    add("files of other values", lambda summary: f"{summary['files_with_other_values']:,}")
    add("sizes", lambda summary: ", ".join(f"{size} ({n})" for size, n in [*summary["sizes"].items()][:3]))
    table.add_section()
    for name in names[:-1]:
        add(name, lambda summary, name=name: _bar(summary["pixels"][name], summary, bar))  # type: ignore[misc]
    add("(ignored)", lambda summary: _bar(summary["ignored_pixels"], summary, bar))
    return table


def _bar(count: int, summary: dict[str, Any], length: int) -> str:
    share = count / max(sum(summary["pixels"].values()) + summary["ignored_pixels"], 1)
    return f"{count:>13,} {share:>6.1%} {'█' * round(length * share):{length}}"


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
