"""One optimizer step: the parts of a batch, the exchange between processes, a loss that is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..processes import World
from ..segmenter import Segmenter
from .batches import Part
from .checkpoints import Training
from .distributed import exchanging
from .optimization import gradient_norm
from .presets import Recipe


class SummedLoss(nn.Module):
    """A model's fused loss, summed over labelled pixels, as a forward pass, which is what can be sharded."""

    def __init__(self, model: Segmenter, ignore_index: int, label_smoothing: float) -> None:
        super().__init__()
        self.model, self.ignore_index, self.label_smoothing = model, ignore_index, label_smoothing

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        options = {"ignore_index": self.ignore_index, "label_smoothing": self.label_smoothing}
        return self.model.loss(images, target, reduction="sum", **options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Outcome:
    """What a step came to, the same in every process."""

    loss: float
    """Mean over the labelled pixels of all processes' images."""
    norm: float
    """Of the gradient, before it is clipped."""
    lr: float
    updated: bool
    """Whether the weights changed; not where loss or gradient are not finite."""
    overflow: bool
    """Whether the gradient merely passed float16's range, after which the scaler tries a smaller factor."""
    stop: bool
    """Whether any process was asked to stop."""


class Stepper:
    """Takes optimizer steps. The gradient is that of the mean loss over the labelled pixels of the whole batch.

    Pixels count alike however the images are spread over processes and parts: every part's loss is a sum, divided by
    the number of labelled pixels of the whole batch, which the processes add up first.
    """

    def __init__(self, module: nn.Module, training: Training, recipe: Recipe, world: World, dtype: torch.dtype) -> None:
        self.module, self.training, self.recipe, self.world, self.dtype = module, training, recipe, world, dtype

    def step(self, parts: Sequence[Part], ignore_index: int, stop: Callable[[], bool]) -> Outcome:
        """One step on this process's images; parts may differ in size, but all processes must have as many."""
        training, world = self.training, self.world
        seed_step(self.recipe.seed, training.step, world.rank)
        parts = [self._placed(images, target) for images, target in parts]
        labelled = world.sum(torch.stack([(target != ignore_index).sum() for _, target in parts]).sum().double())
        share = (world.size / labelled.clamp(min=1)).float()  # times size, as the processes' gradients are averaged
        total = torch.zeros((), device=world.device)
        for number, (images, target) in enumerate(parts):
            with exchanging(self.module, number == len(parts) - 1):
                with torch.autocast(world.device.type, self.dtype, enabled=self.dtype != torch.float32):
                    loss = self.module(images, target) * share
                training.scaler.scale(loss).backward()
            total += loss.detach()
        return self._update(total / world.size, stop)

    def _update(self, loss: Tensor, stop: Callable[[], bool]) -> Outcome:
        training, recipe = self.training, self.recipe
        lr = float(training.schedule.get_last_lr()[0])
        scale = training.scaler.get_scale()
        training.scaler.unscale_(training.optimizer)
        norm = gradient_norm(training.model)
        summed = self.world.sum(torch.stack([loss, loss.new_tensor(float(stop()))]))
        loss_value, stops, norm_value = torch.cat([summed, norm.float().view(1)]).tolist()
        finite = math.isfinite(loss_value) and math.isfinite(norm_value)
        if finite:
            if recipe.clip:
                trained = [p for p in training.model.parameters() if p.grad is not None]
                torch.nn.utils.clip_grads_with_norm_(trained, recipe.clip, norm)
            training.scaler.step(training.optimizer)
            if training.ema is not None:
                training.ema.update_parameters(training.model)
        training.scaler.update()
        training.optimizer.zero_grad(set_to_none=True)
        # PyTorch warns of a schedule that runs before its optimizer, which a skipped first step looks like.
        training.optimizer._opt_called = True  # type: ignore[attr-defined]
        training.schedule.step()
        training.step += 1
        overflow = math.isfinite(loss_value) and not finite and training.scaler.is_enabled() and scale > 1
        return Outcome(loss_value, norm_value, lr, finite, overflow, stops > 0)

    def _placed(self, images: Tensor, target: Tensor) -> Part:
        layout = torch.channels_last if self.recipe.channels_last else torch.contiguous_format
        device = self.world.device
        images = images.to(device, non_blocking=True, memory_format=layout)
        return images, target.to(device, non_blocking=True)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Starts PyTorch's generators anew from these three, so that a resumed run draws what it would have drawn."""
    state = np.random.SeedSequence([seed, step, rank]).generate_state(2)
    torch.manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)
