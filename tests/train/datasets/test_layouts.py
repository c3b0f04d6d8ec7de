"""Every layout on small folders: which files belong together, what values become, and every way to be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from segmenter_fast.classes import DATASET_CLASSES
from segmenter_fast.io.label_tiff import write_label_tiff
from segmenter_fast.train.datasets import SampleError, open_dataset
from segmenter_fast.train.datasets.layouts import read_classes
from segmenter_fast.visualize import default_palette
from support.folders import HEIGHT, WIDTH, write_ade20k, write_cityscapes, write_folder, write_pascal_context

WRITERS: dict[str, Callable[[Path], Path]] = {
    "ade20k": write_ade20k,
    "cityscapes": write_cityscapes,
    "pascal_context": write_pascal_context,
    "folder": write_folder,
}
NAMES = {
    "ade20k": (["ADE_train_1", "ADE_train_2"], ["ADE_valid_1", "ADE_valid_2"]),
    "cityscapes": (["aachen/aachen_000000_000019", "zurich/zurich_000000_000019"], ["lindau/lindau_000000_000019"]),
    "pascal_context": (["2008_000002", "2008_000008"], ["2008_000003"]),
    "folder": (["b", "c", "sub/a"], ["d"]),
}
# Classes that the written values become.
BECOME = {
    "ade20k": [255, 0, 20, 149],
    "cityscapes": [0, 13, 18, 255, 255],
    "pascal_context": [0, 59, 255],
    "folder": [0, 1, 2, 255],
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("asked", ["auto", "named"])
def test_layout(kind: str, asked: str, tmp_path: Path) -> None:
    root = WRITERS[kind](tmp_path)
    for split, names in zip(("train", "val"), NAMES[kind], strict=True):
        dataset = open_dataset(root, kind if asked == "named" else "auto", split)
        assert [dataset.name(index) for index in range(len(dataset))] == names
        assert dataset.ignore_index == 255
        image, labels = dataset.read(0)
        assert (image.shape, image.dtype) == ((HEIGHT, WIDTH, 3), np.uint8)
        assert labels.dtype == np.uint8
        assert np.array_equal(labels, np.resize(BECOME[kind], (HEIGHT, WIDTH)))
        if kind in DATASET_CLASSES:
            wanted = DATASET_CLASSES[kind]
            assert (dataset.class_names, dataset.palette) == (wanted.class_names, wanted.palette)


@pytest.mark.parametrize(
    ("kind", "below"),
    [("ade20k", "ADEChallengeData2016"), ("pascal_context", "VOC2010"), ("pascal_context", "VOCdevkit/VOC2010")],
)
def test_a_folder_above_is_taken_too(kind: str, below: str, tmp_path: Path) -> None:
    WRITERS[kind](tmp_path / below)
    assert len(open_dataset(tmp_path, "auto", "train")) == 2


def test_the_image_is_that_of_the_file(tmp_path: Path) -> None:
    dataset = open_dataset(write_folder(tmp_path), "folder", "train")
    expected = np.asarray(Image.open(tmp_path / "images" / "train" / "sub" / "a.png"))
    assert np.array_equal(dataset.read(2)[0], expected) or np.array_equal(dataset.read(1)[0], expected)


def test_shapes_need_no_folder() -> None:
    train, val = open_dataset("shapes", "auto", "train"), open_dataset("shapes:3", "shapes", "val")
    assert train.class_names == val.class_names
    assert train.name(0) != open_dataset("shapes:3", "auto", "train").name(0)
    with pytest.raises(ValueError, match=r"'shapes' or 'shapes:SEED', such as shapes:7, got 'here'"):
        open_dataset("here", "shapes", "train")


@pytest.mark.parametrize("mode", ["P", "I;16"])
def test_modes_of_label_files(mode: str, tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    path = root / "labels" / "train" / "b.png"
    values = np.resize([0, 1, 2, 255], (HEIGHT, WIDTH))
    if mode == "P":
        image = Image.fromarray(values.astype(np.uint8))
        image.putpalette([17] * 768)
    else:
        image = Image.fromarray(values.astype(np.uint16))
    image.save(path)
    assert np.array_equal(open_dataset(root, "auto", "train").read(0)[1], values)


@pytest.mark.parametrize("kind", ["grey", "palette", "wide", "big endian"])
def test_labels_may_be_tiff(kind: str, tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    values = np.resize(np.array([2, 1, 0, 255], np.uint8), (HEIGHT, WIDTH))
    path = root / "labels/train/sub/a.tif"
    path.with_suffix(".png").unlink()
    options: dict[str, object] = {"tile": (16, 16), "compression": "zlib", "photometric": "minisblack"}
    options["extratags"] = [(33922, 12, 6, (0.0,) * 6, True)]  # a tie point
    if kind == "palette":
        write_label_tiff(path, [values], values.shape, default_palette(256), ["x"] * 256)
    else:
        order = ">" if kind == "big endian" else "<"
        tifffile.imwrite(path, values.astype("u1" if kind == "grey" else "u2"), byteorder=order, **options)
    dataset = open_dataset(root)
    assert np.array_equal(dataset.read(2)[1], values)
    assert not dataset.strays
    tifffile.imwrite(path, values, photometric="miniswhite")
    with pytest.raises(SampleError, match="have 0 as white, of which Pillow makes other values"):
        dataset.read(2)
    Image.fromarray(values).save(path.with_suffix(".png"))
    with pytest.raises(ValueError, match=r"sub/a\.png and .*sub/a\.tif have one name"):
        open_dataset(root)


def test_two_classes_may_be_a_bitmap(tmp_path: Path) -> None:
    root = write_folder(tmp_path, values=(0, 1), classes="no\nyes\n")
    values = np.resize([False, True], (HEIGHT, WIDTH))
    Image.fromarray(values).save(root / "labels" / "train" / "b.png")
    assert np.array_equal(open_dataset(root, "auto", "train").read(0)[1], values)


def damage_image(root: Path) -> None:
    path = root / "images" / "train" / "b.jpg"
    path.write_bytes(path.read_bytes()[:150])


def damage_labels(root: Path) -> None:
    (root / "labels" / "train" / "b.png").write_bytes(b"no PNG at all")


def cut_labels(root: Path) -> None:
    path = root / "labels" / "train" / "b.png"
    path.write_bytes(path.read_bytes()[:60])


def remove_labels(root: Path) -> None:
    (root / "labels" / "train" / "b.png").unlink()


def color_labels(root: Path) -> None:
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "labels" / "train" / "b.png")


def shrink_labels(root: Path) -> None:
    Image.new("L", (WIDTH - 1, HEIGHT)).save(root / "labels" / "train" / "b.png")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_image, r"image .*images/train/b\.jpg cannot be read"),
        (damage_labels, r"labels .*labels/train/b\.png cannot be read"),
        (cut_labels, r"labels .*labels/train/b\.png cannot be read"),
        (remove_labels, r"labels .*labels/train/b\.png do not exist"),
        (color_labels, r"labels .*b\.png have mode RGB; one class index for each pixel is needed"),
        (shrink_labels, r"image .*b\.jpg is 9 x 6 pixels, its labels .*b\.png are 8 x 6"),
    ],
)
def test_what_is_wrong_with_a_sample_names_the_file(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    root = write_folder(tmp_path)
    damage(root)
    dataset = open_dataset(root, "folder", "train")
    with pytest.raises(SampleError, match=message):
        dataset.read(0)
    dataset.read(1)


def test_an_image_that_vanished_is_a_broken_sample(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    dataset = open_dataset(root, "folder", "train")
    (root / "images" / "train" / "b.jpg").unlink()
    with pytest.raises(SampleError, match=r"image .*b\.jpg does not exist"):
        dataset.read(0)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("ade20k", (1, 151), r"hold 151, but classes are 1 to 150, and ignored is 0, 255"),
        ("pascal_context", (60, 61, 0), r"hold 60, 61, but classes are 0 to 59, and ignored is 255"),
        ("folder", (3, 4, 5, 6, 7, 8, 0), r"hold 3, 4, 5, 6, 7 and 1 more, but classes are 0 to 2"),
    ],
)
def test_a_value_outside_the_classes_is_no_broken_sample(
    kind: str, values: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    root = WRITERS[kind](tmp_path, values)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=message):
        open_dataset(root, kind, "train").read(0)


def test_16_bit_values_outside_the_classes(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    Image.fromarray(np.full((HEIGHT, WIDTH), 40000, np.uint16)).save(root / "labels" / "train" / "b.png")
    with pytest.raises(ValueError, match="hold 40000, but classes are 0 to 2"):
        open_dataset(root, "folder", "train").read(0)


def test_a_missing_folder(tmp_path: Path) -> None:
    for kind in ("auto", "ade20k"):
        with pytest.raises(FileNotFoundError, match=r"the data folder .*nowhere does not exist"):
            open_dataset(tmp_path / "nowhere", kind, "train")
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="file is no folder"):
        open_dataset(tmp_path / "file", "auto", "train")


def test_a_wrong_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no data set of a known layout.*ade20k: images/training and annotations/tr"):
        open_dataset(tmp_path, "auto", "train")
    write_ade20k(tmp_path)
    with pytest.raises(ValueError, match=r"no train split of kind cityscapes: looked for leftImg8bit/train and gtFine"):
        open_dataset(tmp_path, "cityscapes", "train")


def test_an_empty_split(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    shutil.rmtree(root / "images" / "val")
    with pytest.raises(ValueError, match="no val split of kind folder: looked for images/val and labels/val"):
        open_dataset(root, "folder", "val")
    (root / "images" / "val").mkdir()
    with pytest.raises(ValueError, match=r"the val split is empty: no images in .*images/val that end in \.jpg"):
        open_dataset(root, "folder", "val")


def test_a_missing_list(tmp_path: Path) -> None:
    root = write_pascal_context(tmp_path)
    (root / "ImageSets" / "SegmentationContext" / "val.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"the list of the val split, .*val\.txt, does not exist"):
        open_dataset(root, "auto", "val")


def test_two_images_of_one_name(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    Image.new("RGB", (4, 4)).save(root / "images" / "train" / "b.png")
    with pytest.raises(ValueError, match=r"b\.jpg and .*b\.png have one name"):
        open_dataset(root, "auto", "train")


def test_unknown_kinds_and_splits(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"kind must be one of auto, ade20k, cityscapes.*, got 'coco'"):
        open_dataset(tmp_path, "coco", "train")
    with pytest.raises(ValueError, match="split must be one of train, val, got 'test'"):
        open_dataset(tmp_path, "auto", "test")


def test_class_lists(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("\ufeff sky \n\nsea\n", encoding="utf-8")
    assert read_classes(tmp_path).class_names == ("sky", "sea")
    assert read_classes(tmp_path).palette == default_palette(2)
    (tmp_path / "classes.json").write_text('["a", "b", "c"]')
    with pytest.raises(ValueError, match=r"two class lists, classes\.json and classes\.txt: keep the one that holds"):
        read_classes(tmp_path)
    (tmp_path / "classes.txt").unlink()
    assert read_classes(tmp_path).class_names == ("a", "b", "c")
    (tmp_path / "classes.json").write_text('{"classes": ["a", "b"], "palette": [[1, 2, 3], [4, 5, 6]]}')
    assert read_classes(tmp_path).palette == ((1, 2, 3), (4, 5, 6))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ('{"names": []}', "must hold a list of class names"),
        ("[1, 2]", "must hold a list of class names"),
        ("[]", r"must hold 1 to 255 classes \(255 is the ignored label\), got 0"),
        (json.dumps([str(i) for i in range(256)]), "must hold 1 to 255 classes .*, got 256"),
        ('["a", "b", "a"]', "names a more than once"),
        ('{"classes": ["a"], "palette": [[1, 2, 300]]}', r"palette must be a list of 1 colours \[r, g, b\]"),
        ('{"classes": ["a"], "palette": []}', "palette must be a list of 1 colours"),
    ],
)
def test_class_lists_that_say_something_else(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(ValueError, match=rf"classes\.json.*{message}"):
        read_classes(tmp_path)


def test_a_folder_without_a_class_list(tmp_path: Path) -> None:
    root = write_folder(tmp_path, classes=None)
    with pytest.raises(ValueError, match=r"has no class list: write the names, one a line, into .*classes\.txt"):
        open_dataset(root, "folder", "train")
    (root / "classes.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"classes\.txt is not UTF-8 text"):
        open_dataset(root, "folder", "train")
