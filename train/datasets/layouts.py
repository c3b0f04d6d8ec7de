"""Layouts of data sets in folders: where images and labels lie, what label values mean, which classes there are.

Sources: the folders as their publishers and mmsegmentation lay them out, the latter's reduction of labels, and the
train ids of Cityscapes' label table.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...classes import DATASET_CLASSES, ClassList
from ...io.walk import IMAGE_SUFFIXES, Ignored, describe_ignored, files_below, sort_out
from .base import IGNORE, SegmentationDataset
from .class_lists import ReadOptions, color_table, read_classes
from .pairs import INVALID, LABEL_SUFFIXES, Pair, PairedFiles
from .shapes import Shapes

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Layout:
    """A kind of data set; paths are relative to its folder."""

    images: dict[str, str]
    """Folder of the images of each split."""
    labels: dict[str, str]
    first: int = 0
    """Value of the first class in label files; the others follow."""
    values: tuple[int, ...] = ()
    """Values of the classes, where they do not follow each other; all others are ignored."""
    ignored: tuple[int, ...] = (255,)
    image_end: str = ""
    """End of the images' names; empty: any suffix of an image."""
    label_end: str = ".png"
    """End of the label files' names; empty: any of ``LABEL_SUFFIXES``."""
    lists: dict[str, str] | None = None
    """Files that name the samples of each split, one a line; None: all images of the folder."""
    below: tuple[str, ...] = ()
    """Folders inside the given one in which the data set may lie."""

    def root(self, folder: Path) -> Path | None:
        """Return the folder itself or one of ``below``, whichever has this layout."""
        for root in (folder, *(folder / name for name in self.below)):
            if all(any((root / path).is_dir() for path in of.values()) for of in (self.images, self.labels)):
                return root
        return None

    def table(self, num_classes: int, values: tuple[int, ...] = ()) -> np.ndarray:
        """``(256,)`` int16: the class of each value of a label file, ``IGNORE`` or ``INVALID``.

        Args:
            values: of the classes, where the class list names them.
        """
        table = np.full(256, IGNORE if self.values else INVALID, np.int16)
        table[list(self.ignored)] = IGNORE
        table[list(values or self.values or range(self.first, self.first + num_classes))] = np.arange(num_classes)
        return table

    def wanted(self, split: str) -> str:
        """Return the folders of a split for messages."""
        return f"{self.images[split]} and {self.labels[split]}"


LAYOUTS: dict[str, Layout] = {
    "ade20k": Layout(
        {"train": "images/training", "val": "images/validation"},
        {"train": "annotations/training", "val": "annotations/validation"},
        first=1,
        ignored=(0, 255),
        below=("ADEChallengeData2016",),
    ),
    "cityscapes": Layout(
        {"train": "leftImg8bit/train", "val": "leftImg8bit/val"},
        {"train": "gtFine/train", "val": "gtFine/val"},
        # the label ids in the order of the train ids
        values=(7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33),
        image_end="_leftImg8bit.png",
        label_end="_gtFine_labelIds.png",
    ),
    "pascal_context": Layout(
        dict.fromkeys(SPLITS, "JPEGImages"),
        dict.fromkeys(SPLITS, "SegmentationClassContext"),
        image_end=".jpg",
        lists={split: f"ImageSets/SegmentationContext/{split}.txt" for split in SPLITS},
        below=("VOC2010", "VOCdevkit/VOC2010"),
    ),
    "folder": Layout(
        {split: f"images/{split}" for split in SPLITS}, {split: f"labels/{split}" for split in SPLITS}, label_end=""
    ),
}
KINDS = ("auto", *LAYOUTS, "shapes")


def open_dataset(
    data: str | Path, kind: str = "auto", split: str = "train", options: ReadOptions | None = None
) -> SegmentationDataset:
    """Open a split, "train" or "val", of the data set in a folder, or of the procedural one.

    Args:
        data: a folder, or "shapes" or "shapes:SEED" for the procedural data set.
        kind: one of ``KINDS``; "auto" goes by the content of the folder.
        options: for the files of a folder.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: an unknown kind or split, options that the kind does not have, a folder of another layout, a split
            without images, or a class list that is missing or wrong; names what was looked for.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    shapes = re.fullmatch(r"shapes(?::(\d+))?", str(data))
    if kind == "shapes" or (kind == "auto" and shapes and not Path(data).exists()):
        if not shapes:
            raise ValueError(f"the shapes data set is 'shapes' or 'shapes:SEED', such as shapes:7, got {str(data)!r}")
        if options and options != ReadOptions():
            raise ValueError("the shapes data set has no files that a palette, pages or a reduced zero label is for")
        return Shapes.of_split(split, int(shapes[1] or 0))
    folder = Path(data)
    return open_files(folder, kind_of(folder) if kind == "auto" else kind, split, options)


def kind_of(folder: Path) -> str:
    """Return the kind of data set that a folder holds.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: no known layout; names the folders that were looked for.
    """
    _require_folder(folder)
    found = next((kind for kind, layout in LAYOUTS.items() if layout.root(folder)), None)
    if found is None:
        wanted = "; ".join(f"{kind}: {layout.wanted('train')}" for kind, layout in LAYOUTS.items())
        raise ValueError(f"{folder} holds no data set of a known layout. Looked for {wanted}")
    return found


def open_files(folder: Path, kind: str, split: str, options: ReadOptions | None = None) -> PairedFiles:
    """Open a split of a data set in files.

    Raises:
        FileNotFoundError: the folder or the list of the split's samples does not exist.
        ValueError: another layout, no image in the split, or no class list; names what was looked for.
    """
    _require_folder(folder)
    layout, options = LAYOUTS[kind], options or ReadOptions()
    if kind in DATASET_CLASSES and (options.palette or options.reduce_zero_label):
        raise ValueError(f"a palette and a reduced zero label are for the kind folder; {kind} has labels of its own")
    root = layout.root(folder)
    if root is None or not (root / layout.images[split]).is_dir() or not (root / layout.labels[split]).is_dir():
        raise ValueError(f"{folder} has no {split} split of kind {kind}: looked for {layout.wanted(split)}")
    classes = DATASET_CLASSES[kind] if kind in DATASET_CLASSES else read_classes(root, options)
    images, labels, own = root / layout.images[split], root / layout.labels[split], dict[str, Path]()
    ignored: Ignored = {}
    if layout.lists:
        path = root / layout.lists[split]
        if not path.is_file():
            raise FileNotFoundError(f"the list of the {split} split, {path}, does not exist")
        found = [(name, images / (name + layout.image_end)) for name in path.read_text().split()]
    else:
        taken, ignored = sort_out(files_below(images), (layout.image_end,) if layout.image_end else None)
        found = _by_name(taken, images, layout.image_end)
        taken, others = sort_out(files_below(labels), (layout.label_end,) if layout.label_end else LABEL_SUFFIXES)
        own = dict(_by_name(taken, labels, layout.label_end))
        if layout.label_end in ("", ".png"):  # other layouts have files of other kinds there
            ignored |= {f"{reason}, among labels": paths for reason, paths in others.items()}
    end = layout.label_end or LABEL_SUFFIXES[0]
    pairs = tuple(Pair(name, path, own.pop(name, labels / (name + end))) for name, path in found)
    if not pairs:
        ends = layout.image_end or " ".join(IMAGE_SUFFIXES)
        rest = f"; {describe_ignored(ignored)}" if ignored else ""
        raise ValueError(f"the {split} split is empty: no images in {images} that end in {ends}{rest}")
    table, named = value_table(layout, classes), (classes.class_names, classes.palette)
    colors = color_table(classes, table)
    return PairedFiles(*named, pairs, tuple(own.values()), ignored, table, colors=colors, page=options.page)


def value_table(layout: Layout, classes: ClassList) -> np.ndarray:
    """Return the class of each value of label files, see ``Layout.table``."""
    if classes.reduce_zero_label:
        layout = replace(layout, first=1, ignored=(0, IGNORE))
    return layout.table(len(classes.class_names), classes.values)


def _by_name(paths: list[Path], folder: Path, end: str) -> list[tuple[str, Path]]:
    """Sort images by name: their path in the folder without what names end in."""
    by_name: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        relative = path.relative_to(folder).as_posix()
        by_name[relative[: -len(end or path.suffix)]].append(path)
    if shared := next((paths for paths in by_name.values() if len(paths) > 1), None):
        raise ValueError(f"{shared[0]} and {shared[1]} have one name, so that labels cannot be told apart; rename one")
    return [(name, path) for name, (path,) in sorted(by_name.items())]


def _require_folder(folder: Path) -> None:
    if not folder.exists():
        raise FileNotFoundError(f"the data folder {folder} does not exist")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
