"""Writes a small data set in a folder: something to try a training on, and an example of the layout."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ...classes import ClassList
from ...io.atomic import atomic_path
from ...visualize import label_image
from .classes import write_classes
from .layouts import SPLITS
from .shapes import Shapes


def make_folder(folder: Path, images: int, size: int = 128, seed: int = 0) -> dict[str, int]:
    """The first scenes of ``shapes`` as ``images/`` and ``labels/``, with ``classes.json``, in ``folder``.

    A fifth of ``images``, at least one, are for validation. The folder appears when it is complete.

    Returns:
        How many images each split has.

    Raises:
        ValueError: fewer than 2 images, or a size or a seed outside the range of ``Shapes``.
        FileExistsError: the folder is there and not empty.
        OSError: it cannot be written.
    """
    if images < 2:
        raise ValueError(f"at least 2 images are needed, one to train on and one to validate with, got {images}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there and not empty; name a new folder")
    held_out = max(1, images // 5)
    counts = dict(zip(SPLITS, (images - held_out, held_out), strict=True))
    scenes = {split: Shapes.of_split(split, seed, size) for split in SPLITS}
    with atomic_path(folder) as temporary:
        for split, count in counts.items():
            for kind in ("images", "labels"):
                (temporary / kind / split).mkdir(parents=True)
            for index in range(count):
                pixels, labels = scenes[split].read(index)
                name = f"{scenes[split].name(index)}.png"
                Image.fromarray(pixels).save(temporary / "images" / split / name)
                label_image(labels, scenes[split].palette).save(temporary / "labels" / split / name)
        write_classes(temporary, ClassList(scenes["train"].class_names, scenes["train"].palette))
    return counts
