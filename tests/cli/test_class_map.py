"""Classes of models and data are matched by name, in ``evaluate`` and in ``train --pretrained``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import segmenter_fast as sf
from segmenter_fast.train import datasets
from segmenter_fast.train.datasets.matching import match_names
from segmenter_fast.train.engine import train
from support.models import pixels, windowed
from support.predict import call
from support.training import RECIPE, Squares, small_model

NAMES = ("sky", "sea", "sand", "rock", "tree")


@pytest.fixture
def model(tmp_path: Path) -> str:
    torch.manual_seed(0)
    windowed(class_names=NAMES).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def data_of(model: str, root: Path, names: tuple[str, ...], order: tuple[int, ...]) -> Path:
    """A data set whose labels are the model's own, with class ``order[i]`` written as i."""
    for kind in ("images", "labels"):
        (root / kind / "val").mkdir(parents=True)
    image = pixels(32, 32)
    Image.fromarray(image).save(root / "images/val/x.png")
    found = sf.predict(sf.load(model), image).labels
    assert len(np.unique(found)) > 1
    written = np.zeros(256, np.uint8)
    written[list(order)] = np.arange(len(order))
    Image.fromarray(written[found]).save(root / "labels/val/x.png")
    (root / "classes.txt").write_text("\n".join(names))
    return root


def miou(model: str, data: Path, out: Path, *options: object) -> float:
    result = call("evaluate", model, "--data", data, "--device", "cpu", "--dtype", "float32", "--json", out, *options)
    assert result.exit_code == 0, result.output
    content = json.loads(out.read_text())
    assert content["classes"] == list(NAMES) or "order" in options
    return content["miou"]


def test_another_order_of_the_names_changes_no_score(model: str, tmp_path: Path) -> None:
    order = (3, 1, 4, 0, 2)
    data = data_of(model, tmp_path / "data", tuple(NAMES[i] for i in order), order)
    assert miou(model, data, tmp_path / "x.json") == 1.0
    assert miou(model, data, tmp_path / "x.json", "--class-map", "order") < 0.5


def test_other_names_need_a_map(model: str, tmp_path: Path) -> None:
    names = ("rock", "water", "Tree", "sky", "beach")
    data = data_of(model, tmp_path / "data", names, (3, 1, 4, 0, 2))
    refused = call("evaluate", model, "--data", data, "--device", "cpu")
    assert refused.exit_code == 2
    assert "the model has no class water, beach. Classes of the model: sky, sea, sand, rock, tree" in refused.stderr
    assert "Classes of the data: rock, water, Tree, sky, beach" in refused.stderr
    mapped = ("--class-map", "water=sea", "--class-map", "beach=sand")
    assert miou(model, data, tmp_path / "x.json", *mapped) == 1.0
    assert miou(model, data, tmp_path / "x.json", *mapped[:2], "--class-map", "beach=") == 1.0
    unknown = call("evaluate", model, "--data", data, "--device", "cpu", "--class-map", "lake=sea")
    assert "--class-map: lake is no class of the data" in unknown.stderr


def test_fewer_classes_of_the_data_are_found_among_the_model_s() -> None:
    assert match_names(NAMES, ("tree", "SKY")) == [4, 0]
    assert match_names(NAMES, ("x", "sky"), ["x="]) == [-1, 0]
    assert match_names(NAMES, ("x", "sky"), strict=False) == [-1, 0]


@pytest.mark.parametrize(
    ("class_map", "message"),
    [
        (["order"], "--class-map order needs as many classes, the model has 5 and the data 2"),
        (["x=zzz"], "--class-map x=zzz: zzz is no class of the model"),
        (["zzz=sky"], "--class-map: zzz is no class of the data"),
        (["order", "x=sea"], "--class-map must be DATA=MODEL, DATA=, or order alone, got order"),
        ([], "the model has no class x"),
    ],
)
def test_a_wrong_map_names_the_wrong_side(class_map: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}\\. Classes of the model: sky, sea, sand, rock, tree") as raised:
        match_names(NAMES, ("x", "sky"), class_map)
    assert "to take them by number" not in str(raised.value)  # impossible
    with pytest.raises(ValueError, match=r"or --class-map order to take them by number$"):
        match_names(NAMES[:2], ("x", "sky"))


def test_a_class_that_no_class_of_the_data_is_counts_in_no_mean(model: str, tmp_path: Path) -> None:
    data = data_of(model, tmp_path / "data", NAMES, (0, 1, 2, 3, 4))
    found = np.unique(np.asarray(Image.open(data / "labels/val/x.png")))
    first = int(found[0])
    (data / "classes.txt").write_text("\n".join(name for name in NAMES if name != NAMES[first]) + "\nlake")
    table = np.full(256, 255, np.uint8)  # the pixels of one class are not labelled, but the model finds it there
    table[[index for index in range(5) if index != first]] = range(4)
    labels = np.asarray(Image.open(data / "labels/val/x.png"))
    table[first] = table[found[1]]  # some are labelled as another class: wrong, but no class of IoU 0
    Image.fromarray(table[labels]).save(data / "labels/val/x.png")
    options = (
        "evaluate",
        model,
        "--data",
        data,
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--json",
        tmp_path / "x.json",
    )
    result = call(*options, "--class-map", "lake=")
    assert f"not in the means, as no class of the data is mapped to them: {NAMES[first]}\n" in result.output
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["iou"][first] is None
    known = [iou for iou in content["iou"] if iou is not None]
    assert len(known) == len(found) - 1
    assert content["miou"] == pytest.approx(sum(known) / len(known))
    right, wrong = (labels == found[1]).sum(), (labels == first).sum()
    assert content["iou"][found[1]] == pytest.approx(right / (right + wrong))


def test_pretrained_classes_follow_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = {"num_heads": 3, "decoder_num_heads": 3}
    start = small_model(
        class_names=("square", "ground"), patch_size=16, embed_dim=192, depth=12, decoder_depth=2, **heads
    )
    start.save_pretrained(tmp_path / "start")
    monkeypatch.setattr(datasets, "open_dataset", lambda *_: Squares())

    def classes(name: str, *options: str, message: str = "") -> torch.Tensor:
        given = ["--data", "x", "--preset", "folder", "--out", tmp_path / name, "--pretrained", tmp_path / "start"]
        sizes = [part for size in ("crop", "resize", "window", "stride") for part in (f"--{size}", 32)]
        few = ["--steps", 1, "--batch-size", 2, "--workers", 0, "--pictures", 0, "--lr", 1e-9, "--min-lr", 0]
        result = call("train", *given, *sizes, *few, "--weight-decay", 0, "--precision", "float32", *options)
        assert result.exit_code == 0, result.output
        assert message in result.stderr
        return sf.load(tmp_path / name / "last").decoder.cls_emb.detach()

    before = start.decoder.cls_emb.detach()
    mapped = classes("mapped", "--class-map", "ground=square", "--class-map", "square=", "--seed", "5")
    assert torch.allclose(mapped[:, 0], before[:, 0], atol=1e-6)
    assert not torch.allclose(mapped[:, 1], before[:, 1], atol=1e-3)
    assert torch.allclose(classes("named"), before[:, [1, 0]], atol=1e-6)
    assert torch.allclose(classes("order", "--class-map", "order"), before, atol=1e-6)
    new = classes("new", "--new-classes", "--seed", "5")
    assert not torch.allclose(new, before, atol=1e-3)
    assert not torch.allclose(new, before[:, [1, 0]], atol=1e-3)
    config: Any = replace(start.config, num_classes=3, class_names=("sky", "square", "floor"))
    more = sf.create_model(config)
    more.save_pretrained(tmp_path / "start")
    mapped = classes("more", "--class-map", "ground=floor")
    assert torch.allclose(mapped, more.decoder.cls_emb.detach()[:, [2, 1]], atol=1e-6)
    kept = classes("kept", "--class-map", "ground=", message="weights of ground; the other 1 keep their weights")
    assert torch.allclose(kept[:, 1], more.decoder.cls_emb.detach()[:, 1], atol=1e-6)
    config = replace(start.config, class_names=("square", "floor"))
    sf.create_model(config).save_pretrained(tmp_path / "start")
    refused = call("train", "--data", "x", "--preset", "folder", "--out", "y", "--pretrained", tmp_path / "start")
    assert refused.exit_code == 2
    assert "the model has no class ground" in refused.stderr
    assert "--new-classes" in refused.stderr


def test_train_refuses_a_model_of_other_names(tmp_path: Path) -> None:
    model = small_model(class_names=("square", "ground"))
    with pytest.raises(ValueError, match="has the classes square, ground; the training data has ground, square"):
        train(model, Squares(), None, RECIPE, tmp_path, device="cpu")
