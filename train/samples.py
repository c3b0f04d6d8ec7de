"""From a data set to batches: which sample comes when, and with which random numbers.

Everything follows from (seed, epoch, index): the order does not depend on the number of ranks, a sample's augmentation
not on the worker that makes it, and a run that starts at step n sees what an uninterrupted run sees from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..processes import StopRequest
from .datasets.base import SampleError, SegmentationDataset

Transform = Callable[[np.ndarray, np.ndarray, torch.Generator], tuple[Tensor, Tensor]]
ATTEMPTS = 10
"""How many samples in a row may be broken before skipping them stops."""


class Key(NamedTuple):
    """One visit of one sample."""

    epoch: int
    sample: int


class Sample(NamedTuple):
    """What a data set and a transform make of a key."""

    image: Tensor
    labels: Tensor
    broken: tuple[str, ...] = ()
    """What was wrong with each sample that this one replaces."""


class Batch(NamedTuple):
    """``(B, 3, h, w)`` float32, ``(B, h, w)`` int64, and a message for each broken sample that was replaced."""

    images: Tensor
    labels: Tensor
    broken: tuple[str, ...] = ()


class Samples(Dataset[Sample]):
    """Augmented samples by ``Key``, the same for the same key in whatever process.

    Args:
        dataset: read only.
        transform: takes all its random numbers from the generator it is given.
        seed: of the run, not negative.
        broken: "raise", or "skip": a sample that cannot be read is replaced by another, drawn from (seed, epoch,
            index), too, and the message goes with it. Labels outside the classes are fatal in any case.

    Raises:
        SampleError: when indexed; a sample cannot be read, or with "skip" ``ATTEMPTS`` in a row.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        transform: Transform,
        seed: int = 0,
        broken: Literal["raise", "skip"] = "raise",
    ) -> None:
        if broken not in ("raise", "skip"):
            raise ValueError(f"broken must be 'raise' or 'skip', got {broken!r}")
        self.dataset, self.transform, self.seed, self.broken = dataset, transform, _checked_seed(seed), broken

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        index = key[1]
        messages: list[str] = []
        for attempt in range(ATTEMPTS):
            try:
                image, labels = self.dataset.read(index)
            except SampleError as error:
                if self.broken == "raise":
                    raise
                messages.append(str(error))
                index = _another(index, len(self), _generator(self.seed, *key, attempt))
            else:
                return Sample(*self.transform(image, labels, _generator(self.seed, *key)), tuple(messages))
        raise SampleError(f"{ATTEMPTS} samples in a row cannot be read, the last: {messages[-1]}")


@dataclass(frozen=True)
class EpochSampler(Sampler[list[Key]]):
    """The keys of one rank's batches, a list for each step.

    The epochs' permutations stand one after another, and step n takes the next ``world_size * batch_size`` of them, of
    which each rank takes its share in order. So W ranks with batches of B visit the global batches of one process with
    batches of W * B. Nothing is dropped and nothing comes twice in an epoch: where an epoch's rest does not fill a
    batch, the next epoch fills it.
    """

    length: int
    """Samples in the data set."""
    batch_size: int
    """Of one rank."""
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    start: int = 0
    """The first step, 0 for a new run."""
    stop: int | None = None
    """The step to stop before; None goes on for ever."""

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"a data set must have at least one sample, got {self.length}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be within 0 to {self.world_size - 1}, got {self.rank}")
        if self.start < 0:
            raise ValueError(f"start must be a step of the run, 0 or later, got {self.start}")
        _checked_seed(self.seed)

    def epoch(self, step: int) -> float:
        """Epochs visited when ``step`` steps are done."""
        return step * self.batch_size * self.world_size / self.length

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = -1, torch.empty(0)
        step = self.start
        while self.stop is None or step < self.stop:
            first = (step * self.world_size + self.rank) * self.batch_size
            keys = []
            for position in range(first, first + self.batch_size):
                if position // self.length != epoch:
                    epoch = position // self.length
                    order = torch.randperm(self.length, generator=_generator(self.seed, epoch))
                keys.append(Key(epoch, int(order[position % self.length])))
            yield keys
            step += 1


def batches(samples: Samples, sampler: EpochSampler, workers: int = 0, pin_memory: bool = False) -> Iterator[Batch]:
    """The batches of one rank, in the sampler's order, made by ``workers`` processes ahead of time, or here where 0.

    Touches no global random state. Closing the iterator ends the workers.

    Raises:
        SampleError, ValueError: as ``Samples``; one line, from whatever process.
    """
    loader: DataLoader[Batch | Exception] = DataLoader(
        _Batches(samples),
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        worker_init_fn=StopRequest.ignore,
        generator=torch.Generator(),  # else the loader draws from the global one
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


class _Batches(Dataset[Any]):
    """Whole batches for the loader. Errors come back as values: raised in a worker they arrive as its traceback."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitems__(self, keys: list[Key]) -> Batch | Exception:
        try:
            made = [self.samples[key] for key in keys]
        except (SampleError, ValueError) as error:
            return error
        images, labels, broken = zip(*made, strict=True)
        return Batch(torch.stack(images), torch.stack(labels), sum(broken, ()))


def _unchanged(batch: Any) -> Any:
    return batch


def _generator(seed: int, *key: int) -> torch.Generator:
    """Independent streams for every seed and key, of whatever length."""
    state = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


def _another(index: int, length: int, generator: torch.Generator) -> int:
    """Some other index, where there is one."""
    step = int(torch.randint(1, max(length, 2), (), generator=generator))
    return (index + step) % length


def _checked_seed(seed: int) -> int:
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    return seed
