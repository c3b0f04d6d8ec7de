"""Classes of a model and of a data set, matched by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...classes import Color
from ...config import SegmenterConfig
from ...visualize import default_palette
from .base import SegmentationDataset

IN_ORDER = "order"
"""The class map that takes classes by number, whatever their names."""


def match_names(
    own: Sequence[str], names: Sequence[str], class_map: Sequence[str] = (), strict: bool = True
) -> list[int]:
    """Return for each class of the data the class of the model with its name, -1 for none.

    Args:
        own, names: classes of the model, of the data. Names agree exactly or but for upper and lower case.
        class_map: entries "DATA=MODEL" for other names, "DATA=" for classes that do not count; or "order" alone.
        strict: refuse a class of the data without one of its name and without an entry.

    Raises:
        ValueError: an entry of another form or that names no class, "order" for different numbers of classes, or a
            class without one of its name; gives both lists.
    """
    if list(class_map) == [IN_ORDER] and len(own) == len(names):
        return list(range(len(own)))
    given = dict(entry.partition("=")[::2] for entry in class_map)
    places = {name.casefold(): index for index, name in enumerate(own)} | {name: i for i, name in enumerate(own)}
    wanted = [given.get(name, name) for name in names]
    found = [-1 if not name else places.get(name, places.get(name.casefold())) for name in wanted]
    what = ""
    if list(class_map) == [IN_ORDER]:
        what = f"--class-map order needs as many classes, the model has {len(own)} and the data {len(names)}"
    elif other := [entry for entry in class_map if "=" not in entry]:
        what = f"--class-map must be DATA=MODEL, DATA=, or {IN_ORDER} alone, got {', '.join(other)}"
    elif unknown := [name for name in given if name not in names]:
        what = f"--class-map: {', '.join(unknown)} is no class of the data"
    elif wrong := [f"{name}={given[name]}" for name in given if found[list(names).index(name)] is None]:
        what = f"--class-map {', '.join(wrong)}: {wrong[0].partition('=')[2]} is no class of the model"
    elif strict and (missing := [name for name, place in zip(names, found, strict=True) if place is None]):
        what = f"the model has no class {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}"
    if what:
        number = ", or --class-map order to take them by number" if len(own) == len(names) else ""
        raise ValueError(
            f"{what}. Classes of the model: {', '.join(own)}. Classes of the data: {', '.join(names)}. Give "
            f"--class-map DATA=MODEL for each other name, DATA= for a class that does not count{number}"
        )
    return [-1 if place is None else place for place in found]


@dataclass(frozen=True)
class Matched:
    """A data set whose labels are a model's classes."""

    dataset: SegmentationDataset
    class_names: tuple[str, ...]
    palette: tuple[Color, ...]
    table: np.ndarray
    """``(256,)`` int32: the model's class of each class of the data, or -1."""
    absent: frozenset[int]
    """Classes of the model that no class of the data is: they are in no mean of scores."""
    ignore_index: int = -1

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return self.dataset.name(index)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Read image and labels, see ``SegmentationDataset.read``."""
        image, labels = self.dataset.read(index)
        return image, self.table[labels]


def match_classes(
    config: SegmenterConfig, dataset: SegmentationDataset, class_map: Sequence[str] = ()
) -> SegmentationDataset:
    """Return the data set with the classes of a model; itself where they agree, or where the model has no names.

    Raises:
        ValueError: as ``match_names``.
    """
    own, names = config.class_names, dataset.class_names
    if not class_map and (not own or own == names):
        return dataset
    own = own or tuple(map(str, range(config.num_classes)))
    places = match_names(own, names, class_map)
    if places == list(range(len(own))):
        return dataset
    table = np.full(256, -1, np.int32)
    table[: len(places)] = places
    absent = frozenset(range(len(own))) - set(places)
    return Matched(dataset, own, config.palette or default_palette(len(own)), table, absent)
