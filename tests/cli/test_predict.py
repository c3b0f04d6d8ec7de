"""``segmenter-fast predict`` as users run it: outputs, options, messages, exit codes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import segmenter_fast as sf
from segmenter_fast.inference import folders, settings
from support.predict import MODEL, call, labels, photo, predict, tree


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files_become_labels_and_overlays(dtype: str, tmp_path: Path) -> None:
    source, out = photo(tmp_path / "x.png", 70, 90), tmp_path / "out"
    result = predict(source, "--out", out, "--scales", "1,1.5", "--flip", "--dtype", dtype)
    assert result.exit_code == 0, result.output
    assert "1 written" in result.output
    assert "images/s" in result.output
    model = sf.load(MODEL).optimize(getattr(torch, dtype), compile=False)
    expected = sf.predict(model, source, scales=(1.0, 1.5), flip=True)
    assert np.array_equal(labels(out)["x.png"], expected.labels)
    with Image.open(out / "overlays/x.png") as image:
        assert np.array_equal(np.asarray(image), np.asarray(expected.captioned_overlay()))
    assert tree(out) == ["labels/x.png", "overlays/x.png"]


def test_batches_and_the_plain_model_give_the_same_files(tmp_path: Path) -> None:
    for index, size in enumerate([(64, 64)] * 5 + [(70, 90)]):
        photo(tmp_path / f"in/{index}.png", *size)
        (tmp_path / "in/3.png").write_bytes(b"broken")
    expected = None
    for out, options in {"one": ("--batch-size", 1), "four": ("--batch-size", 4), "plain": ("--no-optimize",)}.items():
        result = predict(tmp_path / "in", "--out", tmp_path / out, *options)
        assert result.exit_code == 1
        assert "5 written" in result.output
        assert result.stderr.count("failed: ") == 1
        found = {name: (tmp_path / out / name).read_bytes() for name in tree(tmp_path / out)}
        assert found == (expected or found)
        expected = found


def test_failures_are_listed_in_the_order_of_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "b.png", "c.png", "d.png"):
        photo(tmp_path / "in" / name)
    (tmp_path / "in/b.png").write_bytes(b"broken")
    real = folders.write_png

    def full(image: Image.Image, path: Path, record: object) -> None:
        if path.name in ("a.png", "c.png"):
            raise OSError("No space left on device")
        real(image, path, record)

    monkeypatch.setattr(folders, "write_png", full)
    result = predict(tmp_path / "in", "--out", tmp_path / "out")
    assert result.exit_code == 1
    failed = [line.split(": ")[1] for line in result.stderr.splitlines() if line.startswith("failed: ")]
    assert failed == [str(tmp_path / "in" / name) for name in ("a.png", "b.png", "c.png")]
    assert tree(tmp_path / "out") == ["labels/d.png", "overlays/d.png"]


def test_windows_and_their_stride_or_overlap_may_be_given(tmp_path: Path) -> None:
    source = photo(tmp_path / "x.png", 130, 150)
    result = predict(source, "--out", tmp_path, "--window", 48, "--overlap", 20, "--batch-size", 3, "--flip")
    assert result.exit_code == 0, result.output
    model = sf.load(MODEL)
    expected = sf.predict(model, source, window=48, stride=28, batch_size=3, flip=True).labels
    assert np.array_equal(labels(tmp_path)["x.png"], expected)
    expected = sf.predict(model, source, stride=model.config.window_size - 10).labels
    for option in (("--overlap", 10), ("--stride", model.config.window_size - 10)):
        assert predict(source, "--out", tmp_path, *option).exit_code == 0
        assert np.array_equal(labels(tmp_path)["x.png"], expected)


def test_the_format_may_be_given(tmp_path: Path) -> None:
    photo(tmp_path / "in/x.tif", 70, 90)
    photo(tmp_path / "in/y.png", 70, 90)
    (tmp_path / "in/z.tif").write_bytes(b"II*\0 broken")
    result = predict(tmp_path / "in", "--out", tmp_path, "--format", "tiff")
    assert result.exit_code == 1
    assert "2 written" in result.output
    assert f"failed: {tmp_path / 'in/z.tif'}: image {tmp_path / 'in/z.tif'} cannot be read" in result.stderr
    found = labels(tmp_path)
    assert list(found) == ["x.tif", "y.tif"]
    assert np.array_equal(found["x.tif"], found["y.tif"])
    with tifffile.TiffFile(tmp_path / "labels/x.tif") as file:
        assert file.pages[0].tags["ImageDescription"].value.splitlines()[0] == "class 0"
    result = predict(tmp_path / "in/x.tif", tmp_path / "in/y.png", "--out", tmp_path, "--format", "tiff", "--resume")
    assert "0 written, 2 skipped" in result.output
    assert predict(tmp_path / "in/y.png", "--out", tmp_path, "--format", "png").exit_code == 0
    assert np.array_equal(labels(tmp_path)["y.png"], found["y.tif"])


def test_a_folder_with_broken_files_goes_on_and_ends_with_exit_code_1(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    photo(folder / "a.png")
    whole = photo(folder / "b.jpg", 200, 200).read_bytes()
    (folder / "b.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "c.png").write_text("no image")
    Image.new("F", (8, 8)).save(folder / "d.tiff")
    photo(folder / "sub/a.png")
    result = predict(folder, "--out", out, "--no-overlay")
    assert result.exit_code == 1
    assert "2 written" in result.output
    assert "3 failed" in result.output
    for name, reason in {"b.jpg": "cannot be read", "c.png": "cannot be read", "d.tiff": "mode F"}.items():
        lines = [line for line in result.stderr.splitlines() if line.startswith(f"failed: {folder / name}")]
        assert len(lines) == 1
        assert reason in lines[0]
    assert "Traceback" not in result.output
    assert tree(out) == ["labels/a.png", "labels/sub/a.png"]


def test_bad_usage_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    source = photo(tmp_path / "x.png")
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for arguments, message in {
        (source, "--out", tmp_path / "file"): f"error: output folder {tmp_path / 'file'} cannot be written",
        (tmp_path / "empty", "--out", tmp_path / "o"): f"error: no images in {tmp_path / 'empty'}",
        (tmp_path / "absent", "--out", tmp_path / "o"): f"error: input {tmp_path / 'absent'} does not exist",
    }.items():
        result = predict(*arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith(message)
        assert len(result.stderr.splitlines()) == 1
    for arguments in (("--out", tmp_path), (source,), (source, "--out", tmp_path / "o", "--scales", "1,big")):
        result = predict(*arguments)
        assert result.exit_code == 2
        assert "Traceback" not in result.output
    result = call("predict", source, "--out", tmp_path / "o", "--model", tmp_path / "absent")
    assert result.exit_code == 2
    assert "absent" in result.stderr
    assert not list((tmp_path / "o").rglob("*.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--window", 0), "--window must be at least 1, got 0"),
        (("--batch-size", 0), "--batch-size must be at least 1, got 0"),
        (("--window", 32, "--overlap", 32), "--overlap must be at least 0 and below the window of 32 pixels, got 32"),
        (("--overlap", 64), "--overlap must be at least 0 and below the window of 64 pixels, got 64"),
        (("--overlap", -1), "--overlap must be at least 0 and below the window, got -1"),
        (("--stride", 0), "--stride must be at least 1, got 0"),
        (("--stride", 65), "stride must be at most the window, 64, or pixels between windows get no label; got 65"),
        (("--stride", 32, "--overlap", 32), "give --stride or --overlap, not both; got --stride 32, --overlap 32"),
        (("--scales", "1,1e6"), "--scales must be numbers above 0, up to 16, with commas between them, got '1,1e6'"),
        (("--format", "gif"), "gif"),
    ],
)
def test_bad_options_are_named(arguments: tuple[object, ...], message: str, tmp_path: Path) -> None:
    result = predict(photo(tmp_path / "x.png"), "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", "").split())
    assert "Traceback" not in result.output


def test_an_overlap_is_checked_against_the_window_before_anything_is_read(tmp_path: Path) -> None:
    arguments = (photo(tmp_path / "x.png"), "--out", tmp_path / "out", "--window", 32, "--overlap", 32)
    result = call("predict", *arguments, "--model", tmp_path / "absent")
    assert result.exit_code == 2
    assert "below the window of 32 pixels, got 32" in " ".join(result.stderr.replace("│", "").split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("named", ["variant", "folder", "official", "official with windows", "checkpoint.pth"])
def test_an_overlap_is_checked_against_the_model_s_window_before_its_weights_are_read(
    named: str, tmp_path: Path
) -> None:
    if named == "folder":
        (tmp_path / "config.json").write_text('{"window_size": 512}')
    else:
        windows = "\ninference_kwargs: {window_size: 512}" if named == "official with windows" else ""
        side = 300 if windows else 512
        text = f"net_kwargs:\n  image_size: !!python/tuple\n  - {side}\n  - {side}{windows}"
        (tmp_path / "variant.yml").write_text(text)
    model = {"variant": "seg_t_mask_16", "checkpoint.pth": tmp_path / "checkpoint.pth"}.get(named, tmp_path)
    arguments = (photo(tmp_path / "x.png"), "--out", tmp_path / "out", "--overlap", 512)
    result = call("predict", *arguments, "--model", model)
    assert result.exit_code == 2
    assert "below the window of 512 pixels, got 512" in " ".join(result.stderr.replace("│", "").split())
    assert "RANDOM" not in result.stderr


@pytest.mark.parametrize(
    ("size", "options"),
    [((3, 3000), ()), ((40, 40), ("--window", 100_000)), ((300, 300), ("--window", 1, "--scales", 4))],
)
def test_absurd_work_is_refused_before_it_starts(
    size: tuple[int, int], options: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo(tmp_path / "in/a.png", *size)
    monkeypatch.setattr(settings, "MOST_WINDOWS", 1_000)
    for format in ("png", "tiff"):
        result = predict(tmp_path / "in", "--out", tmp_path / "out", "--format", format, *options)
        assert result.exit_code == 1
        assert f"a.png: an image of {size[1]} x {size[0]} pixels would become " in result.stderr
        assert "give a smaller window or other scales" in result.stderr
        assert tree(tmp_path / "out") == []
    with pytest.raises(ValueError, match="would become 150,000 x 50,000"):
        sf.inference.slide(sf.load(MODEL), [torch.zeros(1, 3, 10, 30)], [False], (10, 30), window=50_000)


def test_an_overlap_is_checked_where_nothing_is_left_to_do(tmp_path: Path) -> None:
    arguments = (photo(tmp_path / "x.png"), "--out", tmp_path / "out", "--resume")
    assert predict(*arguments).exit_code == 0
    result = predict(*arguments, "--window", 32, "--overlap", -1)
    assert result.exit_code == 2
    assert "got -1" in result.stderr


def test_tiff_without_tifffile_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = photo(tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    result = predict(source, "--out", tmp_path, "--format", "tiff")
    assert result.exit_code == 2
    assert result.stderr == "error: labels as TIFF need tifffile: pip install 'segmenter-fast[large]'\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    result = call("predict", photo(tmp_path / "x.png"), "-o", tmp_path / "o", "-m", MODEL, "--device", "cuda")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: device cuda is not there")


def test_options_are_checked_before_the_model_is_loaded(tmp_path: Path) -> None:
    source = photo(tmp_path / "x.png")
    for command in (("predict", source, "--out", tmp_path / "out"), ("evaluate", "--data", "shapes")):
        model = ("--model", "nowhere") if command[0] == "predict" else ("nowhere",)
        result = call(*command, *model, "--window", 32, "--stride", 33)
        assert result.exit_code == 2
        assert "--stride must be at most --window, 32," in result.stderr


def test_a_named_pipe_fails_and_the_rest_goes_on(tmp_path: Path) -> None:
    photo(tmp_path / "in/a.png")
    os.mkfifo(tmp_path / "in/b.png")
    result = predict(tmp_path / "in", "--out", tmp_path / "out", "--no-overlay")
    assert result.exit_code == 1
    assert "1 written" in result.output
    assert f"image {tmp_path / 'in/b.png'} cannot be read: it is no regular file" in result.stderr
