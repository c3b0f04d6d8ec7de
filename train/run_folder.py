"""The folder of a run: recipe, checkpoints, models to load, scores. Every file is whole or not there.

run.json       recipe, configuration of the model, number of samples, class weights: all that must not change in a run
checkpoints/   step-0001000.pt and so on
last/, best/   the model at the last checkpoint and at the best evaluation, for ``segmenter_fast.load``
scores.json    step and mIoU of the last and of the best evaluation
log.jsonl, tensorboard/, samples/   see ``logs``
.written       names of all these files, see ``ownership``

A checkpoint is one dict, readable with ``weights_only=True``:

    format_version, step
    model       state dict of the Segmenter, full-size float32 tensors by name, however many processes there were
    optimizer   state by parameter name, and the parameter groups
    schedule    of the learning rate
    scaler      of the loss; empty but in float16
    ema         state dict of the averaged model and the count of its updates; None without

It holds no state of random number generators, because those of a step follow from the recipe's seed, the step and the
rank, see ``stepping``. The position in the data is the step. So a run may go on with another number of processes.
"""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..config import SegmenterConfig
from ..io.atomic import SAVING, atomic_files, atomic_path, write_json
from ..io.pillow_images import check_regular
from ..segmenter import Segmenter
from ..version import __version__
from ..weights.hub import CONFIG, WEIGHTS, write_folder
from ..weights.reading import CheckpointError, read_mapping, read_torch
from .logs import LOG, SAMPLES, TENSORBOARD, read_log
from .ownership import record, recorded, remove
from .presets import Recipe
from .same_run import check_fits, check_same
from .stepping import FORMAT_VERSION

RUN, SCORES, LAST, BEST, CHECKPOINTS = "run.json", "scores.json", "last", "best", "checkpoints"
_OWN = (RUN, SCORES, LAST, BEST, CHECKPOINTS, LOG, TENSORBOARD, SAMPLES)
_NAME = re.compile(r"step-(\d{7,})\.pt")
_KINDS: dict[str, type | tuple[type, ...]] = {
    **{"format_version": int, "step": int, "model": dict, "optimizer": dict, "schedule": dict, "scaler": dict},
    "ema": (dict, type(None)),
}


@dataclass(frozen=True)
class EvaluationSummary:
    """Steps and mIoUs of the last and of the best evaluation of a run; -1 before the first."""

    last_step: int = -1
    last_miou: float = -1.0
    best_step: int = -1
    best_miou: float = -1.0

    def after(self, step: int, miou: float) -> EvaluationSummary:
        """Return the summary with one more evaluation; the first of equal ones is the best."""
        best = (step, miou) if miou > self.best_miou else (self.best_step, self.best_miou)
        return EvaluationSummary(step, miou, *best)


def open_run(
    run: Path,
    recipe: Recipe,
    model: Segmenter,
    samples: int,
    resume: bool,
    data: str | None = None,
    overwrite: bool = False,
    class_weights: list[float] | None = None,
) -> tuple[dict[str, Any] | None, list[tuple[str, str]]]:
    """Make the folder of a new run, or open that of one to go on with.

    Args:
        data: of ``same_run.fingerprint``.
        overwrite: delete what a run is recorded to have written there. A run that took no step yet needs none.
        class_weights: kept in ``run.json``.

    Returns:
        The last readable checkpoint, None for a new run; events for the log, kind and message.

    Raises:
        FileExistsError: the folder holds a run and neither ``resume`` nor ``overwrite`` is set, or it has no checkpoint
            to go on from; or there are files to overwrite that no run wrote.
        ValueError: the run there has another recipe, model or data, or no checkpoint of it can be read.
        OSError: the folder cannot be written, or has too little room.
    """
    if overwrite or (not resume and _is_empty(run)):
        remove(run, _OWN)
    steps, config, events = checkpoint_steps(run), model.config, list[tuple[str, str]]()
    there = [name for name in _OWN if name != CHECKPOINTS and os.path.lexists(run / name)]
    if steps and not resume:
        raise FileExistsError(
            f"{run} holds a run, its last checkpoint is of step {steps[-1]}; go on with it by --resume auto, choose "
            "another --out, or replace it by --overwrite"
        )
    if not steps and (set(there) & {BEST, LAST, SCORES} if resume else there):
        raise FileExistsError(
            f"{run} holds {', '.join(there)} of a run, but no checkpoint to go on from; choose another --out, or "
            "replace it by --overwrite"
        )
    if steps and (run / RUN).exists():
        events += check_same(run / RUN, recipe, config, samples, data, steps[-1])
    content, unread = read_latest(run)
    if content is not None:
        check_fits(content, model)
    try:
        for folder in (run / CHECKPOINTS, run, run / LAST, run / BEST):
            for left in folder.glob(f"{SAVING}*"):  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        (run / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        for path, reason in unread:
            aside = path.with_name(f"{path.name}.unreadable")
            record(run, f"{CHECKPOINTS}/{aside.name}")
            os.replace(path, aside)
            events.append(("warning", f"an earlier checkpoint is used, as {reason}; it is now {aside.name}"))
        parts = {"recipe": asdict(recipe), "model": config.to_dict(), "samples": samples, "data": data}
        description = {"package_version": __version__, **parts, "class_weights": class_weights or []}
        record(run, RUN)
        write_json(run / RUN, description, indent=2)
    except OSError as error:
        raise OSError(f"the run's folder {run} cannot be written: {error.strerror or error}") from error
    if content is not None:  # the process may have been killed between checkpoint and model
        export_last(run, config, content)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    require_room(run, recipe, sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains))
    return content, events


def _is_empty(run: Path) -> bool:
    """Return whether nothing of a run is here, or, by its record, no step of it that was logged or saved."""
    names = {name.partition("/")[0] for name in recorded(run)}
    begun = bool(names) and names <= {RUN, LOG, TENSORBOARD} and all(line["kind"] != "step" for line in read_log(run))
    return begun or not any(os.path.lexists(run / name) for name in _OWN)


def require_room(run: Path, recipe: Recipe, parameters: int, trained: int) -> None:
    """Require room on the disk for the checkpoints to come, of ``parameters`` of which some are ``trained``.

    Raises:
        OSError: there is too little room; gives what is free and what is needed.
    """
    model = 4 * parameters
    moments = 4 * trained * (1 if recipe.optimizer == "sgd" else 2)
    checkpoint = model * (2 if recipe.ema else 1) + moments
    files = recipe.keep + 2 - min(len(checkpoint_steps(run)), recipe.keep + 1)
    needed, free = files * checkpoint + 3 * model, shutil.disk_usage(run).free
    if free < needed:
        raise OSError(
            f"{run} has {free / 1e9:.2f} GB free, and the run needs {needed / 1e9:.2f} GB for its checkpoints of "
            f"{checkpoint / 1e9:.2f} GB: make room, choose another --out, or lower --keep, which is {recipe.keep}"
        )


def checkpoint_path(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / f"step-{step:07}.pt"


def checkpoint_steps(run: Path) -> list[int]:
    """Return the steps of which a run's folder holds checkpoints, rising."""
    folder = run / CHECKPOINTS
    found = [_NAME.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for match in found if match)


def save_checkpoint(run: Path, content: dict[str, Any]) -> Path:
    """Write a checkpoint, see ``Stepper.state_dict``.

    Raises:
        OSError: it cannot be written; the earlier ones stay as they are.
    """
    path = checkpoint_path(run, content["step"])
    try:
        record(run, f"{CHECKPOINTS}/{path.name}")
        with atomic_path(path) as temporary:
            torch.save(content, temporary)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save on a full disk
        kept = checkpoint_steps(run)
        remain = f"the checkpoint of step {kept[-1]} is whole" if kept else "there is no earlier one"
        reason = str(error).splitlines()[0]
        raise OSError(
            f"{path} cannot be written ({reason}); is the disk full? {remain}; make room and go on with --resume auto"
        ) from error
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read the content of a checkpoint.

    Raises:
        CheckpointError: damaged, of a newer version, or no checkpoint of a training run.
    """
    try:
        check_regular(path, "checkpoint")
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # torch.load would take changed weights for the right ones
                raise CheckpointError(f"{path} is damaged: {damaged} has another checksum")
        content = read_torch(path)
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    except OSError as error:  # a folder, a pipe, a link to nothing, no permission
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(content, dict) or not set(content) >= set(_KINDS):
        raise CheckpointError(f"{path} is no checkpoint of a training run")
    for key, kind in _KINDS.items():
        tensors = content[key].values() if key == "model" and isinstance(content[key], dict) else ()
        if not isinstance(content[key], kind) or not all(isinstance(value, torch.Tensor) for value in tensors):
            raise CheckpointError(f"{path} is no checkpoint of a training run: its {key} is damaged")
    if content["format_version"] > FORMAT_VERSION:
        raise CheckpointError(f"{path} has format {content['format_version']}; this program reads {FORMAT_VERSION}")
    return content


def read_latest(run: Path) -> tuple[dict[str, Any] | None, list[tuple[Path, str]]]:
    """Read the last readable checkpoint, None where there is none; also return later ones, and why they are not read.

    Raises:
        CheckpointError: there are checkpoints, but none can be read.
    """
    problems: list[tuple[Path, str]] = []
    for step in reversed(checkpoint_steps(run)):
        path = checkpoint_path(run, step)
        try:
            return read_checkpoint(path), problems
        except CheckpointError as error:
            problems.append((path, str(error)))
    if problems:
        reasons = "; ".join(reason for _, reason in problems)
        raise CheckpointError(
            f"no checkpoint in {run / CHECKPOINTS} can be read: {reasons}. To train anew, choose another --out "
            f"(--pretrained {run / LAST} starts from its last model), or delete the run by --overwrite"
        )
    return None, []


def save(run: Path, config: SegmenterConfig, content: dict[str, Any], keep: int, best_step: int) -> None:
    """Write a checkpoint, then its model, then delete older ones, so that a crash always leaves a whole one."""
    save_checkpoint(run, content)
    export_last(run, config, content)
    prune(run, keep, best_step)


def prune(run: Path, keep: int, best_step: int) -> None:
    """Delete all checkpoints but the last ``keep`` and the best."""
    for step in checkpoint_steps(run)[:-keep]:
        if step != best_step:
            checkpoint_path(run, step).unlink(missing_ok=True)


def export_last(run: Path, config: SegmenterConfig, content: dict[str, Any]) -> None:
    """Write the model of a checkpoint, the averaged one where there is one, as ``last``."""
    state = content["model"] if content["ema"] is None else content["ema"]["model"]
    record(run, f"{LAST}/{CONFIG}", f"{LAST}/{WEIGHTS}")
    with atomic_files(run / LAST) as temporary:
        write_folder(temporary, config, state)


def save_scores(run: Path, summary: EvaluationSummary, keep: int) -> None:
    """Write ``scores.json``, after a copy of ``last`` to ``best`` if it is the best; delete older checkpoints."""
    record(run, SCORES, f"{BEST}/{CONFIG}", f"{BEST}/{WEIGHTS}")
    if summary.best_step == summary.last_step:
        with atomic_files(run / BEST) as temporary:
            for name in (CONFIG, WEIGHTS):
                shutil.copy(run / LAST / name, temporary)
    write_json(run / SCORES, asdict(summary), indent=2)
    prune(run, keep, summary.best_step)


def read_scores(run: Path, step: int) -> EvaluationSummary:
    """Read the summary as of a step; evaluations of later steps are left out.

    Raises:
        CheckpointError: the file holds something else.
    """
    path = run / SCORES
    if not path.exists():
        return EvaluationSummary()
    found = read_mapping(path)
    kinds = {field.name: (int, float) if "miou" in field.name else (int,) for field in fields(EvaluationSummary)}
    if set(found) != set(kinds) or not all(type(found[name]) in kind for name, kind in kinds.items()):
        raise CheckpointError(f"{path} must hold the numbers {', '.join(kinds)}; remove it to evaluate again")
    summary = EvaluationSummary(**found)
    if summary.best_step > step:
        return EvaluationSummary()
    best = summary.best_step, summary.best_miou
    return summary if summary.last_step <= step else EvaluationSummary(*best, *best)
