"""Training: a plain loop around ``Segmenter.loss``, in one process or many, that can be interrupted at any time.

Everything random follows from the recipe's seed: samples from (seed, epoch, index), see ``samples``; stochastic depth
and dropout from (seed, step, rank). The state of a run at a step is therefore its weights, its optimizer and the step,
and an interrupted and resumed run equals the uninterrupted one: on a CPU bit for bit, with as many threads.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..inference.settings import Settings
from ..processes import StopRequest, World, process_group
from ..segmenter import Segmenter
from . import ownership, run_folder
from .class_weights import FREQUENCY, class_weights, given_weights, kept_weights
from .datasets.base import SegmentationDataset
from .evaluation import Scores, evaluate, sample_pictures
from .logs import RunLog
from .optimization import recomputed
from .presets import Recipe
from .run_folder import EvaluationSummary
from .same_run import fingerprint
from .samples import Batches
from .stepping import Stepper, StepResult


class DivergedError(ValueError):
    """The loss was not finite in too many steps in a row."""


@dataclass(frozen=True)
class TrainResult:
    """Result of a call of ``train``."""

    steps: int
    """Optimizer steps done, those of earlier calls included."""
    finished: bool
    """False where a signal ended the run early; a checkpoint holds all that was done."""
    skipped: int
    """Steps of this call whose loss or gradient was not finite."""
    summary: EvaluationSummary
    scores: Scores | None
    """Scores of the last evaluation of this call."""
    started: int = 0
    """Optimizer steps that earlier calls did."""


def train(
    model: Segmenter,
    dataset: SegmentationDataset,
    val_dataset: SegmentationDataset | None,
    recipe: Recipe,
    out: str | Path,
    *,
    resume: Literal["never", "auto"] = "never",
    overwrite: bool = False,
    device: str = "auto",
    timeout: float = 600.0,
) -> TrainResult:
    """Train a model in place.

    Args:
        model: on the CPU, any weights, with as many classes as the data. ``recipe.model_fields()`` are meant for its
            configuration.
        dataset: to train on.
        val_dataset: to evaluate on; without one nothing is evaluated.
        recipe: how to train.
        out: the run's folder, see ``run_folder``.
        resume: "auto" goes on from the last checkpoint in ``out``, or starts where there is none. A finished run may
            be lengthened.
        overwrite: delete the run that ``out`` holds.
        device: "auto", "cpu" or "cuda".
        timeout: seconds that a process waits for the others, see ``processes.process_group``.

    Raises:
        ValueError: model, data and recipe do not fit each other, or ``out`` holds another run.
        FileExistsError: ``out`` holds a run, ``resume`` is "never" and ``overwrite`` is False.
        DivergedError: (a ValueError) the loss stayed not finite.
        SampleError: (an OSError) a sample cannot be read, and the recipe does not skip it.
        ConnectionError: (an OSError) the other processes cannot be reached or, with gloo, were lost.
        OSError: the folder cannot be written; earlier checkpoints stay whole.
    """
    if resume == "auto" and overwrite:
        raise ValueError("either resume a run or overwrite it, not both")
    for data, name in ((dataset, "the training data"), (val_dataset, "the validation data")):
        if data is None:
            continue
        if len(data) == 0:
            raise ValueError(f"{name} has no samples")
        have, wanted = model.config.num_classes, len(data.class_names)
        if have != wanted:
            raise ValueError(f"the model has {have} classes, {name} {wanted}: make the model with num_classes={wanted}")
        if model.config.class_names not in ((), data.class_names):
            own, names = ", ".join(model.config.class_names), ", ".join(data.class_names)
            raise ValueError(f"the model has the classes {own}; {name} has {names}: make the model with these names")
    with process_group(device, timeout) as world, StopRequest() as request:
        return _Run(model, dataset, val_dataset, recipe, Path(out), world, request).go(resume == "auto", overwrite)


class _InterruptedError(Exception):
    """A signal came at a moment when everything is on the disk already."""


class _Run:
    """The state of one call of ``train``. Every method runs in every process."""

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
        self.length = len(dataset)
        self.total_steps, epoch_steps = recipe.total_steps(self.length), recipe.epoch_steps(self.length)
        every = recipe.evaluate_every or epoch_steps
        evaluated = {*range(every, self.total_steps, every), self.total_steps}
        self.evaluated_steps = evaluated if val_dataset is not None else set()
        self.save_every = recipe.save_every or epoch_steps
        self.settings = Settings(recipe.window, recipe.stride)
        self.batches = Batches(dataset, recipe, model.config, world)
        self.stepper = Stepper(model, dataset.ignore_index, recipe, self.total_steps, world)
        self.summary = EvaluationSummary()
        self.scores: Scores | None = None
        self.skipped = self.bad_in_a_row = 0
        self.weights = list[float]()
        if recipe.class_weights not in ("", FREQUENCY):
            given_weights(recipe.class_weights, dataset.class_names)  # an early error

    def go(self, resume: bool, overwrite: bool) -> TrainResult:
        """Train from the start, or from the last checkpoint, to the end or until a signal."""
        lock = self.world.in_first(ownership.lock, self.out)
        try:
            return self._locked(resume, overwrite)
        finally:
            if lock is not None:
                lock.release()

    def _open(self, resume: bool, overwrite: bool) -> tuple[dict[str, Any] | None, list[tuple[str, str]]]:
        data, recipe = fingerprint(self.dataset), self.recipe
        model = self.stepper.model
        kept = [] if overwrite else kept_weights(self.out, model.config.num_classes)
        self.weights = kept or class_weights(recipe.class_weights, self.dataset, recipe.broken == "skip")
        return run_folder.open_run(self.out, recipe, model, self.length, resume, data, overwrite, self.weights)

    def _locked(self, resume: bool, overwrite: bool) -> TrainResult:
        stepper, recipe = self.stepper, self.recipe
        content, events = self.world.in_first(self._open, resume, overwrite) or (None, [])
        if self.world.broadcast(content is not None):
            stepper.load_state_dict(content)
            read = self.world.in_first(run_folder.read_scores, self.out, stepper.steps)
            self.summary = self.world.broadcast(read) or self.summary
        self.weights = self.world.broadcast(self.weights)
        stepper.weigh(self.weights)
        folder, started = self.out if self.world.rank == 0 else None, stepper.steps
        evaluated = self.summary.last_step == started
        log = RunLog(folder, self.total_steps, recipe.batch_size, started, evaluated, self.world.device)
        with log as self.log, recomputed(stepper.model) if recipe.activation_checkpointing else nullcontext():
            if started:
                log.event("resumed", f"from the checkpoint of step {started}")
            elif self.weights:
                named = zip(self.dataset.class_names, self.weights, strict=True)
                log.event("class weights", ", ".join(f"{name} {weight:.4g}" for name, weight in named))
            for kind, message in events:
                log.event(kind, message)
            try:
                finished = self._loop()
            except _InterruptedError:
                finished = False
            if not finished:
                log.event("stopped", f"by a signal after step {stepper.steps}; all of it is saved")
        return TrainResult(stepper.steps, finished, self.skipped, self.summary, self.scores, started)

    def _loop(self) -> bool:
        """Take all steps that are left; return False where a signal ended them."""
        stepper, recipe, total = self.stepper, self.recipe, self.total_steps
        if stepper.steps in self.evaluated_steps and self.summary.last_step != stepper.steps:
            self._evaluate()
        for batch in self.batches.between(stepper.steps, total):
            for message in batch.broken:
                self.log.event("broken", f"{message}; another sample takes its place")
            result = stepper.step(batch.images, batch.labels, self.request)
            step, evaluates = stepper.steps, stepper.steps in self.evaluated_steps
            if result.updated:
                self.bad_in_a_row = 0
            else:
                self._skip(result)
            self.log.step(step, result.loss, result.lr, step % recipe.log_every == 0 or step == total)
            stops = result.stop and step < total
            if stops or evaluates or step == total or step % self.save_every == 0:
                with self.log.paused():
                    best, content = self.summary.best_step, stepper.state_dict()
                    self.world.in_first(run_folder.save, self.out, stepper.model.config, content, recipe.keep, best)
                    if stops:
                        return False
                    if evaluates:
                        self._evaluate()
        return True

    def _skip(self, result: StepResult) -> None:
        """Log a step that changed nothing, and end the run after too many in a row."""
        step = self.stepper.steps
        if result.overflow:
            reason = "the gradient passed float16's range; a smaller scale is tried"
            self.log.event("overflow", f"step {step} skipped: {reason}")
            return
        self.skipped += 1
        self.bad_in_a_row += 1
        what = f"loss {result.loss}, gradient norm {result.norm}, learning rate {result.lr:.3g}"
        images = ", ".join(self.batches.names(step - 1))
        self.log.event("skipped", f"step {step}: {what}; its images: {images}")
        if self.bad_in_a_row == self.recipe.max_bad_steps:
            raise DivergedError(
                f"loss or gradient were not finite in {self.bad_in_a_row} steps in a row, up to step {step} ({what}), "
                f"whose images are {images}. Checkpoints in {self.out} stay as they are; a lower --lr, --clip, or "
                "--precision float32 may help"
            )

    def _evaluate(self) -> None:
        """Score the step whose checkpoint was just written, and keep the best model."""
        assert self.val_dataset is not None
        recipe, stepper = self.recipe, self.stepper
        model, low = stepper.whole_model(), stepper.dtype != torch.float32
        with torch.autocast(self.world.device.type, stepper.dtype, enabled=low):
            scores = evaluate(model, self.val_dataset, recipe.resize, self.settings, self.world, self._stop_if_asked)
            self.log.evaluation(stepper.steps, scores)
            if self.world.rank == 0 and recipe.pictures:
                shown = range(0, len(self.val_dataset), max(len(self.val_dataset) // recipe.pictures, 1))
                shown = shown[: recipe.pictures]
                pictures = sample_pictures(model, self.val_dataset, shown, recipe.resize, self.settings)
                self.log.samples(stepper.steps, pictures)
        self.scores, self.summary = scores, self.summary.after(stepper.steps, scores.miou)
        self.world.in_first(run_folder.save_scores, self.out, self.summary, recipe.keep)

    def _stop_if_asked(self, done: int, total: int) -> None:
        if self.request.signal is not None:
            raise _InterruptedError
