"""``segmenter-fast evaluate`` and ``plot``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app


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
