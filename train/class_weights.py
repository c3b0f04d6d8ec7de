"""Weights of the classes in the loss: given, or from the pixels that the classes have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..weights.reading import CheckpointError, read_mapping
from .datasets.base import SampleError, SegmentationDataset
from .datasets.pairs import PairedFiles
from .run_folder import RUN, checkpoint_steps

FREQUENCY = "frequency"


def given_weights(wish: str, names: Sequence[str]) -> list[float]:
    """Return the weight of each class.

    Args:
        wish: a number for each class, "1,2,0.5", or for some of them by name, "sky=2,sea=0.5"; others then have 1.

    Raises:
        ValueError: another number of entries, an unknown name, a weight that is no finite number from 0 on, or all 0.
    """
    entries = [entry.strip().rpartition("=") for entry in wish.split(",")]
    by_name = any(equals for _, equals, _ in entries)
    try:
        weights = [float(number) for _, _, number in entries]
    except ValueError:
        weights = []
    keys = [name.strip() for name, _, _ in entries]
    fits = set(keys) <= set(names) and len(set(keys)) == len(keys) if by_name else len(weights) == len(names)
    if not fits or not weights or not all(0 <= weight < math.inf for weight in weights):
        allowed = (
            f"{FREQUENCY}, {len(names)} numbers from 0 on with commas between them, or NAME=NUMBER of some classes"
        )
        raise ValueError(f"class_weights must be {allowed}, got {wish!r}. Classes of the data: {', '.join(names)}")
    if by_name:
        weights = [dict(zip(keys, weights, strict=True)).get(name, 1.0) for name in names]
    if not any(weights):
        raise ValueError(f"class_weights must leave a class that counts, got {wish!r}")
    return weights


def frequency_weights(pixels: Sequence[int] | np.ndarray) -> list[float]:
    """Return ``1 / ln(1.02 + share)`` for the share of each class in the labelled pixels: 1.4 for all, 50.5 for none.

    Source: Paszke et al., ENet, 2016.

    Raises:
        ValueError: no labelled pixel.
    """
    total = int(np.sum(pixels))
    if not total:
        raise ValueError("class_weights frequency needs labelled pixels, and the training data has none")
    return [1 / math.log(1.02 + int(count) / total) for count in pixels]


def count_pixels(dataset: SegmentationDataset, skip_broken: bool = False) -> np.ndarray:
    """Return the pixels of each class in all labels of a data set, ``(K,)`` int64; labels in files are read by threads.

    Raises:
        SampleError: labels cannot be read, and ``skip_broken`` is False.
        ValueError: labels outside the classes.
    """
    total = np.zeros(256, np.int64)
    with ThreadPoolExecutor() as pool:
        for counts in pool.map(lambda index: _count(dataset, index, skip_broken), range(len(dataset))):
            total += counts
    return total[: len(dataset.class_names)]


def _count(dataset: SegmentationDataset, index: int, skip_broken: bool) -> np.ndarray:
    try:
        labels = dataset.classes(dataset.pairs[index]) if isinstance(dataset, PairedFiles) else dataset.read(index)[1]
    except SampleError:
        if not skip_broken:
            raise
        return np.zeros(256, np.int64)
    return np.bincount(labels[labels != dataset.ignore_index], minlength=256)


def kept_weights(run: Path, num_classes: int) -> list[float]:
    """Return the weights that the ``run.json`` of a run with checkpoints holds; none where it has none.

    Raises:
        CheckpointError: it holds something else.
    """
    path = run / RUN
    found = read_mapping(path).get("class_weights", []) if path.exists() and checkpoint_steps(run) else []
    numbers = isinstance(found, list) and all(type(weight) is float and 0 <= weight < math.inf for weight in found)
    if not numbers or len(found) not in (0, num_classes):
        raise CheckpointError(f"{path} must hold no class_weights, or {num_classes} numbers from 0 on, got {found!r}")
    return found


def class_weights(wish: str, dataset: SegmentationDataset, skip_broken: bool = False) -> list[float]:
    """Return the weights that ``Recipe.class_weights`` asks for; none where it is empty.

    Raises:
        ValueError, SampleError: as the functions above.
    """
    if not wish:
        return []
    if wish == FREQUENCY:
        return frequency_weights(count_pixels(dataset, skip_broken))
    return given_weights(wish, dataset.class_names)
