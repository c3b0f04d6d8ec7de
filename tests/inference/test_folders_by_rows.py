"""Large images by rows: the labels of the image in memory, and runs that continue below their finished rows."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

import segmenter_fast as sf
from segmenter_fast.inference import folders, sliding
from segmenter_fast.inference.folders import Job
from segmenter_fast.inference.resume import resume_files
from segmenter_fast.inference.settings import Settings
from segmenter_fast.io import images
from segmenter_fast.io.large_images import TiffRaster
from support.models import pixels, windowed
from support.predict import run

SETTINGS = Settings(window=32, stride=24)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    tifffile.imwrite(tmp_path / "x.tif", pixels(300, 100), photometric="rgb", tile=(32, 32), compression="zlib")
    return Job(tmp_path / "x.tif", tmp_path / "labels/x.tif", tmp_path / "overlays/x.png", "tiff")


@pytest.fixture
def _large_from_100_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "LARGE_PIXELS", 100)


@pytest.fixture
def _small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several bands an image, as large images have."""
    monkeypatch.setattr(sliding, "_BAND_ELEMENTS", 1)


@pytest.mark.usefixtures("_large_from_100_pixels", "_small_bands")
@pytest.mark.parametrize(
    ("size", "settings"),
    [
        ((300, 100), SETTINGS),
        ((151, 97), Settings(32, 20, (0.75, 1.0, 1.5), True, 3)),
        ((20, 90), SETTINGS),  # enlarged
        ((1, 200), Settings(32, 24, flip=True)),
        ((120, 1), SETTINGS),
    ],
)
def test_the_labels_are_those_of_the_image_in_memory(size: tuple[int, int], settings: Settings, tmp_path: Path) -> None:
    image, model = pixels(*size), windowed()
    options = {name: value for name, value in vars(settings).items() if name != "channels"}
    expected = sf.predict(model, image, **options).labels
    assert size[0] == 1 or len(np.unique(expected)) > 1
    tifffile.imwrite(tmp_path / "x.tif", image, photometric="rgb", tile=(32, 32))
    assert isinstance(images.open_raster(tmp_path / "x.tif"), TiffRaster)
    result = sf.predict(model, tmp_path / "x.tif", **options)
    assert np.array_equal(result.image, image)
    assert np.array_equal(result.labels, expected)
    job = Job(tmp_path / "x.tif", tmp_path / "labels/x.png", None)
    assert run(model, job, settings) is None
    assert np.array_equal(tifffile.imread(tmp_path / "labels/x.tif"), expected)
    assert os.listdir(tmp_path / "labels") == ["x.tif"]


@pytest.mark.usefixtures("_large_from_100_pixels")
def test_png_may_be_asked_for(job: Job) -> None:
    model, png = windowed(), Job(job.source, job.labels.with_suffix(".png"), None, "png")
    run(model, png, SETTINGS)
    with Image.open(png.labels) as image:
        assert np.array_equal(np.asarray(image), sf.predict(model, pixels(300, 100)).labels)


def test_small_images_are_png_unless_tiff_is_asked_for(job: Job) -> None:
    model = windowed()
    run(model, Job(job.source, job.labels.with_suffix(".png"), None), SETTINGS)
    assert os.listdir(job.labels.parent) == ["x.png"]
    run(model, job, SETTINGS)
    assert sorted(os.listdir(job.labels.parent)) == ["x.png", "x.tif"]


def test_many_classes(job: Job) -> None:
    model = windowed(num_classes=300)
    run(model, job, SETTINGS)
    labels = tifffile.imread(job.labels)
    assert labels.dtype == np.uint16
    assert np.array_equal(labels, sf.predict(model, pixels(300, 100)).labels)


@pytest.mark.usefixtures("_small_bands")
def test_an_interrupted_run_is_resumed(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    model = windowed()

    def interrupt(completed: int, total: int) -> None:
        if completed > total * 2 // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, job, SETTINGS, progress=interrupt)
    rows, description = resume_files(job.labels)
    assert sorted(os.listdir(job.labels.parent)) == sorted([rows.name, description.name])
    assert not job.labels.exists()
    before = rows.stat().st_size // 100
    assert 100 < before < 300
    expected = sf.predict(model, pixels(300, 100)).labels
    assert np.array_equal(np.fromfile(rows, np.uint8).reshape(-1, 100), expected[:before])

    reports: list[tuple[int, int]] = []
    assert (
        run(model, job, SETTINGS, resume=True, progress=lambda completed, total: reports.append((completed, total)))
        is None
    )
    assert reports[0][0] > reports[-1][1] // 2  # the windows of finished rows are not computed again
    assert reports[-1][0] == reports[-1][1]
    assert np.array_equal(tifffile.imread(job.labels), expected)
    assert os.listdir(job.labels.parent) == ["x.tif"]


@pytest.mark.usefixtures("_small_bands")
def test_rows_of_another_model_or_image_are_not_used(job: Job) -> None:
    def interrupt(completed: int, total: int) -> None:
        if completed > total // 2:
            raise KeyboardInterrupt

    model = windowed()
    with pytest.raises(KeyboardInterrupt):
        run(model, job, SETTINGS, progress=interrupt)
    other = windowed()
    with pytest.raises(KeyboardInterrupt):
        run(other, job, SETTINGS, resume=True, progress=interrupt)
    tifffile.imwrite(job.source, pixels(300, 100)[::-1], photometric="rgb")
    assert run(other, job, SETTINGS, resume=True) == "the interrupted run had another image"
    assert np.array_equal(tifffile.imread(job.labels), sf.predict(other, pixels(300, 100)[::-1]).labels)


def test_an_interrupt_while_outputs_are_written_loses_no_row(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    model = windowed()
    with monkeypatch.context() as patch:

        def interrupt(*arguments: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(folders, "write_label_tiff", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(model, job, SETTINGS)
    monkeypatch.setattr(folders, "label_bands", lambda *arguments: pytest.fail("segmented again"))
    run(model, job, SETTINGS, resume=True)
    assert job.labels.exists()


def test_the_overlay_of_a_large_image_is_reduced(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    model = windowed()
    run(model, job, SETTINGS)
    result = sf.predict(model, pixels(300, 100), window=32, stride=24)
    with Image.open(job.overlay) as image:
        assert np.array_equal(np.asarray(image), np.asarray(result.captioned_overlay()))
    monkeypatch.setattr(folders, "OVERLAY_SIDE", 43)
    run(model, job, SETTINGS)
    with Image.open(job.overlay) as image:
        assert image.width == 256  # of the legend, below the 15 x 43 pixels of the overlay
        assert np.asarray(image)[42, 14].tolist() != np.asarray(image)[43, 15].tolist() == [250, 250, 248]
        block = pixels(300, 100)[140:147, 70:77].mean((0, 1)) / 2
        colour = np.array(result.palette[result.labels[143, 73]]) / 2
        assert abs(np.asarray(image)[20, 10] - block - colour).max() < 2


def test_what_cannot_be_written_as_tiff(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ValueError, match=r"tifffile: pip install 'segmenter-fast\[large\]'"):
        run(windowed(), job, SETTINGS)
    assert not job.labels.parent.exists()
