"""Findings in the files of a data set: problems of each pair, and what the classes, values and sizes are in all."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...io.images import count_pages
from ...io.walk import Ignored
from .base import SampleError
from .colors import UnknownColorError
from .pairs import Pair, PairedFiles, differing_sizes, orientation, read_pixels

SAMPLE = 200
"""Label files that a training looks into before it starts."""


@dataclass(frozen=True)
class CheckedPair:
    """Findings in one pair of files."""

    problems: tuple[str, ...]
    pixels: np.ndarray
    """``(K,)`` int64: pixels of each class."""
    ignored: int
    """Pixels that count as no class."""
    values: Counter[int]
    """Pixels of each value that the label file holds."""
    invalid: bool = False
    """True if some values are no classes."""
    size: str = ""
    """Of the image, "width x height"."""
    turned: tuple[int, int] = (1, 1)
    """EXIF orientations of image and labels."""


def check_files(dataset: PairedFiles) -> Iterator[CheckedPair]:
    """Read every image and its labels in threads, and yield the findings in order.

    Problems are: no labels, unreadable files, labels that are colours, sizes that differ, values outside the classes.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            yield from pool.map(lambda pair: _check(dataset, pair), dataset.pairs)
        finally:
            pool.shutdown(cancel_futures=True)


def _check(dataset: PairedFiles, pair: Pair) -> CheckedPair:
    problems = list[str]()
    image, values = None, None
    try:
        image = read_pixels(pair.image, dataset.page or 0, dataset.channels)
    except SampleError as error:
        problems.append(str(error))
    try:
        values = dataset.values(pair)
    except (SampleError, UnknownColorError) as error:
        problems.append(str(error))
    size = f"{image.shape[1]} x {image.shape[0]}" if image is not None else ""
    if values is None:
        return CheckedPair(tuple(problems), np.zeros(len(dataset.class_names), np.int64), 0, Counter(), False, size)
    pixels, ignored, found, invalid = _count(dataset, values)
    if invalid:
        problems.append(f"labels {pair.labels} hold {invalid}")
    if image is not None and (message := differing_sizes(pair, image, values)):
        problems.append(message)
    turned = orientation(pair.image), orientation(pair.labels)
    return CheckedPair(tuple(problems), pixels, ignored, found, bool(invalid), size, turned)


def _count(dataset: PairedFiles, values: np.ndarray) -> tuple[np.ndarray, int, Counter[int], str]:
    """Return pixels of each class, ignored pixels, pixels of each value, and the values that are no classes."""
    counts = np.bincount(values.reshape(-1), minlength=len(dataset.table))
    found = Counter({int(value): int(counts[value]) for value in np.flatnonzero(counts)})
    invalid, counts = dataset.invalid(counts), counts[: len(dataset.table)]
    is_class = (dataset.table >= 0) & (dataset.table != dataset.ignore_index)
    pixels = np.zeros(len(dataset.class_names), np.int64)
    np.add.at(pixels, dataset.table[is_class], counts[is_class])
    return pixels, int(counts[dataset.table == dataset.ignore_index].sum()), found, invalid


class Findings:
    """All that is found in a split, summed over the pairs that ``add`` takes."""

    def __init__(self, dataset: PairedFiles) -> None:
        self.dataset, self.pixels, self.ignored = dataset, np.zeros(len(dataset.class_names), np.int64), 0
        self.problems = [f"labels {path} belong to no image" for path in dataset.strays]
        self.values, self.sizes, self.orientations = Counter[int](), Counter[str](), Counter[tuple[int, int]]()
        self.labels = self.bad_values = 0
        self._why = f"; {dataset.colors}"  # colours cannot be read; the first of such problems says it

    def add(self, checked: CheckedPair) -> None:
        self.pixels += checked.pixels
        self.ignored += checked.ignored
        told = any(problem.endswith(self._why) for problem in self.problems)
        self.problems += [problem.removesuffix(self._why) if told else problem for problem in checked.problems]
        self.values += checked.values
        self.labels += bool(checked.values)
        self.bad_values += checked.invalid
        self.orientations[checked.turned] += 1
        if checked.size:
            self.sizes[checked.size] += 1

    def warnings(self) -> list[str]:
        """Return what is no error but rarely meant: classes without a pixel, images turned without their labels."""
        apart = sum(count for (image, labels), count in self.orientations.items() if image != labels)
        turned = f"EXIF turns {apart} image{'s' if apart > 1 else ''} another way than the labels: look at some of them"
        found = warn_of_classes(self.dataset.class_names, self.pixels, self.values) + ([turned] if apart else [])
        return found + warn_of_pages(self.dataset, self.dataset.pairs)

    def summary(self) -> dict[str, Any]:
        """Return all figures in values that JSON holds."""
        ignored: Ignored = self.dataset.ignored
        return {
            "images": len(self.dataset),
            "labels": self.labels + len(self.dataset.strays),
            "pairs": self.labels,
            "ignored_files": {reason: [str(path) for path in paths] for reason, paths in ignored.items()},
            "sizes": dict(self.sizes.most_common()),
            "turned_by_exif": sum(count for turned, count in self.orientations.items() if turned != (1, 1)),
            "files_with_other_values": self.bad_values,
            "values": {str(value): count for value, count in sorted(self.values.items())},
            "pixels": dict(zip(self.dataset.class_names, self.pixels.tolist(), strict=True)),
            "ignored_pixels": self.ignored,
            "problems": self.problems,
            "warnings": self.warnings(),
        }


def warn_of_pages(dataset: PairedFiles, pairs: Sequence[Pair]) -> list[str]:
    """Return a warning about image files of several pages, if none is chosen; it names the first and counts them."""
    counted = [(pair.image, count_pages(pair.image)) for pair in pairs if dataset.page is None]
    several = [(path, pages) for path, pages in counted if pages > 1]
    more = f" and {len(several) - 1} more images have several" if len(several) > 1 else ""
    return [f"{path} has {pages} pages{more}; the first is read, --page 1 is the second" for path, pages in several[:1]]


def warn_of_classes(names: Sequence[str], pixels: np.ndarray, values: Counter[int], where: str = "") -> list[str]:
    """Return a warning where classes have no pixel, or where there is one class only; it names the values found."""
    absent = [name for name, count in zip(names, pixels, strict=True) if not count]
    if not absent and len(names) > 1:
        return []
    some = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
    what = f"no pixel of {some}" if absent else "one class only"
    if len(absent) == len(names):
        what = "no pixel of any class"
    found = ", ".join(map(str, sorted(values)[:8])) + (", ..." if len(values) > 8 else "")
    message = f"{what}{where}; the label files hold {found or 'nothing'}"
    if set(values) == {0, 255}:
        message += ': if 255 is a class, write {"classes": ["no", "yes"], "values": [0, 255]} as classes.json'
    return [message]


def sample_warnings(dataset: PairedFiles) -> list[str]:
    """Return the warnings of ``warn_of_classes`` and ``warn_of_pages`` for up to ``SAMPLE`` pairs, evenly spread.

    Where there are more files, a class may lie in the others: then only one or no class in the sample is worth a word.
    """
    pairs = dataset.pairs[:: -(-len(dataset) // SAMPLE)]
    pixels, values = np.zeros(len(dataset.class_names), np.int64), Counter[int]()
    pages = warn_of_pages(dataset, pairs)
    for pair in pairs:
        try:
            counted, _, found, _ = _count(dataset, dataset.values(pair))
        except SampleError:
            continue
        pixels, values = pixels + counted, values + found
    if len(pairs) < len(dataset) and (pixels > 0).sum() > 1:
        return pages
    where = f" in {len(pairs)} of {len(dataset)} label files"
    return warn_of_classes(dataset.class_names, pixels, values, where) + pages
