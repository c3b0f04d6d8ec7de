"""``segmenter-fast info``, ``convert``, ``push`` and ``variants``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from ..describe import info_table, variants_table
from .app import app, check_new, load_model, say, short_warnings
from .options import CheckpointArgument, ModelArgument, OverwriteOption


@app.command()
def info(model: ModelArgument) -> None:
    """Print what a checkpoint is, and whether C++ kernels run on this CPU."""
    from ..kernels.cpu import native  # imports PyTorch

    segmenter = load_model(model, "cpu", "float32")
    table = info_table(segmenter.config, model)
    table.add_row("C++ kernels here", native.unavailable() or "run")
    Console().print(table)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="Checkpoint: folder, file or hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    to: Annotated[Literal["ours", "official"], typer.Option(help="The format to write.")] = "ours",
    overwrite: OverwriteOption = False,
) -> None:
    """Convert a checkpoint to our format, or back to the official one."""
    from .. import load
    from ..weights import hub, official

    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; OUT is the folder to write")
    files = {"ours": (hub.CONFIG, hub.WEIGHTS), "official": (official.VARIANT, official.WEIGHTS)}
    written = [out / name for name in files[to]]
    if any(map(Path.exists, written)) and Path(source).resolve() in map(Path.resolve, (out, *written)):
        raise ValueError(f"{out} is the checkpoint that is read; choose another folder as OUT")
    for path in written:
        check_new(path, overwrite)
    with short_warnings():
        model = load(source)
    for other, names in files.items():
        if other != to and (found := [name for name in names if (out / name).exists()]):
            raise ValueError(f"{out} holds another checkpoint ({', '.join(found)}); choose a folder without one")
    if to == "official":
        for difference in official.write_folder(out, model.config, model.state_dict()):
            say(f"warning: {difference}", "yellow")
    else:
        model.save_pretrained(out)
    typer.echo(f"written: {out}")


@app.command()
def push(
    model: CheckpointArgument,
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Repository on the Hugging Face Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    licence: Annotated[str | None, typer.Option("--license", help="Licence of the weights, such as mit.")] = None,
) -> None:
    """Upload a checkpoint in our format, with a model card, to the Hugging Face Hub."""
    from .. import load

    with short_warnings():
        segmenter = load(model)
    if repository.count("/") != 1:
        raise ValueError(f"repository must be org/name, got {repository!r}")
    card = {"license": licence} if licence else {}
    try:
        address = segmenter.push_to_hub(repository, private=private, model_card_kwargs=card)
    except Exception as error:  # network, login and permission raise classes of several libraries
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise OSError(f"{repository} cannot be pushed to the Hugging Face Hub: {reason}") from error
    typer.echo(address)


@app.command()
def variants() -> None:
    """Print the named variants: sizes, costs, published accuracy."""
    Console().print(variants_table())
