"""``segmenter-fast train``, also under ``torchrun -m segmenter_fast.train``, and ``plot``."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..train.presets import CHOICES, PRESETS, field_help
from . import options
from .app import app, check_new, counted, say, short_warnings

if TYPE_CHECKING:
    from .. import Segmenter

STOPPED = 75
"""Exit code of a run that a signal ended: its state is saved, and the same command with --resume auto goes on."""

_MeanOption = Annotated[
    str | None, typer.Option(metavar="M,M,...", help="Mean of each channel, scaled to [0, 1]. Default: the model's.")
]
_StdOption = Annotated[
    str | None, typer.Option(metavar="S,S,...", help="Standard deviation of each channel. Default: the model's.")
]
_Preset: Any = Literal[tuple(PRESETS)]


def _with_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the command's ``**fields`` by one option for each field of ``Recipe``, where typer looks for options."""
    signature = inspect.signature(command, eval_str=True)
    parameters = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    for name, (kind, sentence) in field_help().items():
        option = typer.Option(help=sentence, rich_help_panel="Recipe: the preset's, where not given")
        values: Any = Literal[CHOICES[name]] if name in CHOICES else kind
        annotation = Annotated[values | None, option]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


@app.command()
@_with_recipe
def train(
    data: Annotated[str, typer.Option("--data", "-d", help="Folder of the data set; shapes needs none.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run.")],
    preset: Annotated[_Preset, typer.Option("--preset", "-p", help="Recipe, and kind of data.")],
    kind: Annotated[
        str | None, typer.Option(help="Kind of data, where it is not the preset's; auto: by the folder's content.")
    ] = None,
    variant: Annotated[str, typer.Option(help="See segmenter-fast variants.")] = "seg_t_mask_16",
    pretrained: Annotated[
        str | None, typer.Option(help="timm, a name of timm's, or a checkpoint. Default: random weights.")
    ] = None,
    new_classes: Annotated[
        bool,
        typer.Option("--new-classes", help="Start from random class weights where the checkpoint has other classes."),
    ] = False,
    palette: options.PaletteOption = None,
    reduce_zero_label: options.ReduceZeroLabelOption = False,
    page: options.PageOption = None,
    class_map: options.ClassMapOption = None,
    bands: options.BandsOption = None,
    scale: options.ScaleOption = None,
    mean: _MeanOption = None,
    std: _StdOption = None,
    resume: Annotated[
        Literal["never", "auto"], typer.Option(help="auto: go on from the last checkpoint in OUT, if any.")
    ] = "never",
    overwrite: options.OverwriteOption = False,
    device: options.DeviceOption = "auto",
    timeout: Annotated[float, typer.Option(help="Seconds that processes wait for each other.")] = 600.0,
    **fields: Any,
) -> None:
    """Train a model on a data set. Exit code 75: stopped by a signal, saved; go on with --resume auto."""
    import torch

    from ..inference.settings import channels_of
    from ..processes import World
    from ..train.datasets import open_dataset
    from ..train.datasets.class_lists import ReadOptions
    from ..train.datasets.findings import sample_warnings
    from ..train.datasets.pairs import PairedFiles, with_channels
    from ..train.engine import train as run

    given = {name: value for name, value in fields.items() if value is not None}
    if "epochs" in given:
        given = {"steps": 0, **given}  # a preset that counts steps must not overrule it
    recipe = PRESETS[preset].replace(**given)
    reading = ReadOptions(palette, reduce_zero_label, page)
    dataset, val_dataset = (open_dataset(data, kind or preset, split, reading) for split in ("train", "val"))
    if World.from_environment().rank == 0 and isinstance(dataset, PairedFiles):
        for warning in sample_warnings(dataset):
            say(f"warning: {warning}", "yellow")
    torch.manual_seed(recipe.seed)
    classes: dict[str, Any] = {"class_names": dataset.class_names, "palette": dataset.palette}
    classes |= {"num_classes": len(dataset.class_names), "label_values": getattr(dataset, "label_values", ())}
    numbers = options.parse_numbers("--bands", bands, int)
    pixels: dict[str, Any] = {"bands": numbers, "in_channels": numbers and len(numbers), "pixel_scale": scale}
    pixels |= {"mean": options.parse_numbers("--mean", mean, float), "std": options.parse_numbers("--std", std, float)}
    classes |= {name: value for name, value in pixels.items() if value is not None}
    model = _model(variant, pretrained, new_classes, class_map, **classes, **recipe.model_fields())
    dataset, val_dataset = (with_channels(each, channels_of(model.config)) for each in (dataset, val_dataset))
    run_options: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "device": device}
    result = run(model, dataset, val_dataset, recipe, out, **run_options, timeout=timeout)
    if World.from_environment().rank == 0:
        best, now = result.summary, result.steps - result.started
        if best.best_step >= 0:
            typer.echo(f"best mIoU {best.best_miou:.4f} after step {best.best_step}: {out / 'best'}")
        steps = f"{counted(result.steps, 'step')} done, {now} in this call, {result.skipped} skipped"
        typer.echo(f"{steps}; the last model: {out / 'last'}")
    if not result.finished:
        say("stopped by a signal; the same command with --resume auto goes on", "yellow")
        raise typer.Exit(STOPPED)


def _model(
    variant: str, pretrained: str | None, new_classes: bool, class_map: list[str] | None, **fields: Any
) -> Segmenter:
    """Create a model to train; the classes of a checkpoint keep their weights where they match the data's.

    With a class map the others start from random weights, with ``new_classes`` all do.

    Raises:
        ValueError: classes do not match, and neither of the two options is given.
    """
    from .. import create_model
    from ..train.datasets.matching import match_names
    from ..weights.build import SavedModel, take_classes
    from ..weights.load import read_checkpoint
    from ..weights.reading import CheckpointError

    saved: SavedModel | None = None
    if pretrained and Path(pretrained).exists():
        with contextlib.suppress(CheckpointError):  # weights of an encoder have no classes
            saved = read_checkpoint(Path(pretrained), {})
    saved = saved if saved is not None and saved.has_decoder else None
    if class_map and saved is None:
        given = f"--pretrained {pretrained} has none" if pretrained else "give one as --pretrained"
        raise ValueError(f"--class-map matches the classes of a checkpoint with a decoder: {given}")
    names, places = fields["class_names"], list[int]()
    if saved is not None:
        own, have, wanted = saved.config.class_names, saved.config.num_classes, len(names)
        other = have != wanted or (bool(own) and own != names)
        if new_classes:
            places = [-1] * wanted if other else []
        elif class_map or (own and other):
            try:
                places = match_names(own or tuple(map(str, range(have))), names, class_map or (), not class_map)
            except ValueError as error:
                remedy = "with --class-map classes without a match start from random weights, with --new-classes all"
                raise ValueError(f"{pretrained}: {error}; {remedy}") from None
        elif have != wanted:
            raise ValueError(
                f"{pretrained} has {have} classes, the data {wanted}: --new-classes starts from random class weights"
            )
    with short_warnings():
        if places:
            warnings.filterwarnings("ignore", ".*random now and need training")
        model = create_model(variant, pretrained, **fields)
    if saved is not None and places:
        take_classes(model, create_model(model.config), saved.state, places)
        if random := [name for name, place in zip(names, places, strict=True) if place < 0]:
            kept = f"; the other {len(names) - len(random)} keep their weights" if len(random) < len(names) else ""
            say(f"warning: random now and need training: the weights of {', '.join(random)}{kept}", "yellow")
    return model


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of training runs.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The PNG file to write.")] = Path("curves.png"),
    overwrite: options.OverwriteOption = False,
) -> None:
    """Draw the loss and mIoU curves of training runs."""
    from ..train.curves import draw_curves, drawn_from, read_runs

    curves = read_runs(runs)
    check_new(out, overwrite, drawn_from(out) == [run.name for run in curves])
    draw_curves(curves, out)
    for run in curves:
        loss = (
            f"{counted(len(run.loss), 'loss', 'losses')}, last {list(run.loss.values())[-1]:.4g}; " if run.loss else ""
        )
        best = max(run.miou, key=lambda step: run.miou[step], default=None)
        reached = f", best mIoU {run.miou[best]:.4f} at step {best}" if best is not None else ""
        typer.echo(f"{run.name}: {loss}{counted(len(run.miou), 'evaluation')}{reached}")
    typer.echo(f"written: {out}")
