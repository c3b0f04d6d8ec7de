"""Training: a plain loop around ``Segmenter.loss``, in one process or many, that never loses a run.

Everything random follows from the recipe's seed: samples from (seed, epoch, index), see ``samples``; stochastic depth
and dropout from (seed, step, rank). What a run was at a step is therefore its weights, its optimizer and that number,
and an interrupted and resumed run is the uninterrupted one: on a CPU bit for bit, with as many threads.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..devices import choose_dtype
from ..processes import StopRequest, World, process_group
from ..segmenter import Segmenter
from . import checkpoints, run_folder
from .batches import Batches
from .datasets.base import SegmentationDataset
from .evaluation import Inference, evaluate, sample_pictures
from .logs import RunLog
from .metrics import Scores
from .optimization import recomputed, to_training
from .pace import Pace
from .preparing import prepare, whole_model
from .presets import Recipe
from .run_folder import Standing
from .stepping import Outcome, Stepper


class DivergedError(ValueError):
    """The loss was not finite in too many steps in a row."""


@dataclass(frozen=True)
class TrainResult:
    """What a call of ``train`` came to."""

    steps: int
    """Optimizer steps done, those of earlier calls included."""
    finished: bool
    """False where a signal ended it early; a checkpoint holds all that was done."""
    skipped: int
    """Steps of this call whose loss or gradient was not finite."""
    standing: Standing
    scores: Scores | None
    """Of the last evaluation of this call."""


def train(
    model: Segmenter,
    dataset: SegmentationDataset,
    val_dataset: SegmentationDataset | None,
    recipe: Recipe,
    out: str | Path,
    *,
    resume: Literal["never", "auto"] = "never",
    device: str = "auto",
    timeout: float = 600.0,
) -> TrainResult:
    """Trains a model in place.

    Args:
        model: on the CPU, any weights, with as many classes as the data. ``recipe.model_fields()`` are meant for its
            configuration.
        dataset: to train on.
        val_dataset: to evaluate on; without one nothing is evaluated.
        recipe: how.
        out: the run's folder, see ``run_folder``.
        resume: "auto" goes on from the last checkpoint in ``out``, and begins where there is none.
        device: "auto", "cpu" or "cuda".
        timeout: seconds that a process waits for the others, see ``processes.process_group``.

    Raises:
        ValueError: model, data and recipe that do not fit each other, or another run than the one in ``out``.
        FileExistsError: ``out`` holds a run, and ``resume`` is "never".
        DivergedError: (a ValueError) the loss stayed not finite.
        SampleError: (an OSError) a sample cannot be read, and the recipe does not skip it.
        ConnectionError: (an OSError) the other processes cannot be reached or were lost.
        OSError: the folder cannot be written; earlier checkpoints stay whole.
    """
    _require_classes(model, dataset, "the training data")
    if val_dataset is not None:
        _require_classes(model, val_dataset, "the validation data")
    with process_group(device, timeout) as world, StopRequest() as request:
        return _Run(model, dataset, val_dataset, recipe, Path(out), world, request).go(resume == "auto")


def _require_classes(model: Segmenter, dataset: SegmentationDataset, name: str) -> None:
    if len(dataset) == 0:
        raise ValueError(f"{name} has no samples")
    have, wanted = model.config.num_classes, len(dataset.class_names)
    if have != wanted:
        raise ValueError(f"the model has {have} classes, {name} {wanted}: make the model with num_classes={wanted}")


class _InterruptedError(Exception):
    """A signal came at a moment when everything is already on the disk."""


class _Run:
    """The state of one call of ``train``. What is called here runs in every process, unless it says otherwise."""

    def __init__(
        self,
        model: Segmenter,
        dataset: SegmentationDataset,
        val_dataset: SegmentationDataset | None,
        recipe: Recipe,
        out: Path,
        world: World,
        request: StopRequest,
    ) -> None:
        self.dataset, self.val_dataset, self.recipe = dataset, val_dataset, recipe
        self.out, self.world, self.request = out, world, request
        self.total_steps = recipe.total_steps(len(dataset))
        self.epoch_steps = recipe.epoch_steps(len(dataset))
        self.batches = Batches(dataset, recipe, model.config, world)
        self.standing = Standing()
        self.scores: Scores | None = None
        self.skipped = self.bad_in_a_row = 0
        self.dtype = choose_dtype(recipe.precision, world.device)
        self.module, self.training = prepare(model, dataset.ignore_index, recipe, self.total_steps, self.dtype, world)

    def go(self, resume: bool) -> TrainResult:
        """From the start, or from the last checkpoint, to the end, or to a signal."""
        problems = self._begin(resume)
        training, step = self.training, self.training.step
        with (
            RunLog(self.out if self.world.leads else None, self.total_steps, step) as self.log,
            recomputed(training.model, self.recipe.activation_checkpointing),
        ):
            if step:
                self.log.event("resumed", f"from the checkpoint of step {step}")
            for problem in problems:
                self.log.event("warning", f"an earlier checkpoint is used, as {problem}")
            try:
                finished = self._loop()
            except _InterruptedError:
                finished = False
            if not finished:
                self.log.event("stopped", f"by a signal after step {training.step}; all of it is saved")
        return TrainResult(training.step, finished, self.skipped, self.standing, self.scores)

    def _begin(self, resume: bool) -> list[str]:
        """Opens the run's folder and restores what is there; why later checkpoints cannot be read, if any cannot."""
        content: dict[str, Any] | None = None
        problems: list[str] = []
        model = self.training.model

        def opened() -> None:
            nonlocal content, problems
            sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
            known = run_folder.open_run(self.out, self.recipe, model.config, len(self.dataset), resume)
            if known:
                content, problems = checkpoints.read_latest(self.out)
            if content is not None:
                self._export(content)  # the process may have been killed before it did
            trained = sum(size for size, trains in sizes if trains)
            run_folder.require_room(self.out, self.recipe, sum(size for size, _ in sizes), trained)

        self.world.in_first(opened)
        if self.world.broadcast(content is not None):
            checkpoints.restore(self.training, content, self.world)
            self.standing = self.world.broadcast(run_folder.read_standing(self.out, self.training.step))
        return problems

    def _loop(self) -> bool:
        """All steps that are left; False where a signal ended them."""
        training, recipe = self.training, self.recipe
        if training.step and self._evaluates_at(training.step) and self.standing.last_step != training.step:
            self._evaluate()
        to_training(training.model, recipe)
        stepper = Stepper(self.module, training, recipe, self.world, self.dtype)
        pace = Pace()
        for data in self.batches.between(training.step, self.total_steps):
            for message in data.broken:
                self.log.event("broken", f"{message}; another sample takes its place")
            outcome = stepper.step(data.parts, self.dataset.ignore_index, self._asked)
            pace.add(outcome)
            self._judge(outcome)
            step = training.step
            if step % recipe.log_every == 0 or step == self.total_steps:
                self._report(pace, outcome.lr)
            if outcome.stop and step < self.total_steps:
                self._save()
                return False
            if self._saves_at(step):
                pause = time.perf_counter()
                self._save()
                if self._evaluates_at(step):
                    self._evaluate()
                    to_training(training.model, recipe)
                pace.skip(time.perf_counter() - pause)
        return True

    def _asked(self) -> bool:
        return self.request.signal is not None

    def _judge(self, outcome: Outcome) -> None:
        """Counts a step that changed nothing, and ends the run where they do not cease."""
        if outcome.updated:
            self.bad_in_a_row = 0
            return
        step = self.training.step
        if outcome.overflow:
            self.log.event(
                "overflow", f"step {step} skipped: the gradient passed float16's range; a smaller scale is tried"
            )
            return
        self.skipped += 1
        self.bad_in_a_row += 1
        what = f"loss {outcome.loss}, gradient norm {outcome.norm}, learning rate {outcome.lr:.3g}"
        images = ", ".join(self.batches.names(step - 1))
        self.log.event("skipped", f"step {step}: {what}; its images: {images}")
        if self.bad_in_a_row == self.recipe.max_bad_steps:
            raise DivergedError(
                f"loss or gradient were not finite in {self.bad_in_a_row} steps in a row, up to step {step} ({what}), "
                f"whose images are {images}. Checkpoints in {self.out} stay as they are; a lower --lr, --clip, or "
                "--precision float32 may help"
            )

    def _report(self, pace: Pace, lr: float) -> None:
        step, seconds = self.training.step, pace.seconds_per_step()
        cuda = self.world.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(self.world.device) if cuda else None
        self.log.step(
            step, pace.mean_loss(), lr, self.recipe.batch_size / seconds, memory, (self.total_steps - step) * seconds
        )

    def _evaluates_at(self, step: int) -> bool:
        every = self.recipe.evaluate_every or self.epoch_steps
        return self.val_dataset is not None and (step == self.total_steps or step % every == 0)

    def _saves_at(self, step: int) -> bool:
        every = self.recipe.save_every or self.epoch_steps
        return step == self.total_steps or step % every == 0 or self._evaluates_at(step)

    def _save(self) -> None:
        """A checkpoint, then the model of it, then older ones go: whenever it ends, something whole is there."""
        content = checkpoints.gathered(self.training)

        def write() -> None:
            checkpoints.save(self.out, content)
            self._export(content)
            checkpoints.prune(self.out, self.recipe.keep, self.standing.best_step)

        self.world.in_first(write)

    def _export(self, content: dict[str, Any]) -> None:
        """In the first process."""
        state = content["model"] if content["ema"] is None else content["ema"]["model"]
        run_folder.export(self.out, run_folder.LAST, self.training.model.config, state)

    def _evaluate(self) -> None:
        """Scores of the step whose checkpoint was just written; the best model is a copy of the last then."""
        assert self.val_dataset is not None
        recipe, step = self.recipe, self.training.step
        model = whole_model(self.training, self.world)
        where = Inference(recipe.resize, recipe.window, recipe.stride)
        with torch.autocast(self.world.device.type, self.dtype, enabled=self.dtype != torch.float32):
            scores = evaluate(
                model,
                self.val_dataset,
                recipe.resize,
                recipe.window,
                recipe.stride,
                rank=self.world.rank,
                world_size=self.world.size,
                progress=self._stop_if_asked,
            )
            self.log.evaluation(step, scores)
            if self.world.leads and recipe.pictures:
                shown = range(0, len(self.val_dataset), max(len(self.val_dataset) // recipe.pictures, 1))
                self.log.samples(step, sample_pictures(model, self.val_dataset, shown[: recipe.pictures], where))
        self.scores, self.standing = scores, self.standing.after(step, scores.miou)

        def write() -> None:
            if self.standing.best_step == step:
                run_folder.copy_to_best(self.out)
            run_folder.write_standing(self.out, self.standing)
            checkpoints.prune(self.out, self.recipe.keep, self.standing.best_step)

        self.world.in_first(write)

    def _stop_if_asked(self, done: int, total: int) -> None:
        if self._asked():
            raise _InterruptedError
