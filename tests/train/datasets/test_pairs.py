"""``dataset check`` finds every planted problem and counts the pixels of each class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from segmenter_fast.cli import app
from segmenter_fast.train.datasets.findings import check_files
from segmenter_fast.train.datasets.layouts import open_files
from support.folders import HEIGHT, WIDTH, write_ade20k, write_cityscapes, write_folder, write_pascal_context


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["dataset", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.mark.parametrize("write", [write_ade20k, write_cityscapes, write_pascal_context, write_folder])
def test_sound_data_passes(write: Callable[[Path], Path], tmp_path: Path) -> None:
    result = run("check", write(tmp_path))
    assert result.exit_code == 0, result.output
    assert "no problems" in result.output


def test_pixels_are_counted(tmp_path: Path) -> None:
    found = list(check_files(open_files(write_folder(tmp_path, (0, 0, 2, 255)), "folder", "train")))
    values = np.resize([0, 0, 2, 255], (HEIGHT, WIDTH))
    assert len(found) == 3
    for checked in found:
        assert checked.pixels.tolist() == [(values == label).sum() for label in (0, 1, 2)]
        assert checked.ignored == (values == 255).sum()
        assert checked.problems == ()


def test_ade20k_counts_zero_and_255_as_ignored(tmp_path: Path) -> None:
    checked = next(check_files(open_files(write_ade20k(tmp_path, (0, 255, 1, 150)), "ade20k", "val")))
    values = np.resize([0, 255, 1, 150], (HEIGHT, WIDTH))
    assert checked.ignored == ((values == 0) | (values == 255)).sum()
    assert checked.pixels[0] == (values == 1).sum()
    assert checked.pixels[149] == (values == 150).sum()
    assert checked.pixels.sum() + checked.ignored == values.size


def test_every_problem_is_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    images, labels = root / "images", root / "labels"
    (images / "train" / "b.jpg").write_bytes(b"no image")
    (labels / "train" / "c.png").unlink()
    Image.new("L", (WIDTH, HEIGHT + 1), 9).save(labels / "train" / "sub" / "a.png")
    Image.new("L", (WIDTH, HEIGHT)).save(labels / "val" / "stray.png")
    Image.new("RGB", (WIDTH, HEIGHT)).save(labels / "val" / "d.png")
    result = run("check", root)
    assert result.exit_code == 1
    for message in (
        f"image {images}/train/b.jpg cannot be read",
        f"labels {labels}/train/c.png do not exist",
        f"its labels {labels}/train/sub/a.png are 9 x 7",
        f"labels {labels}/train/sub/a.png hold 9, but classes are 0 to 2",
        f"labels {labels}/val/stray.png belong to no image",
        f"labels {labels}/val/d.png have mode RGB",
    ):
        assert message in result.output
    assert result.output.count("problem:") == 6
    assert "and 5 more" in run("check", root, "--show", "1").output


def test_a_missing_split_is_a_problem_and_a_wrong_folder_an_error(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data")
    (root / "images" / "val").rename(root / "images" / "test")
    result = run("check", root)
    assert result.exit_code == 1
    assert "has no val split of kind folder" in result.output
    result = run("check", tmp_path)
    assert result.exit_code == 2
    assert "no data set of a known layout" in result.output
    assert run("check", root, "--kind", "coco").exit_code == 2
