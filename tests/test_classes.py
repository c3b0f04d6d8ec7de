"""Class names and palettes, and where a checkpoint gets them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import segmenter_fast as sf
from segmenter_fast.classes import DATASETS, classes_of
from segmenter_fast.weights.official import config_from_variant
from segmenter_fast.weights.reading import read_yaml
from support.checkpoints import GOLDEN


@pytest.mark.parametrize(("name", "count"), [("ade20k", 150), ("pascal_context", 60), ("cityscapes", 19)])
def test_every_class_has_a_name_and_a_colour(name: str, count: int) -> None:
    dataset = DATASETS[name]
    assert len(dataset.class_names) == len(set(dataset.class_names)) == len(dataset.palette) == count
    assert all(label == label.strip() and label for label in dataset.class_names)
    assert all(len(color) == 3 and all(0 <= value <= 255 for value in color) for color in dataset.palette)


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
def test_classes_as_they_are_known(name: str, index: int, label: str, color: tuple[int, int, int]) -> None:
    dataset = DATASETS[name]
    assert (dataset.class_names[index], dataset.palette[index]) == (label, color)


def test_names_of_another_count_or_data_set_are_not_assigned() -> None:
    assert classes_of("cityscapes", 19)["class_names"][0] == "road"
    for name, count in (("cityscapes", 20), ("imagenet", 1000), (None, 150), (["ade20k"], 150)):
        assert classes_of(name, count) == {}


@pytest.mark.parametrize("name", DATASETS)
def test_an_official_checkpoint_that_says_its_data_set_has_its_classes(name: str) -> None:
    variant, dataset = read_yaml(GOLDEN / "official_mask" / "variant.yml"), DATASETS[name]
    variant["net_kwargs"]["n_cls"] = len(dataset.class_names)
    variant["dataset_kwargs"]["dataset"] = name
    config = config_from_variant(variant, {})
    assert (config.class_names, config.palette) == (dataset.class_names, dataset.palette)
    variant["dataset_kwargs"] = "nothing"
    assert config_from_variant(variant, {}).class_names == ()


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
