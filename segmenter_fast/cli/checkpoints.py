"""``segmenter-fast info``, ``convert``, ``push`` and ``variants``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..describe import info_table, variants_table
from ..weights.convert import CheckpointFormat, push, write
from .app import Device, Dtype, app, loaded, model_of, say


@app.command()
def info(model: Annotated[str, typer.Argument(metavar="M", help="Checkpoint, or a variant's name.")]) -> None:
    """Print what a checkpoint is."""
    segmenter = model_of(model, Device.cpu, Dtype.float32)
    Console().print(info_table(segmenter, segmenter.config, model))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="Checkpoint: folder, file or hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    to: Annotated[CheckpointFormat, typer.Option(help="The format to write.")] = CheckpointFormat.ours,
) -> None:
    """Convert a checkpoint to our format, or back to the official one."""
    for notice in write(loaded(source), out, to):
        say(f"warning: {notice}", "yellow")
    typer.echo(f"written: {out}")


@app.command("push")
def pushmodel_of(
    model: Annotated[str, typer.Argument(metavar="M", help="Checkpoint: folder, file or hub id.")],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Where to on the Hugging Face Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    licence: Annotated[str | None, typer.Option("--license", help="Of the weights, such as mit.")] = None,
) -> None:
    """Upload a checkpoint in our format, with a model card, to the Hugging Face Hub."""
    typer.echo(push(loaded(model), repository, private, licence))


@app.command()
def variants() -> None:
    """Print the named variants: sizes, costs, published accuracy."""
    Console().print(variants_table())
