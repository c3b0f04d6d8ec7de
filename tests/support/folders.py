"""Tiny data sets in files, one for each layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 6, 9


def write_pair(image: Path, labels: Path, values: Sequence[int], seed: int = 0) -> None:
    """A random image, and labels in which the values follow one another from the top left, repeated."""
    for path in (image, labels):
        path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(pixels).save(image)
    Image.fromarray(np.resize(np.array(values, np.uint8), (HEIGHT, WIDTH))).save(labels)


def write_ade20k(root: Path, values: Sequence[int] = (0, 1, 21, 150)) -> Path:
    for split in ("training", "validation"):
        for index in (2, 1):
            name = f"ADE_{split[:5]}_{index}"
            write_pair(
                root / "images" / split / f"{name}.jpg", root / "annotations" / split / f"{name}.png", values, index
            )
    return root


def write_cityscapes(root: Path, values: Sequence[int] = (7, 26, 33, 0, 9)) -> Path:
    for split, city in (("train", "aachen"), ("train", "zurich"), ("val", "lindau")):
        stem = f"{city}_000000_000019"
        labels = root / "gtFine" / split / city
        write_pair(
            root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png",
            labels / f"{stem}_gtFine_labelIds.png",
            values,
        )
        Image.new("L", (WIDTH, HEIGHT)).save(labels / f"{stem}_gtFine_instanceIds.png")
    return root


def write_pascal_context(root: Path, values: Sequence[int] = (0, 59, 255)) -> Path:
    lists = root / "ImageSets" / "SegmentationContext"
    lists.mkdir(parents=True)
    for split, names in {"train": ("2008_000002", "2008_000008"), "val": ("2008_000003",)}.items():
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            write_pair(root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClassContext" / f"{name}.png", values)
    write_pair(root / "JPEGImages" / "unlisted.jpg", root / "SegmentationClassContext" / "unlisted.png", values)
    return root


def write_folder(root: Path, values: Sequence[int] = (0, 1, 2, 255), classes: str | None = "sky\nsea\nsand\n") -> Path:
    for split, names in {"train": ("b", "sub/a", "c"), "val": ("d",)}.items():
        for index, name in enumerate(names):
            suffix = (".jpg", ".png")[index % 2]
            write_pair(
                root / "images" / split / f"{name}{suffix}", root / "labels" / split / f"{name}.png", values, index
            )
    if classes is not None:
        (root / "classes.txt").write_text(classes)
    return root
