"""The application, and what several commands share: options, models, messages.

The modules of the command line import PyTorch, and what needs it, inside of the commands: help answers at once.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from typer.core import TyperGroup

from .. import VARIANTS, __version__
from ..config import LARGEST_SCALE

if TYPE_CHECKING:
    from .. import Segmenter
    from ..inference.batches import Model

Number = TypeVar("Number", int, float)


@contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, KeyboardInterrupt):
            # A library whose import was broken off raises ImportError.
            cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
        if cause is None:
            raise
        say("interrupted", "yellow")
        raise typer.Exit(130) from None


class _Group(TyperGroup):
    """Print errors that users can cause in one line, with exit code 2; an interrupt has exit code 130."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _interruptible():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        try:
            with _interruptible():
                return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")  # the words of typer's validator
            raise
        except BrokenPipeError:
            raise  # the reader of the output is gone; typer exits silently
        except (OSError, ValueError) as error:
            from ..io.walk import reason_of

            say(f"error: {reason_of(error)}", "red")
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Group,
    name="segmenter-fast",
    help="Semantic segmentation with plain Vision Transformers (Segmenter, ICCV 2021).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


COMPILE_FROM = 10_000
"""Images of a job from which on a minute or two of compilation is worth its time."""

_WARNINGS = 10

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


class InferenceOptions:
    """Options of ``Settings``."""

    scales = typer.Option(help="Factors to average over, such as 0.75,1,1.5.")
    flip = typer.Option("--flip", help="Average over the mirrored image, too.")
    window = typer.Option(help="Side of the windows in pixels. Default: the model's.")
    stride = typer.Option(help="Pixels from window to window. Default: the model's.")
    batch_size = typer.Option(help="Windows, or images that one window covers, at once. Default: 2, on a GPU 16.")
    optimize = typer.Option(help="Use the inference form of the model, or the plain one in the same dtype.")


class DataOptions:
    """Options of ``ReadOptions``."""

    palette = typer.Option(metavar="FILE", help="Colours of label images: a line NAME,R,G,B for each class.")
    reduce_zero_label = typer.Option("--reduce-zero-label", help="Label 0 does not count, k is class k - 1.")
    page = typer.Option(min=0, help="Page of image files with several, from 0 on. Default: the first.")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"segmenter-fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


def load_model(name: str, device: Device, dtype: Dtype, merge: str | None = None) -> Segmenter:
    """Load a checkpoint, or make a variant with random weights and warn about them."""
    from .. import create_model, load
    from ..devices import choose_device, choose_dtype

    place = choose_device(device.value)
    kind = choose_dtype(dtype.value, place)
    if name in VARIANTS and not Path(name).exists():
        say(f"WARNING: {name} has RANDOM weights. Its labels mean nothing; give a checkpoint for real ones.", "yellow")
        model = create_model(name, merging=merge).eval()
    else:
        with short_warnings():
            model = load(name, merge=merge)
    return model.to(place, kind)


def load_for_inference(
    name: str, device: Device, dtype: Dtype, optimize: bool, images: int, merge: str | None = None
) -> Model:
    """``load_model``, in the inference form where ``optimize`` is set, compiled where that pays for so many images."""
    if not optimize:
        return load_model(name, device, dtype, merge)
    from ..devices import choose_device, choose_dtype

    kind = choose_dtype(dtype.value, choose_device(device.value))
    model = load_model(name, device, Dtype.float32, merge)
    with short_warnings():
        # Without enlarging, images below the window have more sizes than graphs are kept for.
        graph = model.config.upscale_small_images
        return model.optimize(kind, "auto" if images >= COMPILE_FROM else False, cuda_graph=graph)


def default_batch_size(model: Model) -> int:
    """Images at once where the user names no number."""
    return 2 if next(model.parameters()).device.type == "cpu" else 16


@contextmanager
def short_warnings(show: bool = True) -> Iterator[None]:
    """Print the first warnings of a block in one line each, and count the others; or drop all."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    told = [*dict.fromkeys(str(warning.message) for warning in caught if show)]
    for message in told[:_WARNINGS]:
        say(f"warning: {message}", "yellow")
    if len(told) > _WARNINGS:
        say(f"and {len(told) - _WARNINGS} more warnings", "yellow")


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


def check_new(path: Path, overwrite: bool, same: bool = False) -> None:
    """Refuse, before any work, to write to a path where something is, or where nothing can be written.

    Args:
        same: whether this program wrote that from the same inputs.
    """
    if path.exists() and not overwrite and not same:
        raise FileExistsError(f"{path} exists; choose another path, or replace it by --overwrite")
    folder = next(each for each in path.absolute().parents if each.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise PermissionError(f"{path} cannot be written: {folder} takes no files")


def check_windows(window: int | None, stride: int | None, batch_size: int | None) -> None:
    """Refuse, before a model is loaded, numbers that are out of range for every model."""
    for name, given in (("--window", window), ("--stride", stride), ("--batch-size", batch_size)):
        if given is not None and given < 1:
            raise typer.BadParameter(f"{name} must be at least 1, got {given}")
    if window is not None and stride is not None and stride > window:
        raise typer.BadParameter(
            f"--stride must be at most --window, {window}, or pixels between windows get no label; got {stride}"
        )


@contextmanager
def stages() -> Iterator[Callable[[str], object]]:
    """Yield a function that shows the stage of a long command: a moving line in a terminal, elsewhere a line each."""
    console, start = Console(stderr=True), time.perf_counter()
    if not console.is_terminal:
        yield lambda stage: say(f"{time.perf_counter() - start:5.1f} s: {stage}")
        return
    with console.status("") as status:
        yield lambda stage: status.update(f"{stage} ...")


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """(1, "image") -> "1 image"; (2, "image") -> "2 images"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def say(message: str, color: str | None = None) -> None:
    typer.secho(message, fg=color, err=True)
