"""Whether a data set in files can be trained on: every file read, and everything that is wrong said."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from .base import SampleError
from .pairs import Pair, PairedFiles, differing_sizes, read_pixels, read_values


@dataclass(frozen=True)
class Checked:
    """What was found in one pair of files."""

    problems: tuple[str, ...]
    pixels: np.ndarray
    """``(K,)`` int64: pixels of each class."""
    ignored: int
    """Pixels that count as no class."""


def check_files(dataset: PairedFiles, threads: int | None = None) -> Iterator[Checked]:
    """Reads every image and its labels whole, in threads, and yields what was found, in order.

    Problems are: no labels, unreadable files, labels that are colours, sizes that differ, values outside the classes.
    """
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        try:
            yield from pool.map(lambda pair: _check(dataset, pair), dataset.pairs)
        finally:
            pool.shutdown(cancel_futures=True)


def _check(dataset: PairedFiles, pair: Pair) -> Checked:
    problems = []
    image, values = None, None
    try:
        image = read_pixels(pair.image)
    except SampleError as error:
        problems.append(str(error))
    try:
        values = read_values(pair.labels)
    except SampleError as error:
        problems.append(str(error))
    pixels, ignored = np.zeros(len(dataset.class_names), np.int64), 0
    if values is not None:
        counts = dataset.counts(values)
        if invalid := dataset.invalid(counts):
            problems.append(f"labels {pair.labels} hold {invalid}")
        counts = counts[: len(dataset.table)]
        is_class = (dataset.table >= 0) & (dataset.table != dataset.ignore_index)
        np.add.at(pixels, dataset.table[is_class], counts[is_class])
        ignored = int(counts[dataset.table == dataset.ignore_index].sum())
        if image is not None and (message := differing_sizes(pair, image, values)):
            problems.append(message)
    return Checked(tuple(problems), pixels, ignored)
