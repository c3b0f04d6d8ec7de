"""``segmenter-fast check``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from . import options
from .app import app, check_new, load_model, say, short_warnings


@app.command()
def check(
    model: options.ModelArgument,
    photos: Annotated[
        list[Path],
        typer.Argument(metavar="PHOTOS", help="Image files and folders; or a folder with images/ and labels/."),
    ],
    labels: Annotated[
        Path | None, typer.Option(help="Folder of label PNGs named as the images: label values; 255 does not count.")
    ] = None,
    palette: options.PaletteOption = None,
    reduce_zero_label: options.ReduceZeroLabelOption = False,
    page: options.PageOption = None,
    min_agreement: Annotated[
        float, typer.Option(min=0, max=1, help="Share of float32's labels that the recommended form keeps.")
    ] = 0.99,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE.png", help="Picture of the image whose labels change most."),
    ] = None,
    overwrite: options.OverwriteOption = False,
    bands: options.BandsOption = None,
    scale: options.ScaleOption = None,
    device: options.DeviceOption = "auto",
) -> None:
    """Compare the forms that optimize offers on your own images: speed, memory, and how many labels change.

    The last line of the report makes the fastest form that keeps enough labels, in Python.
    """
    from ..inference.settings import channels_of
    from ..io.atomic import write_png
    from ..train.datasets.class_lists import ReadOptions
    from ..train.datasets.findings import warn_of_pages
    from ..train.forms import compare_forms, find_photos, python_line

    if out is not None:
        if out.suffix != ".png":
            raise ValueError(f"--out must be a .png file, a new one or with --overwrite, got {out}")
        check_new(out, overwrite)
    numbers = options.parse_numbers("--bands", bands, int)
    segmenter = load_model(model, device, "float32")
    found = find_photos(photos, labels, segmenter.config, ReadOptions(palette, reduce_zero_label, page))
    found = replace(found, channels=channels_of(segmenter.config, numbers, scale))
    for warning in warn_of_pages(found, found.pairs):
        say(f"warning: {warning}", "yellow")
    with short_warnings(), Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("checking", total=len(found))
        broken: list[Exception] = []
        forms = compare_forms(segmenter, found, lambda done: progress.update(task, completed=done), broken.append)
    for error in broken:
        say(f"left out: {error}", "red")
    place, running = next(segmenter.parameters()).device.type, [form for form in forms if form.runs]
    labelled = bool(forms[0].against_labels.counts.any())
    if labelled and (count := sum(pair.labels.is_file() for pair in found.pairs)) < len(found):
        typer.echo(f"{count} of {len(found)} images have labels")
    headings = ["images/s", "MiB of weights", "labels of float32", "mIoU with float32"]
    headings += ["mIoU with labels"] * labelled
    table = Table(title=f"{model} on {len(found) - len(broken)} images, {place}", header_style="bold")
    table.add_column("form", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    for form in forms:
        row = ["-"] * len(headings)
        if form.runs:
            row = [f"{form.images_per_second:.3g}", f"{form.weight_bytes / 2**20:.1f}"]
            row += [f"{form.scores.aacc:.2%}", f"{form.scores.miou:.4f}"]
            row += [f"{form.against_labels.scores().miou:.4f}"] if labelled else []
        table.add_row(form.name, *row)
    Console().print(table)
    for form in forms:
        if form.remark:
            typer.echo(f"{form.name}: {form.remark}")
    changed = [(*form.worst, form.name) for form in running[1:] if form.worst]
    if changed:
        agreement, name, picture, other = min(changed, key=lambda worst: worst[0])
        typer.echo(f"most changed: {name} in {other}, which keeps {agreement:.2%} of its labels")
    kept = [form for form in running if form.scores.aacc >= min_agreement]
    choice = max(kept, key=lambda form: form.images_per_second)
    typer.echo(f"the fastest form that keeps {min_agreement:.1%} of the labels is {choice.name}:")
    typer.echo(python_line(model, place, choice.name))
    if changed and out is not None:
        write_png(picture, out)
        typer.echo(f"image, labels of float32, labels of {other}: {out}")
    if broken:
        raise typer.Exit(1)
