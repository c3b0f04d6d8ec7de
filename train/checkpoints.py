"""Checkpoints of a training run: all that must be known to go on exactly.

``checkpoints/step-0001000.pt`` holds one dict, readable with ``weights_only=True``:

    format_version, step
    model       state dict of the Segmenter, full-size float32 tensors by name, however many processes there were
    optimizer   state by parameter name, and the parameter groups
    schedule    of the learning rate
    scaler      of the loss; empty but in float16
    ema         state dict of the averaged model and the count of its updates; None without

No state of random number generators is in it: those of a step follow from the recipe's seed, the step and the rank, see
``engine``. The position in the data is the step. So a run may go on with another number of processes, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from ..io.atomic import atomic_path
from ..processes import World
from ..segmenter import Segmenter
from ..weights.reading import CheckpointError, read_torch

FORMAT_VERSION = 1
FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{7,})\.pt")
_PARTS = ("model", "optimizer", "schedule", "scaler", "ema")


@dataclass
class Training:
    """What changes from step to step."""

    model: Segmenter
    """Perhaps sharded."""
    optimizer: Optimizer
    schedule: LRScheduler
    scaler: torch.amp.GradScaler
    ema: AveragedModel | None
    step: int = 0
    """Optimizer steps done."""

    @property
    def averaged(self) -> Segmenter:
        """The model to evaluate and to export: the average where there is one."""
        return self.model if self.ema is None else self.ema.module  # type: ignore[return-value]


def gathered(training: Training) -> dict[str, Any]:
    """The content of a checkpoint, in the first process; every process must call it.

    Tensors may be the live ones: write them before the next step.
    """
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    ema = training.ema
    return {
        "format_version": FORMAT_VERSION,
        "step": training.step,
        "model": get_model_state_dict(training.model, options=whole),
        "optimizer": get_optimizer_state_dict(training.model, training.optimizer, options=whole),
        "schedule": training.schedule.state_dict(),
        "scaler": training.scaler.state_dict(),
        "ema": ema
        and {"model": get_model_state_dict(training.averaged, options=whole), "updates": int(ema.n_averaged)},
    }


def restore(training: Training, content: dict[str, Any] | None, world: World) -> None:
    """Puts the content of a checkpoint, which only the first process needs to have, into every process's training.

    The content is used up.

    Raises:
        CheckpointError: it holds another model, or an average where the recipe wants none, or the other way round.
    """
    plain = world.broadcast(content and {key: content[key] for key in ("step", "schedule", "scaler")})
    has_ema = world.broadcast(content is not None and content["ema"] is not None)
    assert plain is not None
    if has_ema != (training.ema is not None):
        raise CheckpointError(
            f"the checkpoint of step {plain['step']} has {'an' if has_ema else 'no'} average of weights"
        )
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=world.size > 1)
    held = content or {"model": {}, "optimizer": {}, "ema": {"model": {}, "updates": 0}}
    try:
        set_model_state_dict(training.model, held["model"], options=options)
        set_optimizer_state_dict(training.model, training.optimizer, held["optimizer"], options=options)
        if training.ema is not None:
            set_model_state_dict(training.averaged, held["ema"]["model"], options=options)
            training.ema.n_averaged.fill_(world.broadcast(held["ema"]["updates"]))
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"the checkpoint of step {plain['step']} does not fit the model: {error}") from error
    training.schedule.load_state_dict(plain["schedule"])
    training.scaler.load_state_dict(plain["scaler"])
    training.step = plain["step"]


def path_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step stands in a run's folder."""
    return run / FOLDER / f"step-{step:07}.pt"


def steps_kept(run: Path) -> list[int]:
    """The steps whose checkpoints a run's folder holds, rising."""
    folder = run / FOLDER
    found = [_NAME.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for match in found if match)


def save(run: Path, content: dict[str, Any]) -> Path:
    """Write a checkpoint, complete or not at all.

    Raises:
        OSError: it cannot be written; the earlier ones stay as they are.
    """
    path = path_of(run, content["step"])
    try:
        with atomic_path(path) as temporary:
            torch.save(content, temporary)
    except (OSError, RuntimeError) as error:  # RuntimeError: how torch.save reports a full disk
        kept = steps_kept(run)
        remain = f"the checkpoint of step {kept[-1]} is whole" if kept else "there is no earlier one"
        reason = str(error).splitlines()[0]
        raise OSError(
            f"{path} cannot be written ({reason}); is the disk full? {remain}; make room and go on with --resume auto"
        ) from error
    return path


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint.

    Raises:
        CheckpointError: damaged, of a newer version, or no checkpoint of a training run.
    """
    content = read_torch(path)
    if not isinstance(content, dict) or not {"format_version", "step", *_PARTS} <= set(content):
        raise CheckpointError(f"{path} is no checkpoint of a training run")
    if content["format_version"] > FORMAT_VERSION:
        raise CheckpointError(f"{path} has format {content['format_version']}; this program reads {FORMAT_VERSION}")
    return content


def read_latest(run: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The last checkpoint that can be read, None where there is none, and why later ones cannot.

    Raises:
        CheckpointError: there are checkpoints, but none can be read.
    """
    problems: list[str] = []
    for step in reversed(steps_kept(run)):
        try:
            return read(path_of(run, step)), problems
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(f"no checkpoint in {run / FOLDER} can be read: {'; '.join(problems)}")
    return None, []


def prune(run: Path, keep: int, best_step: int | None) -> None:
    """Removes all checkpoints but the last ``keep`` and the best."""
    for step in steps_kept(run)[:-keep]:
        if step != best_step:
            path_of(run, step).unlink(missing_ok=True)
