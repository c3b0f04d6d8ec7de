"""``segmenter-fast evaluate`` as users run it: figures, files, messages, one process and two."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import segmenter_fast as sf
from segmenter_fast.cli import app
from segmenter_fast.cli.evaluate import _resize
from segmenter_fast.inference.settings import Settings
from segmenter_fast.train.datasets import open_dataset
from segmenter_fast.train.evaluation import MULTISCALE
from segmenter_fast.train.evaluation import evaluate as scores_of

MODEL = str(Path(__file__).parents[1] / "golden/official_mask")  # 7 classes, windows of 64
WINDOWS = (64, 48)
CLASSES = tuple("abcdefg")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images with labels of the seven classes; the sixth occurs in no label."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for index, (height, width) in enumerate(((70, 90), (64, 64), (100, 66))):
        for kind, ending in (("images", "jpg"), ("labels", "png")):
            (root / kind / "val").mkdir(parents=True, exist_ok=True)
            coarse = generator.integers(0, 256, (5, 5, 3)) if kind == "images" else generator.integers(0, 5, (5, 5))
            grown = Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
            grown.save(root / kind / "val" / f"scene-{index}.{ending}")
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


def evaluate(*arguments: object) -> Result:
    options = [str(argument) for argument in arguments]
    return CliRunner().invoke(app, ["evaluate", MODEL, "--device", "cpu", "--dtype", "float32", *options])


def test_the_table_and_the_file_hold_the_scores(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new/scores.json"
    result = evaluate("--data", folder, "--json", out)
    assert result.exit_code == 0, result.output
    model = sf.load(MODEL)
    assert (model.config.window_size, model.config.window_stride) == WINDOWS
    expected = scores_of(model, open_dataset(folder, "auto", "val"), 64, Settings(*WINDOWS))
    content = json.loads(out.read_text())
    assert content["miou"] == expected.miou
    assert content["iou"] == list(expected.iou)
    assert (content["resize"], content["window"], content["scales"], content["flip"]) == (64, 64, [1.0], False)
    assert content["classes"] == list(CLASSES)
    assert f"mIoU {expected.miou:.4f}, mAcc {expected.macc:.4f}, aAcc {expected.aacc:.4f}; 3 images" in result.output
    for name, iou in zip(CLASSES, expected.iou, strict=True):
        assert re.search(rf"│ {name} +│ +{'-' if iou is None else f'{iou:.4f}'} │", result.output)
    assert [path.name for path in out.parent.iterdir()] == ["scores.json"]


def test_scales_flip_and_windows_reach_the_evaluation(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    data, model = open_dataset(folder, "auto", "val"), sf.load(MODEL)
    given = ("--scales", "0.5,1", "--flip", "--resize", 48, "--window", 32, "--stride", 24)
    assert evaluate("--data", folder, *given, "--json", out).exit_code == 0
    assert json.loads(out.read_text())["iou"] == list(
        scores_of(model, data, 48, Settings(32, 24, (0.5, 1.0), True)).iou
    )
    small = ("--resize", 32, "--window", 32, "--stride", 32)
    assert evaluate("--data", folder, "--multiscale", *small, "--json", out).exit_code == 0
    content = json.loads(out.read_text())
    assert (tuple(content["scales"]), content["flip"]) == (MULTISCALE, True)
    assert content["iou"] == list(scores_of(model, data, 32, Settings(32, 32, MULTISCALE, True)).iou)


def test_images_are_resized_as_the_data_s_recipe_does(tmp_path: Path) -> None:
    for name in ("leftImg8bit/val", "gtFine/val"):
        (tmp_path / name).mkdir(parents=True)
    trained = sf.create_model("seg_t_mask_16", num_classes=19, depth=1, window_size=768).config
    assert _resize(str(tmp_path), "auto", trained) == _resize("elsewhere", "cityscapes", trained) == 1024
    assert _resize(str(tmp_path), "auto", trained.replace(window_size=512, window_stride=512)) == 512
    assert _resize("shapes", "auto", trained) == 768


def test_two_processes_give_what_one_gives(folder: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", MODEL, "--data", str(folder), "--device", "cpu", "--dtype", "float32", "--flip"]
    assert CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "one.json")]).exit_code == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "segmenter_fast.cli", *arguments, "--json", str(tmp_path / "two.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("mIoU") == 1
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one == two


def test_other_classes_are_refused(folder: Path) -> None:
    result = evaluate("--data", "shapes")
    assert result.exit_code == 2
    assert "the model has 7 classes and the data set 8" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_broken_image_is_named(folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "images/val/scene-1.jpg").write_bytes(b"no image")
    result = evaluate("--data", broken)
    assert result.exit_code == 2
    assert str(broken / "images/val/scene-1.jpg") in result.stderr
    assert "Traceback" not in result.output


def test_wrong_folders_and_settings(tmp_path: Path, folder: Path) -> None:
    for arguments, message in (
        (("--data", tmp_path / "nowhere"), "nowhere"),
        (("--data", folder, "--stride", 100), "stride must be at most the window, 64"),
        (("--data", folder, "--scales", "x"), "--scales must be numbers above 0, up to 16"),
    ):
        result = evaluate(*arguments)
        assert result.exit_code == 2
        assert message in result.stderr
        assert "Traceback" not in result.output


def test_low_precision_is_near(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    assert evaluate("--data", folder, "--json", out).exit_code == 0
    exact = json.loads(out.read_text())
    result = evaluate("--data", folder, "--json", out, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    low = json.loads(out.read_text())
    assert low["dtype"] == str(torch.bfloat16)
    assert low["aacc"] == pytest.approx(exact["aacc"], abs=0.05)
