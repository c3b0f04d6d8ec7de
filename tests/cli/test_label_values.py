"""Labels that ``predict`` writes have the values of the data set that the model was trained on; pages are chosen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

import segmenter_fast as sf
from segmenter_fast.inference.records import read_record
from support.folders import write_folder
from support.models import windowed
from support.predict import call, labels, photo

VALUES, NAMES, PALETTE = (0, 255, 7), ("sky", "sea", "sand"), ((10, 0, 0), (0, 20, 0), (0, 0, 30))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = windowed(num_classes=3, class_names=NAMES, palette=PALETTE, label_values=VALUES)
    config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("format", ["png", "tiff"])
def test_labels_have_the_values_of_the_data(format: str, checkpoint: Path, tmp_path: Path) -> None:
    source, out = photo(tmp_path / "x.png"), tmp_path / "out"
    arguments = (source, "--model", checkpoint, "--out", out, "--device", "cpu", "--dtype", "float32")
    done = call("predict", *arguments, "--format", format)
    assert "1 written" in done.output, done.output
    classes = sf.predict(sf.load(checkpoint), source).labels
    ((name, written),) = labels(out).items()
    assert np.array_equal(written, np.array(VALUES)[classes])
    assert len(np.unique(written)) > 1
    if format == "png":
        with Image.open(out / "labels" / name) as image:
            assert np.array_equal(image.convert("RGB"), np.array(PALETTE, np.uint8)[classes])
    else:
        page = tifffile.TiffFile(out / "labels" / name).pages[0]
        described = page.description.split("\n")
        assert [described[value] for value in VALUES] == list(NAMES)
        assert [tuple(page.colormap[:, value] // 257) for value in VALUES] == list(PALETTE)


def test_resume_knows_the_values(checkpoint: Path, tmp_path: Path) -> None:
    source, out = photo(tmp_path / "x.png"), tmp_path / "out"
    arguments = ("predict", source, "--model", checkpoint, "--out", out, "--device", "cpu", "--resume")
    assert "1 written" in call(*arguments).output
    assert "0 written, 1 skipped" in call(*arguments).output
    fields = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(fields | {"label_values": [1, 2, 3]}))
    assert "its output had another model" in call(*arguments).output
    assert set(np.unique(labels(out)["x.png"])) <= {1, 2, 3}


@pytest.mark.parametrize("told", [{"values": [0, 255]}, {"reduce_zero_label": True}])
def test_training_keeps_the_values_of_its_labels(told: dict[str, object], tmp_path: Path) -> None:
    values = (0, 255) if "values" in told else (0, 1, 2)
    data = write_folder(tmp_path / "data", values=values, classes=None)
    (data / "classes.json").write_text(json.dumps({"classes": ["no", "yes"], **told}))
    sizes = [part for name in ("crop", "resize", "window", "stride") for part in (f"--{name}", 32)]
    options = ("--variant", "seg_m_mask_8", "--workers", 0, "--pictures", 0, "--steps", 1, "--batch-size", 1, *sizes)
    done = call("train", "--data", data, "--preset", "folder", "--out", tmp_path / "run", "--device", "cpu", *options)
    assert done.exit_code == 0, done.output
    wanted = (0, 255) if "values" in told else (1, 2)
    assert sf.load(tmp_path / "run/last").config.label_values == wanted
    done = call("predict", data / "images/val", "--model", tmp_path / "run/last", "--out", tmp_path / "out")
    assert "1 written" in done.output, done.output
    written = labels(tmp_path / "out")["d.png"]
    assert set(np.unique(written)) <= set(wanted)
    done = call("evaluate", tmp_path / "run/last", "--data", data, "--device", "cpu", "--reduce-zero-label")
    assert (done.exit_code == 0) == ("values" not in told)
    assert ("mIoU" in done.stdout) or "reduce_zero_label must be true or false, and false beside values" in done.stderr


def test_evaluation_on_other_values_is_told(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", values=(0, 1), classes=None)
    (data / "classes.json").write_text(json.dumps(["no", "yes"]))
    for values, told in (((1, 2), True), ((), False)):
        model = windowed(num_classes=2, class_names=("no", "yes"), label_values=values)
        model.save_pretrained(tmp_path / f"model{told}")
        done = call("evaluate", tmp_path / f"model{told}", "--data", data, "--device", "cpu")
        assert done.exit_code == 0, done.output
        assert (
            "have the label values 1, 2, the data's 0, 1; --reduce-zero-label" in " ".join(done.stderr.split())
        ) == told


def test_pages_of_the_input(checkpoint: Path, tmp_path: Path) -> None:
    pages = [Image.open(photo(tmp_path / f"{name}.png", 64, width)) for name, width in (("a", 64), ("b", 70))]
    (tmp_path / "in").mkdir()
    pages[0].save(tmp_path / "in/x.tif", save_all=True, append_images=pages[1:])
    arguments = ("predict", tmp_path / "in", "--model", checkpoint, "--out", tmp_path / "out", "--device", "cpu")
    done = call(*arguments)
    assert "x.tif has 2 pages; the first is read, --page 1 is the second" in done.stderr
    assert labels(tmp_path / "out")["x.png"].shape == (64, 64)
    assert "0 written, 1 skipped" in call(*arguments, "--resume").output
    done = call(*arguments, "--resume", "--page", 1)
    assert "its output had other options" in done.stderr
    assert "pages;" not in done.stderr
    assert labels(tmp_path / "out")["x.png"].shape == (64, 70)
    assert read_record(tmp_path / "out/labels/x.png")[0]["options"]["page"] == 1
    done = call(*arguments, "--page", 5)
    assert (done.exit_code, "it has the pages 0 to 1 and no page 5" in done.stderr) == (1, True)


def test_dataset_check_reads_colours(tmp_path: Path) -> None:
    data, palette = write_folder(tmp_path / "data", values=(0, 1)), tmp_path / "p.csv"
    palette.write_text("sky,0,0,0\nsea,1,1,1\nsand,9,9,9\n")
    for path in (data / "labels").rglob("*.png"):
        with Image.open(path) as image:
            image.convert("RGB").save(path)
    assert call("dataset", "check", data).exit_code == 1
    assert call("dataset", "check", data, "--palette", palette).exit_code == 0
    palette.write_text("sky,0,0,0\nsea,1,1,2\nsand,9,9,9\n")
    done = call("dataset", "check", data, "--palette", palette)
    assert done.exit_code == 1
    assert "hold 27 pixels of colour (1, 1, 1); the nearest that is known is sea (1, 1, 2)" in done.stderr


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_dataset_check_fits_the_terminal(columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    done = call("dataset", "check", write_folder(tmp_path, values=(0, 1)))
    assert max(map(len, done.stdout.splitlines())) <= columns
    if columns >= 80:
        (line,) = (line for line in done.stdout.splitlines() if "sky" in line)
        assert line.count("%") == 2
