"""``segmenter-fast demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..devices import choose_device, choose_dtype
from .app import Device, DeviceOption, Dtype, DtypeOption, app, say


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the overlays.")] = Path("demo"),
    image: Annotated[Path | None, typer.Option(help="A photograph of yours instead of the one shipped.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Variant to run; may be given more than once.")] = None,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Run the reference, a strong peer and the fast model on a photograph: speed, agreement, an overlay."""
    from ..benchmarks.demo import PHOTOGRAPH, VARIANTS, run_demo, table

    place = choose_device(device.value)
    comparisons = []
    with Console(stderr=True).status("segmenting ...") as status:
        for row in run_demo(out, place, choose_dtype(dtype.value, place), image or PHOTOGRAPH, variant or VARIANTS):
            comparisons.append(row)
            status.update(f"{row.variant} done; going on ...")
    Console().print(table(comparisons))
    say("The weights are random, so the labels mean nothing; speed and agreement do.", "yellow")
    for row in comparisons:
        typer.echo(f"overlay: {row.overlay}")
