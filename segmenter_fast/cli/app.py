"""The application, and what several commands share: options, models, messages.

The modules of the command line import PyTorch, and what needs it, inside of the commands: help answers at once.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from .. import VARIANTS, __version__
from .options import Device, Dtype

if TYPE_CHECKING:
    from .. import Segmenter
    from ..inference.batches import Model


class Terminated(KeyboardInterrupt):
    """SIGTERM, which a batch system or torchrun sends."""


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
        if isinstance(cause, Terminated):
            raise typer.Exit(143) from None
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


COMPILE_FROM = 10_000
"""Images of a job from which on a minute or two of compilation is worth its time."""

_WARNINGS = 10


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

    place = choose_device(device)
    kind = choose_dtype(dtype, place)
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

    kind = choose_dtype(dtype, choose_device(device))
    model = load_model(name, device, "float32", merge)
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
