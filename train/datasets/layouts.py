"""Where each kind of data set keeps its images and labels, and what the values of its label files mean.

Sources: the folders as their publishers and mmsegmentation lay them out, the latter's reduction of labels, and the
train ids of Cityscapes' label table.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...classes import DATASET_CLASSES
from ...inference.folders import IMAGE_SUFFIXES
from .base import IGNORE
from .classes import read_classes
from .pairs import INVALID, Pair, PairedFiles

SPLITS = ("train", "val")
# The label ids of Cityscapes' 19 classes, in the order of their train ids.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


@dataclass(frozen=True)
class Layout:
    """A kind of data set; paths are below its folder, with the split's name in them."""

    images: dict[str, str]
    """Folder of the images of each split."""
    labels: dict[str, str]
    table: Callable[[int], np.ndarray]
    """From the number of classes to the classes of the values 0 to 255."""
    image_end: str = ""
    """What the names of images end in; empty: any suffix of an image."""
    label_end: str = ".png"
    lists: dict[str, str] | None = None
    """Files that name the samples of each split, one a line; None: all images of the folder."""
    below: tuple[str, ...] = ()
    """Where the data set may lie inside the folder that is given."""

    def root(self, folder: Path) -> Path | None:
        """The folder itself or one of ``below``, whichever has this layout."""
        for root in (folder, *(folder / name for name in self.below)):
            if any((root / path).is_dir() for path in self.images.values()) and any(
                (root / path).is_dir() for path in self.labels.values()
            ):
                return root
        return None


def _shifted(num_classes: int) -> np.ndarray:
    """1 to K are the classes, 0 and 255 are ignored."""
    table = np.full(256, INVALID, np.int16)
    table[1 : num_classes + 1] = np.arange(num_classes)
    table[[0, 255]] = IGNORE
    return table


def _plain(num_classes: int) -> np.ndarray:
    """0 to K - 1 are the classes, 255 is ignored."""
    table = np.full(256, INVALID, np.int16)
    table[:num_classes] = np.arange(num_classes)
    table[255] = IGNORE
    return table


def _cityscapes(num_classes: int) -> np.ndarray:
    """All but the label ids of the classes is ignored."""
    table = np.full(256, IGNORE, np.int16)
    table[list(_CITYSCAPES_IDS)] = np.arange(num_classes)
    return table


LAYOUTS: dict[str, Layout] = {
    "ade20k": Layout(
        {"train": "images/training", "val": "images/validation"},
        {"train": "annotations/training", "val": "annotations/validation"},
        _shifted,
        below=("ADEChallengeData2016",),
    ),
    "cityscapes": Layout(
        {"train": "leftImg8bit/train", "val": "leftImg8bit/val"},
        {"train": "gtFine/train", "val": "gtFine/val"},
        _cityscapes,
        image_end="_leftImg8bit.png",
        label_end="_gtFine_labelIds.png",
    ),
    "pascal_context": Layout(
        dict.fromkeys(SPLITS, "JPEGImages"),
        dict.fromkeys(SPLITS, "SegmentationClassContext"),
        _plain,
        image_end=".jpg",
        lists={split: f"ImageSets/SegmentationContext/{split}.txt" for split in SPLITS},
        below=("VOC2010", "VOCdevkit/VOC2010"),
    ),
    "folder": Layout(
        {split: f"images/{split}" for split in SPLITS}, {split: f"labels/{split}" for split in SPLITS}, _plain
    ),
}


def kind_of(folder: Path) -> str:
    """Which layout a folder has.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: none; says what was looked for.
    """
    _require_folder(folder)
    found = next((kind for kind, layout in LAYOUTS.items() if layout.root(folder)), None)
    if found is None:
        wanted = "; ".join(f"{kind}: {_wanted(layout, 'train')}" for kind, layout in LAYOUTS.items())
        raise ValueError(f"{folder} holds no data set of a known layout. Looked for {wanted}")
    return found


def open_files(folder: Path, kind: str, split: str) -> PairedFiles:
    """A split of a data set in files.

    Raises:
        FileNotFoundError: the folder or the list of the split's samples does not exist.
        ValueError: another layout, no image in the split, or no class list; says what was looked for.
    """
    _require_folder(folder)
    layout = LAYOUTS[kind]
    root = layout.root(folder)
    if root is None or not (root / layout.images[split]).is_dir() or not (root / layout.labels[split]).is_dir():
        raise ValueError(f"{folder} has no {split} split of kind {kind}: looked for {_wanted(layout, split)}")
    classes = DATASET_CLASSES[kind] if kind in DATASET_CLASSES else read_classes(root)
    pairs, strays = _listed(layout, root, split) if layout.lists else _scanned(layout, root, split)
    if not pairs:
        ends = layout.image_end or " ".join(IMAGE_SUFFIXES)
        raise ValueError(f"the {split} split is empty: no images in {root / layout.images[split]} that end in {ends}")
    table = layout.table(len(classes.class_names))
    return PairedFiles(classes.class_names, classes.palette, pairs, strays, table)


def _listed(layout: Layout, root: Path, split: str) -> tuple[tuple[Pair, ...], tuple[Path, ...]]:
    assert layout.lists is not None
    path = root / layout.lists[split]
    if not path.is_file():
        raise FileNotFoundError(f"the list of the {split} split, {path}, does not exist")
    images, labels = root / layout.images[split], root / layout.labels[split]
    names = path.read_text().split()
    return tuple(
        Pair(name, images / (name + layout.image_end), labels / (name + layout.label_end)) for name in names
    ), ()


def _scanned(layout: Layout, root: Path, split: str) -> tuple[tuple[Pair, ...], tuple[Path, ...]]:
    images, labels = root / layout.images[split], root / layout.labels[split]
    by_name: dict[str, list[Path]] = defaultdict(list)
    for path in _files(images, layout.image_end or IMAGE_SUFFIXES):
        relative = path.relative_to(images).as_posix()
        by_name[relative[: -len(layout.image_end or path.suffix)]].append(path)
    if shared := next((paths for paths in by_name.values() if len(paths) > 1), None):
        raise ValueError(f"{shared[0]} and {shared[1]} have one name, so that labels cannot be told apart; rename one")
    pairs = tuple(Pair(name, paths[0], labels / (name + layout.label_end)) for name, paths in sorted(by_name.items()))
    known = {pair.labels for pair in pairs}
    return pairs, tuple(path for path in _files(labels, layout.label_end) if path not in known)


def _files(folder: Path, ends: str | tuple[str, ...]) -> Iterator[Path]:
    """All files below a folder whose names end so, in whatever case, without hidden ones."""
    wanted = (ends,) if isinstance(ends, str) else ends
    lower = tuple(end.lower() for end in wanted)
    for path in sorted(folder.rglob("*")):
        if path.name.lower().endswith(lower) and not path.name.startswith(".") and path.is_file():
            yield path


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the data folder {folder} does not exist" if not folder.exists() else f"{folder} is no folder"
        )


def _wanted(layout: Layout, split: str) -> str:
    return f"{layout.images[split]} and {layout.labels[split]}"
