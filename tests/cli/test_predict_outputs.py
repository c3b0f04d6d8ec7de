"""Outputs of ``segmenter-fast predict``: never another file replaced, never another run's taken for finished."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import segmenter_fast as sf
from segmenter_fast.inference.records import read_record
from support.models import windowed
from support.predict import MODEL, call, labels, photo, predict, tree


def test_ground_truth_is_never_replaced_but_by_overwrite(tmp_path: Path) -> None:
    for name in ("a", "b"):
        photo(tmp_path / f"data/images/train/{name}.jpg")
    (tmp_path / "data/labels/train").mkdir(parents=True)
    truth = Image.fromarray(np.full((64, 64), 3, np.uint8))
    for name in ("a", "b"):
        truth.save(tmp_path / f"data/labels/train/{name}.png")
    before = {name: (tmp_path / name).read_bytes() for name in tree(tmp_path)}
    for options in ((), ("--resume",), ("--no-overlay",)):
        result = predict(tmp_path / "data/images", "--out", tmp_path / "data", *options)
        assert result.exit_code == 2
        assert f"error: {tmp_path / 'data/labels/train/a.png'} and 1 more files are in the place" in result.stderr
        assert "--overwrite" in result.stderr
        assert {name: (tmp_path / name).read_bytes() for name in tree(tmp_path)} == before
    result = predict(tmp_path / "data/images", "--out", tmp_path / "data", "--overwrite")
    assert "2 written" in result.output
    expected = sf.predict(sf.load(MODEL), tmp_path / "data/images/train/a.jpg").labels
    assert np.array_equal(labels(tmp_path / "data")["train/a.png"], expected)


def test_outputs_of_the_same_input_are_replaced_those_of_another_are_not(tmp_path: Path) -> None:
    first, second, out = photo(tmp_path / "x/a.png"), photo(tmp_path / "y/a.png", 70, 65), tmp_path / "out"
    for _ in range(2):
        assert "1 written" in predict(first, "--out", out).output
    assert predict(second, "--out", out).exit_code == 2
    assert labels(out)["a.png"].shape == (64, 64)
    photo(tmp_path / "new.png", 50, 60).replace(first)  # the same input, changed
    assert "1 written" in predict(first, "--out", out).output
    shutil.move(tmp_path / "x", tmp_path / "moved")
    assert "0 written, 1 skipped" in predict(tmp_path / "moved", "--out", out, "--resume").output


def test_inputs_of_one_name_keep_their_folders_below_a_root(tmp_path: Path) -> None:
    first, second = photo(tmp_path / "x/a.png", 64, 64), photo(tmp_path / "y/a.png", 70, 65)
    assert predict(first, second, "--out", tmp_path / "out").exit_code == 2
    assert not (tmp_path / "out").exists()
    assert predict(first, second, "--out", tmp_path / "out", "--root", tmp_path).exit_code == 0
    assert labels(tmp_path / "out")["x/a.png"].shape == (64, 64)
    assert labels(tmp_path / "out")["y/a.png"].shape == (70, 65)


def test_resume_does_what_is_missing_only(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    for name in ("a.png", "b.png", "c.png"):
        photo(folder / name)
    assert predict(folder / "a.png", folder / "b.png", "--out", out).exit_code == 0
    (out / "overlays/b.png").unlink()
    before = (out / "labels/a.png").stat().st_mtime_ns
    result = predict(folder, "--out", out, "--resume")
    assert result.exit_code == 0
    assert "2 written" in result.output
    assert "1 skipped" in result.output
    assert (out / "labels/a.png").stat().st_mtime_ns == before
    assert "0 written, 3 skipped, 0 failed" in predict(folder, "--out", out, "--resume", "--batch-size", 3).output
    assert "3 written" in predict(folder, "--out", out).output


def test_resume_renews_what_is_damaged_or_of_another_run_and_says_so(tmp_path: Path) -> None:
    folder, out, model = tmp_path / "in", tmp_path / "out", tmp_path / "model"
    for name in ("a.png", "b.png"):
        photo(folder / name)
    windowed().save_pretrained(model)

    def resumed(*options: object) -> str:
        result = call("predict", folder, "--out", out, "--model", model, "--device", "cpu", "--resume", *options)
        assert result.exit_code == 0, result.output
        return result.output

    assert "2 written" in resumed("--dtype", "float32")
    same = (out / "labels/a.png").read_bytes()
    for damaged in (same[:-20], same[:-30] + bytes([same[-30] ^ 1]) + same[-29:], b""):
        (out / "labels/a.png").write_bytes(damaged)
        output = resumed("--dtype", "float32")
        assert "1 written" in output
        assert ("its output is damaged" in output) == bool(damaged)
        assert (out / "labels/a.png").read_bytes() == same
    output = resumed("--dtype", "bfloat16", "--flip")
    assert "2 written" in output
    assert f"restarted: {folder / 'a.png'} and 1 more: its output had another dtype and other options" in output
    fields = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(fields | {"mean": [0.4, 0.4, 0.4]}))
    output = resumed("--dtype", "bfloat16", "--flip")
    assert "its output had another model" in output
    assert "2 written" in output
    photo(tmp_path / "new.png", 50, 60).replace(folder / "b.png")
    assert f"restarted: {folder / 'b.png'}: its output had another image" in resumed("--dtype", "bfloat16", "--flip")
    assert "0 written, 2 skipped" in resumed("--dtype", "bfloat16", "--flip")


def test_rows_of_another_configuration_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from segmenter_fast.inference.resume import describe_run
    from segmenter_fast.inference.settings import Settings

    model = windowed()
    before = describe_run(model, Settings(32, 24))
    model.config = dataclasses.replace(model.config, std=(0.25, 0.25, 0.25))
    after = describe_run(model, Settings(32, 24))
    assert before["model"]["weights"] == after["model"]["weights"]
    assert before["model"] != after["model"]


def test_a_neighbour_that_joins_renames_nothing(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    photo(folder / "a.png")
    assert predict(folder, "--out", out, "--no-overlay").exit_code == 0
    photo(folder / "a.jpg")
    refused = predict(folder, "--out", out, "--no-overlay", "--resume")
    assert refused.exit_code == 2
    assert "--keep-suffix gives them names of their own" in refused.stderr
    assert tree(out) == ["labels/a.png"]
    assert predict(folder, "--out", out, "--no-overlay", "--keep-suffix").exit_code == 0
    assert tree(out) == ["labels/a.jpg.png", "labels/a.png", "labels/a.png.png"]


def test_a_tiff_has_its_record_and_a_damaged_one_is_renewed(tmp_path: Path) -> None:
    source, out = photo(tmp_path / "x.png", 70, 90), tmp_path / "out"
    options = (source, "--out", out, "--format", "tiff", "--no-overlay")
    assert predict(*options).exit_code == 0
    path = out / "labels/x.tif"
    record, complete = read_record(path)
    assert record is not None
    assert complete
    assert record["image"]["name"] == "x.png"
    whole = labels(out)["x.tif"]
    with path.open("ab") as file:  # the data of the only tile moves to the end, which is cut
        file.write(bytes(8))
    assert "0 written, 1 skipped" in predict(*options, "--resume").output
    os.truncate(path, path.stat().st_size - 20)
    assert read_record(path) == (record, False)
    assert "its output is damaged" in predict(*options, "--resume").output
    assert np.array_equal(labels(out)["x.tif"], whole)


@pytest.mark.parametrize("options", [(), ("--format", "tiff")])
def test_an_output_that_is_cut_above_its_record_stops_no_other_image(options: tuple[str, ...], tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    for name in ("a.png", "b.png"):
        photo(folder / name)
    arguments = (folder, "--out", out, "--no-overlay", *options)
    assert predict(folder / "a.png", *arguments[1:]).exit_code == 0
    [path] = (out / "labels").iterdir()
    os.truncate(path, 33)
    result = predict(*arguments, "--resume")
    assert result.exit_code == 1
    assert "1 written" in result.output
    assert "0 skipped, 1 failed" in result.output
    assert f"failed: {folder / 'a.png'}: {path} is cut off, and no record in it says who wrote it" in result.stderr
    assert path.stat().st_size == 33
    assert predict(*arguments).exit_code == 2
    assert "2 written" in predict(*arguments, "--overwrite").output


def test_without_a_model_no_folder_is_made(tmp_path: Path) -> None:
    result = call("predict", photo(tmp_path / "x.png"), "--out", tmp_path / "out", "--model", tmp_path / "absent")
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()
