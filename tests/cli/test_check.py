"""``segmenter-fast check``: every form on the user's images, against float32 and the user's labels."""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import segmenter_fast as sf
from segmenter_fast.inference.settings import Settings
from segmenter_fast.inference_segmenter import InferenceSegmenter
from segmenter_fast.io import Raster
from segmenter_fast.train import forms
from segmenter_fast.train.forms import EXACT, FORMS, compare_forms, find_photos, python_line
from support.models import windowed
from support.predict import call

CONFIG = sf.SegmenterConfig(num_classes=5)
SIZES = {"a": (32, 32), "sub/b": (40, 50), "sub/c": (20, 30)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images below ``images``, of which two have labels below ``labels``."""
    root, generator = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, (height, width) in SIZES.items():
        for kind, ending in (("images", "jpg"), ("labels", "png")):
            (root / kind / name).parent.mkdir(parents=True, exist_ok=True)
            shape, top = ((height, width, 3), 256) if kind == "images" else ((height, width), 5)
            Image.fromarray(generator.integers(0, top, shape, np.uint8)).save(root / kind / f"{name}.{ending}")
    (root / "labels/sub/c.png").unlink()
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "small"
    windowed().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("least", ["0", "1"])
def test_the_table_the_picture_and_the_line(least: str, data: Path, checkpoint: str, tmp_path: Path) -> None:
    out = tmp_path / "new/changed.png"
    result = call("check", checkpoint, data, "--device", "cpu", "--out", out, "--min-agreement", least)
    assert result.exit_code == 0, result.output
    rows = {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in map(_cells, result.stdout.splitlines())
    }
    assert rows["fp8"] == ["-"] * 5
    assert "fp8: quantize='fp8' needs an NVIDIA GPU of the Hopper generation" in result.stdout
    assert rows["float32"][2:4] == ["100.00%", "1.0000"]
    assert set(FORMS) - {EXACT} <= set(rows)
    assert EXACT not in rows
    assert "most changed: " in result.stdout
    assert "2 of 3 images have labels" in result.stdout
    *_, heading, line, _ = result.stdout.splitlines()
    chosen = re.fullmatch(rf"the fastest form that keeps {float(least):.1%} of the labels is (.+):", heading)[1]
    kept = [name for name in FORMS if name not in ("fp8", EXACT) and (least == "0" or rows[name][2] == "100.00%")]
    assert float(rows[chosen][0]) == max(float(rows[name][0]) for name in kept)
    assert line == python_line(checkpoint, "cpu", chosen)
    names: dict[str, Any] = {"sf": sf}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(line, names)
    assert isinstance(names["model"], InferenceSegmenter)
    with Image.open(out) as picture:
        assert picture.size[0] > 3 * picture.size[1] / 2
    assert [path.name for path in out.parent.iterdir()] == ["changed.png"]
    again = call("check", checkpoint, data, "--device", "cpu", "--out", out)
    assert again.exit_code == 2
    assert f"{out} exists; choose another path, or replace it by --overwrite" in again.stderr


def _cells(line: str) -> list[str]:
    return line.split("│") if line.startswith("│") else ["", ""]


def test_a_model_that_merges_is_compared_with_its_exact_form(data: Path) -> None:
    torch.manual_seed(0)
    model = windowed().with_merging({"layers": [0], "share": 0.5})
    photos = find_photos([data], None, model.config)
    forms = {form.name: form for form in compare_forms(model, photos, lambda done: None)}
    assert list(forms) == list(FORMS)
    assert forms["float32"].model.config.merging == model.config.merging
    exact = forms[EXACT]
    assert exact.model.config.merging is None
    assert 0 < exact.scores.aacc < forms["float32"].scores.aacc == 1
    assert python_line("my model", "cpu", EXACT) == 'model = sf.load("my model").optimize("float32", merge="none")'


def test_figures_are_those_of_each_form(data: Path, checkpoint: str) -> None:
    model = sf.load(checkpoint)
    photos = find_photos([data], None, model.config)
    done: list[int] = []
    forms = {form.name: form for form in compare_forms(model, photos, done.append)}
    assert done == [1, 2, 3]
    assert [pair.labels.is_file() for pair in photos.pairs] == [True, True, False]
    exact, int8 = forms["float32"], forms["int8"]
    assert (exact.scores.aacc, exact.scores.miou, exact.worst[0]) == (1.0, 1.0, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = {name: model.optimize(**FORMS[name]) for name in ("float32", "int8")}
    same = {}
    for pair in photos.pairs:
        first, second = (sf.predict(fast[name], pair.image).labels for name in fast)
        same[pair.name] = first == second
    pixels = np.concatenate([part.ravel() for part in same.values()])
    assert int8.scores.aacc == pytest.approx(pixels.mean())
    worst = min(same, key=lambda name: same[name].mean())
    assert int8.worst[:2] == (pytest.approx(same[worst].mean()), worst)
    assert 0 < int8.scores.aacc < 1
    assert int8.against_labels.counts.sum() == 32 * 32 + 40 * 50
    assert int8.weight_bytes < 0.5 * exact.weight_bytes
    assert forms["bfloat16"].images_per_second > 0
    assert not forms["fp8"].runs


def test_a_form_that_fails_while_it_runs_says_why(checkpoint: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = forms.predict_raster

    def failing(form: InferenceSegmenter, raster: Raster, settings: Settings) -> object:
        if form.encoder.norm.weight.dtype == torch.bfloat16:
            raise RuntimeError("no memory left")
        return real(form, raster, settings)

    monkeypatch.setattr(forms, "predict_raster", failing)
    monkeypatch.setattr(forms, "FORMS", {name: FORMS[name] for name in ("float32", "bfloat16")})
    monkeypatch.setattr("segmenter_fast.inference_segmenter.computes_slowly", lambda *_: False)
    photos = find_photos([data / "images/a.jpg"], None, CONFIG)
    exact, failed = compare_forms(sf.load(checkpoint), photos, lambda done: None)
    assert (exact.scores.aacc, bool(exact.against_labels.counts.any())) == (1.0, False)
    assert (failed.runs, failed.remark) == (False, "no memory left")


def test_labels_in_a_folder_of_their_own(data: Path, tmp_path: Path) -> None:
    photos = find_photos([data / "images/sub"], data / "labels/sub", CONFIG)
    assert [pair.labels for pair in photos.pairs] == [data / "labels/sub/b.png", data / "labels/sub/c.png"]
    photos = find_photos([data / "images/sub/b.jpg", data / "images/a.jpg"], data / "labels", CONFIG)
    assert [pair.labels.is_file() for pair in photos.pairs] == [True, True]
    with pytest.raises(FileNotFoundError, match=r"folder of labels .*nowhere does not exist"):
        find_photos([data], tmp_path / "nowhere", CONFIG)
    with pytest.raises(ValueError, match=r"no image has labels: expected files such as .*/a\.png"):
        find_photos([data / "images"], tmp_path, CONFIG)


def test_wrong_input_is_one_line(data: Path, checkpoint: str, tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    Image.new("L", (32, 32), 77).save(tmp_path / "labels/a.png")
    for arguments, message in (
        ((tmp_path / "nowhere",), "nowhere does not exist"),
        (
            (data / "images/a.jpg", "--out", "x.jpg"),
            "--out must be a .png file, a new one or with --overwrite, got x.jpg",
        ),
        ((data / "images/a.jpg", "--labels", tmp_path / "labels"), "77, but classes are 0 to 4"),
    ):
        result = call("check", checkpoint, *arguments, "--device", "cpu")
        assert result.exit_code == 2, result.output
        assert message in result.stderr.replace("\n", " ")
        assert "Traceback" not in result.output


def test_the_line_of_python() -> None:
    assert python_line("my model", "cpu", "int8") == 'model = sf.load("my model").optimize(quantize="int8")'
    given = python_line("seg_t_mask_16", "cuda", "bfloat16")
    assert given == 'model = sf.create_model("seg_t_mask_16").eval().to("cuda").optimize("bfloat16")'


def test_a_broken_photograph_is_left_out_and_named(data: Path, checkpoint: str, tmp_path: Path) -> None:
    shutil.copytree(data / "images", tmp_path / "images")
    (tmp_path / "images/aa.jpg").write_bytes(b"broken")
    result = call("check", checkpoint, tmp_path / "images", "--device", "cpu")
    assert result.exit_code == 1
    assert f"left out: image {tmp_path / 'images/aa.jpg'} cannot be read" in result.stderr
    assert "the fastest form that keeps" in result.stdout
    result = call("check", checkpoint, tmp_path / "images/aa.jpg", "--device", "cpu")
    assert result.exit_code == 2
    assert "aa.jpg cannot be read" in result.stderr
