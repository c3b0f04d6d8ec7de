"""The command line. Commands parse and print here; what they do stands in modules of their own."""

from __future__ import annotations

import math
import time
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from typer.core import TyperGroup

from . import VARIANTS, Segmenter, __version__, create_model, load
from .convert import CheckpointFormat, push, write
from .describe import info_table, variants_table
from .devices import choose_device, choose_dtype
from .export import export as write_export
from .predict_folder import Job, make_writable, plan, run


class _Group(TyperGroup):
    """Turns the errors that users can cause into one line and exit code 2, an interrupt into exit code 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _say("interrupted", "yellow")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise  # the reader of our output went away; typer ends quietly
        except (OSError, ValueError) as error:
            _say(f"error: {error}", "red")
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


class Format(str, Enum):
    onnx = "onnx"
    pt2 = "pt2"


class Output(str, Enum):
    labels = "labels"
    masks = "masks"
    logits = "logits"


ModelOption = Annotated[
    str,
    typer.Option("--model", "-m", help="Checkpoint: folder, file or hub id; a variant's name gives random weights."),
]
DeviceOption = Annotated[Device, typer.Option(help="auto: the GPU where there is one.")]
DtypeOption = Annotated[Dtype, typer.Option(help="auto: bfloat16 where the hardware is fast in it.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"segmenter-fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command()
def predict(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT", help="Image files and folders of them.")],
    model: ModelOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for labels/*.png and overlays/*.png.")],
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.auto,
    resume: Annotated[bool, typer.Option("--resume", help="Skip images whose outputs are there.")] = False,
    scales: Annotated[str, typer.Option(help="Factors to average over, such as 0.75,1,1.5.")] = "1",
    flip: Annotated[bool, typer.Option("--flip", help="Average over the mirrored image, too.")] = False,
    overlay: Annotated[bool, typer.Option(help="Whether to write overlays.")] = True,
) -> None:
    """Segment images: a PNG of class indices, and an overlay, for each."""
    factors = _factors(scales)
    jobs = plan(inputs, out, overlay)
    make_writable(out, overlay)
    remaining = [job for job in jobs if not (resume and job.finished)]
    start, failures = time.perf_counter(), []
    if remaining:
        segmenter = _model(model, device, dtype)
        start = time.perf_counter()
        failures = _segment(segmenter, remaining, factors, flip)
    seconds, written = time.perf_counter() - start, len(remaining) - len(failures)
    rate = f" in {seconds:.1f} s ({written / seconds:.2f} images/s)" if written else ""
    typer.echo(f"{written} written{rate}, {len(jobs) - len(remaining)} skipped, {len(failures)} failed; see {out}")
    for job, reason in failures:
        _say(f"failed: {job.source}: {reason}", "red")
    if failures:
        raise typer.Exit(1)


@app.command()
def info(model: Annotated[str, typer.Argument(metavar="M", help="Checkpoint, or a variant's name.")]) -> None:
    """Print what a checkpoint is."""
    segmenter = _model(model, Device.cpu, Dtype.float32)
    Console().print(info_table(segmenter, segmenter.config, model))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="Checkpoint: folder, file or hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    to: Annotated[CheckpointFormat, typer.Option(help="The format to write.")] = CheckpointFormat.ours,
) -> None:
    """Convert a checkpoint to our format, or back to the official one."""
    for notice in write(_loaded(source), out, to):
        _say(f"warning: {notice}", "yellow")
    typer.echo(f"written: {out}")


@app.command("push")
def push_model(
    model: Annotated[str, typer.Argument(metavar="M", help="Checkpoint: folder, file or hub id.")],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Where to on the Hugging Face Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    licence: Annotated[str | None, typer.Option("--license", help="Of the weights, such as mit.")] = None,
) -> None:
    """Upload a checkpoint in our format, with a model card, to the Hugging Face Hub."""
    typer.echo(push(_loaded(model), repository, private, licence))


@app.command()
def variants() -> None:
    """Print the named variants: sizes, costs, published accuracy."""
    Console().print(variants_table())


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the overlays.")] = Path("demo"),
    image: Annotated[Path | None, typer.Option(help="A photograph of yours instead of the one shipped.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Variant to run; may be given more than once.")] = None,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Run the reference, a strong peer and the fast model on a photograph: speed, agreement, an overlay."""
    from .benchmarks.demo import PHOTOGRAPH, VARIANTS, run_demo, table

    place = choose_device(device.value)
    comparisons = []
    with Console(stderr=True).status("segmenting ...") as status:
        for row in run_demo(out, place, choose_dtype(dtype.value, place), image or PHOTOGRAPH, variant or VARIANTS):
            comparisons.append(row)
            status.update(f"{row.variant} done; going on ...")
    Console().print(table(comparisons))
    _say("The weights are random, so the labels mean nothing; speed and agreement do.", "yellow")
    for row in comparisons:
        typer.echo(f"overlay: {row.overlay}")


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="M", help="Checkpoint, or a variant's name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write, ending in .onnx or .pt2.")],
    format: Annotated[Format | None, typer.Option(help="The ending of OUT where it has none.")] = None,
    size: Annotated[str | None, typer.Option(help="Of the images: 512 or 384x640 (HxW). Default: the model's.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images at once.")] = 1,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="Any number of images at once.")] = False,
    output: Annotated[Output, typer.Option(help="Per pixel labels, per patch scores, or per pixel scores.")] = (
        Output.labels
    ),
    uint8: Annotated[bool, typer.Option("--uint8", help="Take uint8 RGB and normalise inside.")] = False,
    device: Annotated[Device, typer.Option(help="That a .pt2 package is compiled for.")] = Device.cpu,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and activations; bfloat16 for .pt2 only.")] = Dtype.float32,
) -> None:
    """Write an ONNX file or an AOTInductor package (.pt2), and check that it gives the model's labels."""
    if format and not out.suffix:
        out = out.with_suffix(f".{format.value}")
    if format and out.suffix != f".{format.value}":
        raise typer.BadParameter(f"OUT must end in .{format.value} for --format {format.value}, got {out}")
    segmenter = _model(model, device, Dtype.float32)
    with Console(stderr=True).status(f"exporting to {out} ..."):
        exported = write_export(
            segmenter,
            out,
            size=_size(size) if size else None,
            batch_size=None if dynamic_batch else batch_size,
            output=output.value,
            uint8=uint8,
            dtype=choose_dtype(dtype.value, choose_device(device.value)),
        )
    found = f"{exported.differing:,} differ, all within rounding" if exported.differing else "all as the model's"
    typer.echo(f"wrote {out}, {out.stat().st_size / 1e6:.1f} MB; labels of {exported.pixels:,} pixels: {found}")


def _segment(model: Segmenter, jobs: list[Job], scales: tuple[float, ...], flip: bool) -> list[tuple[Job, Exception]]:
    """Runs the jobs under a progress bar; what failed, and why."""
    failures: list[tuple[Job, Exception]] = []
    done = 0
    try:
        with _progress() as progress:
            for job in progress.track(jobs, description="segmenting"):
                try:
                    run(model, job, scales, flip)
                except (
                    OSError,
                    ValueError,
                    RuntimeError,
                    MemoryError,
                ) as error:  # RuntimeError: PyTorch's out of memory
                    failures.append((job, error))
                done += 1
    except KeyboardInterrupt:
        _say(f"interrupted: {done} of {len(jobs)} images done; --resume goes on from here", "yellow")
        raise typer.Exit(130) from None
    return failures


def _model(name: str, device: Device, dtype: Dtype) -> Segmenter:
    """A checkpoint, or a variant with random weights and a warning that says so."""
    place = choose_device(device.value)
    if name in VARIANTS and not Path(name).exists():
        _say(f"WARNING: {name} has RANDOM weights. Its labels mean nothing; give a checkpoint for real ones.", "yellow")
        model = create_model(name)
    else:
        model = _loaded(name)
    return model.to(place, choose_dtype(dtype.value, place)).eval()


def _loaded(name: str) -> Segmenter:
    """A checkpoint, with the loader's warnings said in one line each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load(name)
    for warning in caught:
        _say(f"warning: {warning.message}", "yellow")
    return model


def _factors(text: str) -> tuple[float, ...]:
    """ "0.75,1,1.5" -> the numbers."""
    try:
        factors = tuple(float(part) for part in text.split(","))
    except ValueError:
        factors = ()
    if not factors or not all(0 < factor < math.inf for factor in factors):
        raise typer.BadParameter(f"--scales must be positive numbers with commas between them, got {text!r}")
    return factors


def _size(text: str) -> tuple[int, int]:
    """ "384x640" -> (384, 640); "512" -> (512, 512)."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise typer.BadParameter(f"--size must be one side, or height x width as in 384x640, got {text!r}")
    return int(sides[0]), int(sides[-1])


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.completed / task.elapsed if task.elapsed else 0:.2f} images/s")


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True))


def _say(message: str, color: str) -> None:
    typer.secho(message, fg=color, err=True)


def main() -> None:
    """Entry point of ``segmenter-fast``."""
    app(prog_name="segmenter-fast")


if __name__ == "__main__":
    main()
