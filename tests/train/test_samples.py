"""The order of samples and their random numbers follow from (seed, epoch, index) alone."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segmenter_fast.processes import World
from segmenter_fast.train.datasets.base import SampleError
from segmenter_fast.train.samples import ATTEMPTS, Batch, Batches, Samples, keys_by_step, read_batches
from support.training import RECIPE, Squares, small_model

SIDE = 3


class Numbers:
    """Sample i is an image of i; some cannot be read."""

    class_names, palette, ignore_index = ("a", "b"), ((0, 0, 0), (9, 9, 9)), 255

    def __init__(self, length: int, broken: tuple[int, ...] = (), impossible: tuple[int, ...] = ()) -> None:
        self.length, self.broken, self.impossible = length, broken, impossible

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return f"{index}"

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index in self.broken:
            raise SampleError(f"image {index}.png cannot be read")
        if index in self.impossible:
            raise ValueError(f"labels {index}.png hold 7")
        return np.full((SIDE, SIDE, 3), index, np.uint8), np.zeros((SIDE, SIDE), np.uint8)


def noisy(image: np.ndarray, labels: np.ndarray, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    noise = torch.rand(3, SIDE, SIDE, generator=generator) / 2
    return torch.from_numpy(image).permute(2, 0, 1) + noise, torch.from_numpy(labels).long()


def equal(ours: list[Batch], theirs: list[Batch]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.broken == b.broken
        for a, b in zip(ours, theirs, strict=True)
    )


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 30),
    world=st.integers(1, 4),
    batch=st.integers(1, 5),
    start=st.integers(0, 12),
    seed=st.integers(0, 2**40),
)
def test_ranks_visit_the_global_batches_of_one_process(
    length: int, world: int, batch: int, start: int, seed: int
) -> None:
    whole = list(keys_by_step(length, batch * world, seed, stop=start + 6))
    shares = [list(keys_by_step(length, batch, seed, start, start + 6, World(rank, world))) for rank in range(world)]
    for step, parts in enumerate(zip(*shares, strict=True), start):
        assert [key for part in parts for key in part] == whole[step]


def test_every_sample_comes_once_an_epoch() -> None:
    keys = [key for batch in islice(keys_by_step(10, 4, seed=3), 15) for key in batch]
    assert Counter(keys) == Counter((epoch, index) for epoch in range(6) for index in range(10))
    orders = [tuple(index for _, index in keys[10 * epoch : 10 * epoch + 10]) for epoch in range(6)]
    assert len(set(orders)) == 6  # every epoch another order
    assert keys != [key for batch in islice(keys_by_step(10, 4, seed=4), 15) for key in batch]


@pytest.mark.parametrize("broken", [(), (2, 5)])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_workers_make_no_difference(broken: tuple[int, ...]) -> None:
    samples = Samples(Numbers(7, broken), noisy, seed=11, skip_broken=True)
    plain = list(read_batches(samples, keys_by_step(7, 2, 11, stop=8)))
    for workers in (1, 3):
        assert equal(list(read_batches(samples, keys_by_step(7, 2, 11, stop=8), workers)), plain)
    assert equal(list(read_batches(samples, keys_by_step(7, 2, 11, start=5, stop=8), 2)), plain[5:])


def test_batches_leave_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    list(read_batches(Samples(Numbers(4), noisy), keys_by_step(4, 2, stop=2)))
    assert torch.equal(torch.get_rng_state(), before)


def test_random_numbers_differ_between_epochs_indices_and_seeds() -> None:
    samples, others = Samples(Numbers(3), noisy, seed=0), Samples(Numbers(3), noisy, seed=1)
    noise = [
        (drawn.sample((epoch, index))[0] - index).sum().item()
        for drawn in (samples, others)
        for epoch in range(3)
        for index in range(3)
    ]
    assert len(set(noise)) == len(noise)


def test_broken_samples_are_replaced_and_reported() -> None:
    samples = Samples(Numbers(6, broken=(1, 4)), noisy, seed=0, skip_broken=True)
    found = list(read_batches(samples, keys_by_step(6, 3, 0, stop=4), workers=1))
    messages = [message for batch in found for message in batch.broken]
    assert {"image 1.png cannot be read", "image 4.png cannot be read"} == set(messages)
    assert len(messages) >= 4  # two a pass of the data, and replacements that are broken themselves
    seen = {int(image[0, 0, 0]) for batch in found for image in batch.images}
    assert seen == {0, 2, 3, 5}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_sample_is_fatal_by_default(workers: int) -> None:
    with pytest.raises(SampleError, match=r"^image 2\.png cannot be read$"):
        list(read_batches(Samples(Numbers(4, broken=(2,)), noisy), keys_by_step(4, 2, stop=2), workers))


@pytest.mark.parametrize("workers", [0, 1])
def test_labels_outside_the_classes_are_fatal_in_any_case(workers: int) -> None:
    samples = Samples(Numbers(4, impossible=(2,)), noisy, skip_broken=True)
    with pytest.raises(ValueError, match=r"^labels 2\.png hold 7$"):
        list(read_batches(samples, keys_by_step(4, 2, stop=2), workers))


@pytest.mark.parametrize("length", [1, 40])
def test_skipping_stops_where_nothing_can_be_read(length: int) -> None:
    samples = Samples(Numbers(length, broken=tuple(range(length))), noisy, skip_broken=True)
    with pytest.raises(SampleError, match=f"^{ATTEMPTS} samples in a row cannot be read, the last: image"):
        samples.sample((0, 0))


def test_a_batch_must_be_divisible() -> None:
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 processes, got 4"):
        Batches(Squares(), RECIPE, small_model().config, World(0, 3))


def test_processes_share_a_batch_as_one_would_have_it() -> None:
    config = small_model().config
    [whole] = Batches(Squares(), RECIPE, config, World()).between(3, 4)
    shares = [next(Batches(Squares(), RECIPE, config, World(rank, 2)).between(3, 4)) for rank in (0, 1)]
    assert torch.equal(torch.cat([share.images for share in shares]), whole.images)
    assert torch.equal(torch.cat([share.labels for share in shares]), whole.labels)


def test_the_images_of_a_step_are_named() -> None:
    batches = Batches(Squares(), RECIPE.replace(batch_size=9), small_model().config, World())
    keys = next(keys_by_step(10, 9, RECIPE.seed, 2))
    assert batches.names(2) == [*(f"square-{index}" for _, index in keys[:8]), "and 1 more"]
