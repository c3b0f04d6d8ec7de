"""``segmenter-fast check``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .app import Device, DeviceOption, Dtype, ModelArgument, app, load_model


@app.command()
def check(
    model: ModelArgument,
    photos: Annotated[
        list[Path],
        typer.Argument(metavar="PHOTOS", help="Image files and folders; or a folder with images/ and labels/."),
    ],
    labels: Annotated[
        Path | None, typer.Option(help="Folder of label PNGs named as the images: class indices; 255 does not count.")
    ] = None,
    min_agreement: Annotated[
        float, typer.Option(min=0, max=1, help="Share of float32's labels that the recommended form keeps.")
    ] = 0.99,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE.png", help="Picture of the image whose labels change most."),
    ] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Compare the forms that optimize offers on your own images: speed, memory, and how many labels change.

    The last line makes the fastest form that keeps enough labels, in Python.
    """
    from ..io.atomic import write_png
    from ..train.forms import compare_forms, fastest, find_photos, python_line

    if out is not None and (out.exists() or out.suffix != ".png"):
        raise ValueError(f"--out must be a new .png file, got {out}{', which exists' if out.exists() else ''}")
    segmenter = load_model(model, device, Dtype.float32)
    found = find_photos(photos, labels, segmenter.config.num_classes)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("checking", total=len(found))
        results = compare_forms(segmenter, found, lambda done, total: progress.update(task, completed=done))
    place = next(segmenter.parameters()).device.type
    labelled = any(result.labelled_miou is not None for result in results)
    table = Table(title=f"{model} on {len(found)} images, {place}", header_style="bold")
    headings = ("form", "images/s", "MiB of weights", "labels of float32", "mIoU with float32")
    for heading in (*headings, "mIoU with labels")[: 5 + labelled]:
        table.add_column(heading, justify="left" if heading == "form" else "right")
    for result in results:
        if result.images_per_second is None:
            table.add_row(result.name, *["-"] * (len(table.columns) - 1))
            continue
        rate, size = f"{result.images_per_second:.3g}", f"{result.weight_bytes / 2**20:.1f}"
        row = [rate, size, f"{result.agreement:.2%}", f"{result.miou:.4f}"]
        table.add_row(result.name, *row, *([f"{result.labelled_miou:.4f}"] if labelled else []))
    Console().print(table)
    for result in results:
        if result.remark:
            typer.echo(f"{result.name}: {result.remark}")
    agreement, name, picture, form = min(
        ((*result.worst, result.name) for result in results[1:] if result.worst), key=lambda worst: worst[0]
    )
    typer.echo(f"most changed: {name} in {form}, which keeps {agreement:.2%} of its labels")
    if out is not None:
        write_png(picture, out)
        typer.echo(f"image, labels of float32, labels of {form}: {out}")
    choice = fastest(results, min_agreement)
    typer.echo(f"the fastest form that keeps {min_agreement:.1%} of the labels is {choice.name}:")
    typer.echo(python_line(model, place, choice.name))
