"""Options and arguments that several commands have, and the checks of what they are given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer

from ..config import LARGEST_SCALE

Number = TypeVar("Number", int, float)
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
CheckpointArgument = Annotated[str, typer.Argument(metavar="M", help="Checkpoint: folder, file or hub id.")]
ModelArgument = Annotated[str, typer.Argument(metavar="M", help="Checkpoint, or a variant's name.")]
DeviceOption = Annotated[Device, typer.Option(help="auto: the GPU where there is one.")]
DtypeOption = Annotated[Dtype, typer.Option(help="auto: bfloat16 where the hardware is fast in it.")]
ClassMapOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DATA=MODEL",
        help="A class of the data, and its name in the model; more than once. order: match classes by number.",
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there, whoever wrote them.")]
BandsOption = Annotated[
    str | None,
    typer.Option(
        metavar="4,3,2", help="Bands that are the model's channels, counted from 1 as GDAL does. Default: the model's."
    ),
]
ScaleOption = Annotated[
    float | None,
    typer.Option(help="Value of a pixel that stands for 1. Default: the model's, or 255 for 8 bits, 65535 for 16."),
]
MergeOption = Annotated[
    str | None,
    typer.Option(
        "--merge",
        help="Merge tokens that are alike, for speed: fast, faster, none, or fields of TokenMerging in JSON. "
        "Default: the model's.",
    ),
]
SCALES = typer.Option(help="Factors to average over, such as 0.75,1,1.5.")
FlipOption = Annotated[bool, typer.Option("--flip", help="Average over the mirrored image, too.")]
WindowOption = Annotated[int | None, typer.Option(help="Side of the windows in pixels. Default: the model's.")]
StrideOption = Annotated[int | None, typer.Option(help="Pixels from window to window. Default: the model's.")]
BatchSizeOption = Annotated[
    int | None, typer.Option(help="Windows, or images that one window covers, at once. Default: 2, on a GPU 16.")
]
OptimizeOption = Annotated[
    bool, typer.Option(help="Use the inference form of the model, or the plain one in the same dtype.")
]
PaletteOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Colours of label images: a line NAME,R,G,B for each class.")
]
ReduceZeroLabelOption = Annotated[
    bool, typer.Option("--reduce-zero-label", help="Label 0 does not count, k is class k - 1.")
]
PageOption = Annotated[
    int | None, typer.Option(min=0, help="Page of image files with several, from 0 on. Default: the first.")
]


def parse_scales(text: str) -> tuple[float, ...]:
    """ "0.75,1,1.5" -> (0.75, 1.0, 1.5)."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < factor <= LARGEST_SCALE for factor in values):
        allowed = f"numbers above 0, up to {LARGEST_SCALE}, with commas between them"
        raise typer.BadParameter(f"--scales must be {allowed}, got {text!r}")
    return values


def parse_numbers(option: str, text: str | None, kind: Callable[[str], Number]) -> tuple[Number, ...] | None:
    """ "4,3,2" -> (4, 3, 2); None for None."""
    try:
        return None if text is None else tuple(map(kind, text.split(",")))
    except ValueError:
        raise typer.BadParameter(f"{option} must be numbers with commas between them, got {text!r}") from None


def check_windows(window: int | None, stride: int | None, batch_size: int | None) -> None:
    """Refuse, before a model is loaded, numbers that are out of range for every model."""
    for name, given in (("--window", window), ("--stride", stride), ("--batch-size", batch_size)):
        if given is not None and given < 1:
            raise typer.BadParameter(f"{name} must be at least 1, got {given}")
    if window is not None and stride is not None and stride > window:
        raise typer.BadParameter(
            f"--stride must be at most --window, {window}, or pixels between windows get no label; got {stride}"
        )
