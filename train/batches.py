"""The batches of a run: the recipe's augmentation, this process's share, cut into the parts of a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ..config import SegmenterConfig
from ..devices import usable_cores
from ..processes import World
from .augment import TrainTransform
from .datasets.base import SegmentationDataset
from .presets import Recipe
from .samples import EpochSampler, Samples, batches

Part = tuple[Tensor, Tensor]  # (B, 3, h, w) images, (B, h, w) labels
_NAMED = 8


@dataclass(frozen=True)
class StepData:
    """What one process computes in one step."""

    parts: list[Part]
    broken: tuple[str, ...]
    """A message for each sample that could not be read and was replaced."""


class Batches:
    """Samples by step.

    Raises:
        ValueError: the recipe's batch cannot be divided among the processes, or a share into its parts.
    """

    def __init__(self, dataset: SegmentationDataset, recipe: Recipe, config: SegmenterConfig, world: World) -> None:
        self.dataset, self.recipe, self.world = dataset, recipe, world
        if recipe.batch_size % world.size:
            raise ValueError(f"batch_size must be a multiple of the {world.size} processes, got {recipe.batch_size}")
        self.share = recipe.batch_size // world.size
        if recipe.accumulate > self.share:
            raise ValueError(
                f"accumulate must be at most {self.share}, the images of a process's step, got {recipe.accumulate}"
            )
        transform = TrainTransform(
            resize=recipe.resize,
            crop=recipe.crop,
            ratios=(recipe.min_ratio, recipe.max_ratio),
            max_share=recipe.max_share,
            flip=recipe.flip,
            photometric=recipe.photometric,
            mean=config.mean,
            std=config.std,
            ignore_index=dataset.ignore_index,
        )
        self.samples = Samples(dataset, transform, recipe.seed, "skip" if recipe.broken == "skip" else "raise")

    def between(self, start: int, stop: int) -> Iterator[StepData]:
        """From one step to before another, read ahead by the recipe's workers, of which each gets a core."""
        seed, world = self.recipe.seed, self.world
        workers = min(self.recipe.workers, usable_cores())
        sampler = EpochSampler(len(self.dataset), self.share, seed, world.rank, world.size, start, stop)
        for images, labels, broken in batches(self.samples, sampler, workers, world.device.type == "cuda"):
            parts = zip(images.chunk(self.recipe.accumulate), labels.chunk(self.recipe.accumulate), strict=True)
            yield StepData(list(parts), broken)

    def names(self, step: int) -> list[str]:
        """The names of a step's images, in all processes; the first few, where there are many."""
        sampler = EpochSampler(len(self.dataset), self.recipe.batch_size, self.recipe.seed, start=step, stop=step + 1)
        keys = next(iter(sampler))
        names = [self.dataset.name(key.sample) for key in keys[:_NAMED]]
        return [*names, f"and {len(keys) - _NAMED} more"] if len(keys) > _NAMED else names
