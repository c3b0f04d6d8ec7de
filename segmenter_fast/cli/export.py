"""``segmenter-fast export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from .app import app, check_new, load_model
from .options import Device, Dtype, MergeOption, ModelArgument, OverwriteOption


@app.command()
def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write, ending in .onnx or .pt2.")],
    format: Annotated[Literal["onnx", "pt2"] | None, typer.Option(help="Ending to add to OUT if it has none.")] = None,
    size: Annotated[
        str | None, typer.Option(help="Size of the images: 512 or 384x640 (HxW). Default: the model's.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at once.")] = 1,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="Any number of images at once.")] = False,
    output: Annotated[
        Literal["labels", "masks", "logits"],
        typer.Option(help="Per pixel labels, per patch scores, or per pixel scores."),
    ] = "labels",
    uint8: Annotated[bool, typer.Option("--uint8", help="Take uint8 RGB and normalise inside.")] = False,
    device: Annotated[Device, typer.Option(help="Device to compile a .pt2 package for.")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="Dtype of weights and activations; bfloat16 for .pt2 only.")] = "float32",
    merge: MergeOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write an ONNX file or an AOTInductor package (.pt2), and check that it gives the model's labels."""
    from ..devices import choose_device, choose_dtype
    from ..export import export as write_export

    if format and not out.suffix:
        out = out.with_suffix(f".{format}")
    if format and out.suffix != f".{format}":
        raise typer.BadParameter(f"OUT must end in .{format} for --format {format}, got {out}")
    check_new(out, overwrite)
    segmenter = load_model(model, device, "float32", merge)
    with Console(stderr=True).status(f"exporting to {out} ..."):
        exported = write_export(
            segmenter,
            out,
            size=_size(size) if size else None,
            batch_size=None if dynamic_batch else batch_size,
            output=output,
            uint8=uint8,
            dtype=choose_dtype(dtype, choose_device(device)),
        )
    check = f"{exported.differing:,} differ, all within rounding" if exported.differing else "all as the model's"
    typer.echo(f"wrote {out}, {out.stat().st_size / 1e6:.1f} MB; labels of {exported.pixels:,} pixels: {check}")


def _size(text: str) -> tuple[int, int]:
    """ "384x640" -> (384, 640); "512" -> (512, 512)."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise typer.BadParameter(f"--size must be one side, or height x width as in 384x640, got {text!r}")
    return int(sides[0]), int(sides[-1])
