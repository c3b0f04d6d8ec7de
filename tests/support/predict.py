"""``segmenter-fast predict`` on small photographs, as users run it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile
from PIL import Image
from typer.testing import CliRunner, Result

from segmenter_fast.cli import app
from segmenter_fast.inference.batches import Model
from segmenter_fast.inference.folders import Job
from segmenter_fast.inference.pipeline import run_all
from segmenter_fast.inference.settings import Settings
from segmenter_fast.inference.sliding import Progress

MODEL = str(Path(__file__).parents[1] / "golden" / "official_mask")  # 7 classes, windows of 64
OPTIONS = ("--model", MODEL, "--device", "cpu", "--dtype", "float32")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def predict(*arguments: object) -> Result:
    return call("predict", *OPTIONS, *arguments)


def photo(path: Path, height: int = 64, width: int = 64) -> Path:
    """Write a smooth image, the same for each size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(height * 1000 + width)
    coarse = Image.fromarray(generator.integers(0, 256, (7, 7, 3), dtype=np.uint8)).resize((width, height))
    if path.suffix == ".tif":
        tifffile.imwrite(path, np.asarray(coarse), photometric="rgb", tile=(32, 32))
    else:
        coarse.save(path)
    return path


def labels(folder: Path) -> dict[str, np.ndarray]:
    """Label maps below ``folder/labels`` by their paths there; a killed process may leave hidden parts of others."""
    found = {}
    for path in sorted((folder / "labels").rglob("[!.]*")):
        if path.parent.name.startswith(".saving-"):
            continue
        if path.suffix == ".tif":
            found[str(path.relative_to(folder / "labels"))] = tifffile.imread(path)
        elif path.is_file():
            with Image.open(path) as image:
                assert image.mode == "P"
                found[str(path.relative_to(folder / "labels"))] = np.asarray(image)
    return found


def run(
    model: Model,
    job: Job,
    settings: Settings,
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> str | None:
    """``run_all`` for one image: the reason of a restart, or its error raised."""
    reasons: list[str | None] = []

    def end(job: Job, restarted: str | None, error: Exception | None) -> None:
        if error is not None:
            raise error
        reasons.append(restarted)

    run_all(model, [job], settings, lambda job: progress, end, resume=resume)
    return reasons[0]


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
