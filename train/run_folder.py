"""The folder of a run: what was trained, by which recipe, how well, and the models to load.

run.json       recipe, configuration of the model, classes and number of samples: what must not change on the way
checkpoints/   see ``checkpoints``
last/, best/   the model at the last checkpoint and at the best evaluation, for ``segmenter_fast.load``
scores.json    step and mIoU of the last and of the best evaluation
log.jsonl, tensorboard/, samples/   see ``logs``
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import SegmenterConfig
from ..io.atomic import atomic_files, atomic_path
from ..weights import hub
from ..weights.reading import read_json
from . import checkpoints
from .presets import Recipe

RUN, SCORES, LAST, BEST = "run.json", "scores.json", "last", "best"


@dataclass(frozen=True)
class Standing:
    """Steps and mIoUs of the last and of the best evaluation of a run; -1 before the first."""

    last_step: int = -1
    last_miou: float = -1.0
    best_step: int = -1
    best_miou: float = -1.0

    def after(self, step: int, miou: float) -> Standing:
        """With one more evaluation; of equals the first is the best."""
        best = (step, miou) if miou > self.best_miou else (self.best_step, self.best_miou)
        return Standing(step, miou, *best)


def open_run(run: Path, recipe: Recipe, config: SegmenterConfig, samples: int, resume: bool) -> bool:
    """Makes the folder of a new run, or finds that of one to go on with: one that holds a checkpoint.

    Returns:
        Whether there is a run to go on with.

    Raises:
        FileExistsError: a run stands there and ``resume`` is False.
        ValueError: the run there has another recipe, model or data, saying what differs.
        OSError: the folder cannot be written, or has no room for the checkpoints.
    """
    steps = checkpoints.steps_kept(run)
    if steps and not resume:
        raise FileExistsError(
            f"{run} holds a run, its last checkpoint is of step {steps[-1]}; go on with it by --resume auto, or choose "
            "another --out"
        )
    if steps and (run / RUN).exists():
        _require_same(run, recipe, config, samples)
    try:
        (run / checkpoints.FOLDER).mkdir(parents=True, exist_ok=True)
        for folder in (run, run / checkpoints.FOLDER, run / LAST, run / BEST):
            for left in folder.glob(".saving-*"):  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        description = {
            "package_version": importlib.metadata.version("segmenter-fast"),
            "recipe": recipe.to_dict(),
            "model": config.to_dict(),
            "samples": samples,
        }
        _write_json(run, RUN, description)
    except OSError as error:
        raise OSError(f"the run's folder {run} cannot be written: {error.strerror or error}") from error
    return bool(steps)


def _require_same(run: Path, recipe: Recipe, config: SegmenterConfig, samples: int) -> None:
    before = read_json(run / RUN)
    model, now = before.get("model", {}), json.loads(json.dumps(config.to_dict()))
    different = recipe.differences(before.get("recipe", {}))
    different += [
        f"the model's {name} is {now[name]}, was {model.get(name)}" for name in now if now[name] != model.get(name)
    ]
    if samples != before.get("samples"):
        different.append(f"the data has {samples} samples, had {before.get('samples')}")
    if different:
        raise ValueError(
            f"{run} holds another run: {'; '.join(different)}. Go on with the recipe it has, or choose another --out"
        )


def require_room(run: Path, recipe: Recipe, parameters: int, trained: int) -> None:
    """Looks whether the disk has room for the checkpoints that are still to come.

    Args:
        parameters: how many the model has, and ``trained`` how many of them are trained.

    Raises:
        OSError: it has not, saying how much is free and how much is needed.
    """
    model = 4 * parameters
    moments = 4 * trained * (1 if recipe.optimizer == "sgd" else 2)
    checkpoint = model * (2 if recipe.ema else 1) + moments
    files = recipe.keep + 2 - min(len(checkpoints.steps_kept(run)), recipe.keep + 1)
    needed, free = files * checkpoint + 3 * model, shutil.disk_usage(run).free
    if free < needed:
        raise OSError(
            f"{run} has {free / 1e9:.2f} GB free, and the run needs {needed / 1e9:.2f} GB for its checkpoints of "
            f"{checkpoint / 1e9:.2f} GB: make room, choose another --out, or lower --keep, which is {recipe.keep}"
        )


def read_standing(run: Path, step: int) -> Standing:
    """How the run stood after a step; what the file tells of later steps is forgotten."""
    if not (run / SCORES).exists():
        return Standing()
    standing = Standing(**read_json(run / SCORES))
    if standing.best_step > step:
        return Standing()
    return standing if standing.last_step <= step else Standing().after(standing.best_step, standing.best_miou)


def write_standing(run: Path, standing: Standing) -> None:
    """Raises OSError where it cannot be written."""
    _write_json(run, SCORES, asdict(standing))


def export(run: Path, name: str, config: SegmenterConfig, state: Mapping[str, Tensor]) -> None:
    """Writes the model as ``run/name``, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with atomic_files(run / name) as temporary:
        hub.write_folder(temporary, config, state)


def copy_to_best(run: Path) -> None:
    """Makes the last model the best one, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with atomic_files(run / BEST) as temporary:
        for file in (run / LAST).iterdir():
            shutil.copy(file, temporary)


def _write_json(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    with atomic_path(folder / name) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + os.linesep, encoding="utf-8")
