"""Class names and palettes, and the ones that a checkpoint gets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import segmenter_fast as sf
from segmenter_fast.classes import DATASET_CLASSES
from segmenter_fast.weights.official import config_from_variant
from segmenter_fast.weights.reading import read_mapping
from support.checkpoints import GOLDEN


@pytest.mark.parametrize(("name", "count"), [("ade20k", 150), ("pascal_context", 60), ("cityscapes", 19)])
def test_every_class_has_a_name_and_a_colour(name: str, count: int) -> None:
    classes = DATASET_CLASSES[name]
    assert len(classes.class_names) == len(set(classes.class_names)) == len(classes.palette) == count
    assert all(label == label.strip() and label for label in classes.class_names)
    assert all(len(color) == 3 and all(0 <= value <= 255 for value in color) for color in classes.palette)


@pytest.mark.parametrize(
    ("name", "index", "label", "color"),
    [
        ("ade20k", 0, "wall", (120, 120, 120)),
        ("ade20k", 20, "car", (0, 102, 200)),
        ("ade20k", 56, "pool table", (255, 71, 0)),
        ("ade20k", 100, "poster", (143, 255, 0)),
        ("ade20k", 149, "flag", (92, 0, 255)),
        ("pascal_context", 0, "background", (120, 120, 120)),
        ("pascal_context", 47, "sky", (0, 163, 255)),
        ("pascal_context", 59, "wood", (31, 0, 255)),
        ("cityscapes", 0, "road", (128, 64, 128)),
        ("cityscapes", 13, "car", (0, 0, 142)),
        ("cityscapes", 18, "bicycle", (119, 11, 32)),
    ],
)
def test_classes_are_their_publishers(name: str, index: int, label: str, color: tuple[int, int, int]) -> None:
    classes = DATASET_CLASSES[name]
    assert (classes.class_names[index], classes.palette[index]) == (label, color)


def config_trained_on(dataset: object, count: int) -> sf.SegmenterConfig:
    """The configuration of an official checkpoint that names its data set."""
    variant = read_mapping(GOLDEN / "official_mask" / "variant.yml")
    variant["net_kwargs"]["n_cls"] = count
    variant["dataset_kwargs"] = dataset
    return config_from_variant(variant, {})


@pytest.mark.parametrize("name", DATASET_CLASSES)
def test_an_official_checkpoint_has_the_classes_of_its_data_set(name: str) -> None:
    classes = DATASET_CLASSES[name]
    config = config_trained_on({"dataset": name}, len(classes.class_names))
    assert (config.class_names, config.palette) == (classes.class_names, classes.palette)


@pytest.mark.parametrize(
    ("dataset", "count"),
    [
        ({"dataset": "cityscapes"}, 20),
        ({"dataset": "imagenet"}, 1000),
        ({"dataset": None}, 150),
        ({"dataset": ["ade20k"]}, 150),
        ("nothing", 19),
    ],
)
def test_classes_of_another_count_or_data_set_are_not_assigned(dataset: object, count: int) -> None:
    config = config_trained_on(dataset, count)
    assert (config.class_names, config.palette) == ((), ())


def test_a_checkpoints_own_classes_come_first(tmp_path: Path) -> None:
    content = torch.load(GOLDEN / "mmseg_linear" / "segmenter.pth", weights_only=True)
    own = sf.load(GOLDEN / "mmseg_linear" / "segmenter.pth").config
    assert own.class_names
    count = own.num_classes
    meta = {
        "dataset_meta": {"classes": [f"mine {i}" for i in range(count)], "palette": [[i, 0, 0] for i in range(count)]}
    }
    torch.save({**content, "meta": meta}, tmp_path / "mine.pth")
    assert sf.load(tmp_path / "mine.pth").config.class_names[0] == "mine 0"
    assert sf.load(tmp_path / "mine.pth").config.palette[2] == (2, 0, 0)
