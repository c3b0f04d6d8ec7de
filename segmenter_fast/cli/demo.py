"""``segmenter-fast demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from .app import app, say, stages
from .options import DeviceOption, DtypeOption

if TYPE_CHECKING:
    import torch


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the overlays.")] = Path("demo"),
    image: Annotated[Path | None, typer.Option(help="A photograph of yours instead of the one shipped.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Variant to run; may be given more than once.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Segment scenes that a small trained model never saw, and compare the speed of large ones on a photograph."""
    from ..benchmarks.case import DisagreementError
    from ..benchmarks.models.demo import VARIANTS, run_demo
    from ..benchmarks.models.peers import PHOTOGRAPH
    from ..benchmarks.models.summary import models_table
    from ..devices import choose_device, choose_dtype

    place, names, found = choose_device(device), variant or VARIANTS, []
    kind, photograph = choose_dtype(dtype, place), image or PHOTOGRAPH
    try:
        with stages() as show:
            show("segmenting drawn scenes by the trained model")
            _show(out, place)
            for case, rows, overlay in run_demo(out, place, kind, photograph, names, show=show):
                found.append((case, rows))
                typer.echo(f"overlay: {overlay}")
    except DisagreementError as error:
        say(f"refused: {error}", "red")
        raise typer.Exit(1) from None
    if found:
        Console().print(models_table(found))
    say(f"The weights of {', '.join(names)} are random, so their labels mean nothing; only the speed does.", "yellow")


def _show(out: Path, device: torch.device) -> None:
    """Draw the trained model's labels of held-out scenes, and print its score."""
    from ..io.atomic import write_png
    from ..train.shapes_model import SCENES, compare_scenes, held_out_scenes, load_shapes_model

    model = load_shapes_model().to(device)
    dataset = held_out_scenes(model)
    picture, scores = compare_scenes(model, dataset)
    path = out / "shapes.png"
    write_png(picture, path)
    typer.echo(f"trained model: mIoU {scores.miou:.3f} on {SCENES} scenes of the held-out seed {dataset.seed}: {path}")
