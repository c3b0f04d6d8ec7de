"""Batches of augmented samples, in an order and with random numbers that follow from (seed, epoch, index) alone.

The order does not depend on the number of ranks, a sample's augmentation not on the worker that makes it, and a run
that starts at step n sees what an uninterrupted run sees from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..config import SegmenterConfig
from ..devices import usable_cores
from ..processes import StopRequest, World
from .augment import TrainTransform
from .datasets.base import SampleError, SegmentationDataset
from .presets import Recipe

Key = tuple[int, int]  # epoch, index of the sample
Transform = Callable[[np.ndarray, np.ndarray, torch.Generator], tuple[Tensor, Tensor]]
ATTEMPTS = 10
"""Number of samples in a row that may be broken before skipping them stops."""
_NAMED = 8


class Batch(NamedTuple):
    """``(B, C, h, w)`` float32, ``(B, h, w)`` int64, and a message for each broken sample that was replaced."""

    images: Tensor
    labels: Tensor
    broken: list[str]


class Samples(Dataset[Batch | Exception]):
    """Augmented samples by (epoch, index), the same for the same key in any process.

    Args:
        dataset: is only read.
        transform: takes all its random numbers from the generator it is given.
        seed: of the run, not negative.
        skip_broken: replace a sample that cannot be read by another, drawn from (seed, epoch, index) as well, and
            report it. Labels outside the classes are fatal in any case.
    """

    def __init__(
        self, dataset: SegmentationDataset, transform: Transform, seed: int = 0, skip_broken: bool = False
    ) -> None:
        self.dataset, self.transform, self.seed, self.skip_broken = dataset, transform, seed, skip_broken

    def __getitem__(self, keys: list[Key]) -> Batch | Exception:
        """Return the batch of these keys, or the error: raised in a worker it would arrive as its traceback."""
        try:
            images, labels, broken = zip(*map(self.sample, keys), strict=True)
        except (SampleError, ValueError) as error:
            return error
        return Batch(torch.stack(images), torch.stack(labels), [message for messages in broken for message in messages])

    def sample(self, key: Key) -> tuple[Tensor, Tensor, list[str]]:
        """Return image, labels, and a message for each sample that this one replaces.

        Raises:
            SampleError: the sample cannot be read, or ``ATTEMPTS`` in a row cannot.
        """
        index, messages, generator = key[1], list[str](), _generator(self.seed, *key)
        for attempt in range(ATTEMPTS):
            try:
                image, labels = self.dataset.read(index)
            except SampleError as error:
                if not self.skip_broken:
                    raise
                messages.append(str(error))
                length, draw = len(self.dataset), _generator(self.seed, *key, attempt)
                index = (index + int(torch.randint(1, max(length, 2), (), generator=draw))) % length  # another one
            else:
                return *self.transform(image, labels, generator), messages
        raise SampleError(f"{ATTEMPTS} samples in a row cannot be read, the last: {messages[-1]}")


def keys_by_step(
    length: int, batch_size: int, seed: int = 0, start: int = 0, stop: int | None = None, world: World | None = None
) -> Iterator[list[Key]]:
    """Yield the keys of one rank's batches, a list for each step.

    The epochs' permutations stand one after another, and step n takes the next ``world.size * batch_size`` of them, of
    which each rank takes its share in order. So W ranks with batches of B visit the global batches of one process with
    batches of W * B. Every sample occurs once in an epoch: where an epoch's rest does not fill a batch, the next epoch
    fills it.

    Args:
        length: samples in the data set.
        batch_size: of one rank.
        start, stop: the first step, and the step to stop before; None never stops.
    """
    rank, size = (world.rank, world.size) if world else (0, 1)
    epoch, order, step = -1, torch.empty(0), start
    while stop is None or step < stop:
        first = (step * size + rank) * batch_size
        keys = []
        for position in range(first, first + batch_size):
            if position // length != epoch:
                epoch = position // length
                order = torch.randperm(length, generator=_generator(seed, epoch))
            keys.append((epoch, int(order[position % length])))
        yield keys
        step += 1


def read_batches(
    samples: Samples, keys: Iterator[list[Key]], workers: int = 0, pin_memory: bool = False
) -> Iterator[Batch]:
    """Yield a batch for each list of keys, made ahead of time by ``workers`` processes, or here where 0.

    Touches no global random state. Closing the iterator ends the workers.

    Raises:
        SampleError, ValueError: from ``Samples``, in one line from any process.
    """
    loader: DataLoader[Batch | Exception] = DataLoader(
        samples,
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=StopRequest.ignore,
        generator=torch.Generator(),  # else the loader draws from the global one
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


class Batches:
    """The batches of a run: the recipe's augmentation, and this process's share of every step.

    Raises:
        ValueError: the recipe's batch cannot be divided among the processes, or a share into its parts.
    """

    def __init__(self, dataset: SegmentationDataset, recipe: Recipe, config: SegmenterConfig, world: World) -> None:
        self.dataset, self.recipe, self.world, self.length = dataset, recipe, world, len(dataset)
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
            photometric=recipe.photometric and config.in_channels == 3,
            mean=config.mean,
            std=config.std,
            ignore_index=dataset.ignore_index,
        )
        self.samples = Samples(dataset, transform, recipe.seed, recipe.broken == "skip")

    def between(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches from one step to before another, read ahead by the recipe's workers, of which each gets a core."""
        keys = keys_by_step(self.length, self.share, self.recipe.seed, start, stop, self.world)
        workers = self.recipe.workers and min(self.recipe.workers, usable_cores())
        return read_batches(self.samples, keys, workers, self.world.device.type == "cuda")

    def names(self, step: int) -> list[str]:
        """Return the names of a step's images, in all processes; the first few, where there are many."""
        keys = next(keys_by_step(self.length, self.recipe.batch_size, self.recipe.seed, step))
        names = [self.dataset.name(index) for _, index in keys[:_NAMED]]
        return [*names, f"and {len(keys) - _NAMED} more"] if len(keys) > _NAMED else names


def _generator(seed: int, *key: int) -> torch.Generator:
    """Return a generator whose stream is independent for every seed and key, of any length."""
    state = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)
