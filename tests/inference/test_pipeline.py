"""Folders through batches and threads: the files of each image alone, whatever fails between them."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import segmenter_fast as sf
from segmenter_fast.inference import folders, pipeline
from segmenter_fast.inference.batches import Model
from segmenter_fast.inference.folders import Job, plan
from segmenter_fast.inference.pipeline import run_all
from segmenter_fast.inference.settings import Settings
from segmenter_fast.io.channels import Channels
from support.models import pixels, windowed
from support.predict import run, tree

SETTINGS = Settings(window=32, stride=24)
SIZES = {"a": (32, 32), "b": (50, 40), "c": (32, 32), "d": (32, 32), "f": (32, 32), "g": (20, 20), "h": (32, 32)}


@pytest.fixture(params=["beside the model", "in bursts"])
def threads_work(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the threads work as on a GPU, or as on a CPU."""
    monkeypatch.setattr(pipeline, "works_in_bursts", lambda model: request.param == "in bursts")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Seven images, five of them of one window, and a file that is none."""
    (tmp_path / "in").mkdir()
    for shift, (name, size) in enumerate(SIZES.items()):
        Image.fromarray(pixels(*size) ^ shift).save(tmp_path / f"in/{name}.png")
    (tmp_path / "in/e.png").write_text("no image")
    return tmp_path / "in"


def all_of(model: Model, jobs: list[Job], settings: Settings = SETTINGS) -> dict[str, str | None]:
    """Name of each image -> reason of its failure, in the order in which they ended."""
    ended: dict[str, str | None] = {}
    run_all(model, jobs, settings, lambda job: None, lambda job, _, e: ended.update({job.source.stem: e and str(e)}))
    return ended


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in tree(folder)}


@pytest.mark.usefixtures("threads_work")
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("form", ["plain", "inference"])
def test_the_files_are_those_of_each_image_alone(form: str, batch_size: int, source: Path, tmp_path: Path) -> None:
    model = windowed()
    used = model if form == "plain" else model.optimize(torch.float32, compile=False)
    for job in plan([source], tmp_path / "alone"):
        if job.source.stem != "e":
            run(used, job, SETTINGS)
    ended = all_of(used, plan([source], tmp_path / "out"), Settings(32, 24, batch_size=batch_size))
    assert sorted(ended) == list("abcdefgh")
    assert [name for name, reason in ended.items() if reason] == ["e"]
    assert "cannot be read" in ended["e"]
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert len(contents(tmp_path / "out")) == 14


def recorded(model: sf.Segmenter, monkeypatch: pytest.MonkeyPatch, most: int = 99) -> list[int]:
    """Sizes of the batches that go through ``segment``, which has no memory for more than ``most``."""
    sizes, real = list[int](), model.segment

    def segment(images: Tensor) -> Tensor:
        sizes.append(len(images))
        if len(images) > most:
            raise torch.OutOfMemoryError("full")
        return real(images)

    monkeypatch.setattr(model, "segment", segment)
    return sizes


def test_images_of_one_window_go_in_batches(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = windowed()
    sizes = recorded(model, monkeypatch)
    all_of(model, plan([source], tmp_path / "out"), Settings(32, 24, batch_size=3))
    assert sizes == [3, 2]


@pytest.mark.parametrize("most", [1, 0])
def test_a_full_memory(most: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = windowed()
    recorded(model, monkeypatch, most)
    ended = all_of(model, plan([source], tmp_path / "out"), Settings(32, 24, batch_size=4))
    assert {name for name, reason in ended.items() if reason == "full"} == (set() if most else set("acdfh"))
    assert len(contents(tmp_path / "out")) == (14 if most else 4)


def test_a_write_that_fails_is_that_image_s_alone(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = folders.write_png

    def full(image: Image.Image, path: Path, record: object) -> None:
        if path.stem == "c" and "labels" in path.parts:
            raise OSError("No space left on device")
        real(image, path, record)

    monkeypatch.setattr(folders, "write_png", full)
    ended = all_of(windowed(), plan([source], tmp_path / "out"))
    assert {name for name, reason in ended.items() if reason} == {"c", "e"}
    assert ended["c"] == "No space left on device"
    assert tree(tmp_path / "out/labels") == [f"{name}.png" for name in "abdfgh"]


def test_an_error_of_the_program_is_not_taken_for_one_of_an_image(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = threading.active_count()
    monkeypatch.setattr(folders, "write_png", lambda *_: {}["absent"])
    with pytest.raises(KeyError):
        all_of(windowed(), plan([source], tmp_path / "out"))
    assert threading.active_count() == threads


@pytest.mark.usefixtures("threads_work")
def test_an_interrupt_finishes_what_is_segmented(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ended, real = windowed(), [], folders.write_png

    def slowly(image: Image.Image, path: Path, record: object) -> None:
        time.sleep(0.1)
        real(image, path, record)

    monkeypatch.setattr(folders, "write_png", slowly)

    def interrupt(job: Job) -> None:
        if job.source.stem == "g":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all(model, plan([source], tmp_path / "out"), SETTINGS, interrupt, lambda job, *_: ended.append(job))
    whole = sorted(job.source.stem for job in ended if job.source.stem != "e")
    assert whole == list("abcdf")
    assert tree(tmp_path / "out/labels") == tree(tmp_path / "out/overlays") == [f"{name}.png" for name in whole]


def test_a_slow_model_shows_progress(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_BURST_SECONDS", 0.0)
    ended: list[str] = []
    model = windowed()
    real, seen = model.segment, []

    def segment(images: Tensor) -> Tensor:
        seen.append(len(ended))
        return real(images)

    monkeypatch.setattr(model, "segment", segment)
    jobs = [job for job in plan([source], tmp_path / "out") if job.source.stem in "acdf"]
    run_all(
        model, jobs, Settings(32, 24, batch_size=2), lambda job: None, lambda job, *_: ended.append(job.source.stem)
    )
    assert seen == [0, 2]


@pytest.mark.usefixtures("threads_work")
def test_memory_in_flight_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    for index in range(24):
        Image.fromarray(pixels(40, 40)).save(tmp_path / f"in/{index:02}.png")
    lock, opened, ended, most = threading.Lock(), 0, 0, 0
    real_open, real_write = pipeline.images.open_raster, folders.write_png

    def open_raster(path: Path, page: int | None, channels: Channels) -> object:
        nonlocal opened, most
        with lock:
            opened += 1
            most = max(most, opened - ended)
        return real_open(path, page, channels)

    def slowly(image: Image.Image, path: Path, record: object) -> None:
        time.sleep(0.02)
        real_write(image, path, record)

    def end(*_: object) -> None:
        nonlocal ended
        ended += 1

    monkeypatch.setattr(pipeline.images, "open_raster", open_raster)
    monkeypatch.setattr(folders, "write_png", slowly)
    monkeypatch.setattr(pipeline, "PIXELS_IN_FLIGHT", 3 * 40 * 40)
    monkeypatch.setattr(pipeline, "side_threads", lambda: 1)
    run_all(windowed(), plan([tmp_path / "in"], tmp_path / "out"), SETTINGS, lambda job: None, end)
    assert ended == 24
    assert 2 <= most <= 5  # three, the one whose size is not counted yet, and the first ones, whose size nobody knew
