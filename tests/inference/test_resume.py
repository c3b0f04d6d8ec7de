"""Rows that are finished stay, whatever ends the process, and are used by the run that they belong to only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from segmenter_fast.inference.resume import Spool, files, identity
from segmenter_fast.inference.settings import Settings

ROWS = np.arange(60, dtype=np.uint8).reshape(10, 6)
SIZE = (10, 6)


def spool(folder: Path, resume: bool = True, about: dict[str, object] | None = None) -> Spool:
    return Spool(folder / "x.tif", about or {"model": 1, "options": 2, "image": 3}, SIZE, np.dtype(np.uint8), resume)


def test_rows_come_back(tmp_path: Path) -> None:
    first = spool(tmp_path)
    first.append(ROWS[:4])
    first.append(ROWS[4:5])
    again = spool(tmp_path)
    assert again.finished == 5
    assert again.restarted is None
    again.append(ROWS[5:])
    assert np.array_equal(again.read(3, 9), ROWS[3:9])
    assert [len(band) for band in again.bands(4)] == [4, 4, 2]
    assert np.array_equal(np.concatenate(list(again.bands(3))), ROWS)
    again.remove()
    assert not list(tmp_path.iterdir())


def test_a_row_cut_short_does_not_count(tmp_path: Path) -> None:
    spool(tmp_path).append(ROWS[:3])
    with open(files(tmp_path / "x.tif")[0], "ab") as file:
        file.write(b"half")
    again = spool(tmp_path)
    assert again.finished == 3
    again.append(ROWS[3:])
    assert np.array_equal(again.read(0, 10), ROWS)


@pytest.mark.parametrize(
    ("about", "reason"),
    [
        ({"model": 0, "options": 2, "image": 3}, "not those of the interrupted run: model"),
        ({"model": 1, "options": 0, "image": 0}, "not those of the interrupted run: options, image"),
    ],
)
def test_another_run_begins_anew_and_says_why(about: dict[str, object], reason: str, tmp_path: Path) -> None:
    spool(tmp_path).append(ROWS[:3])
    other = spool(tmp_path, about=about)
    assert other.finished == 0
    assert other.restarted == reason
    assert spool(tmp_path, about=about).restarted is None


def test_without_resume_nothing_is_used(tmp_path: Path) -> None:
    spool(tmp_path).append(ROWS[:3])
    assert spool(tmp_path, resume=False).finished == 0


@pytest.mark.parametrize("broken", ["", "[1]", "{"])
def test_a_broken_note_begins_anew(broken: str, tmp_path: Path) -> None:
    spool(tmp_path).append(ROWS[:3])
    files(tmp_path / "x.tif")[1].write_text(broken)
    again = spool(tmp_path)
    assert again.finished == 0
    assert again.restarted


def test_rows_without_a_note_are_nobody_s(tmp_path: Path) -> None:
    spool(tmp_path).append(ROWS[:3])
    files(tmp_path / "x.tif")[1].unlink()
    assert spool(tmp_path).finished == 0


def test_an_identity_changes_with_all_that_labels_depend_on(tmp_path: Path) -> None:
    image = tmp_path / "x.png"
    image.write_bytes(b"image")
    model, settings = nn.Linear(3, 2), Settings(512, 480)

    def of(model: nn.Module = model, settings: Settings = settings, name: str = "m") -> dict[str, object]:
        return identity(model, name, settings, image, (10, 6))

    first = of()
    assert of() == first
    assert of(settings=Settings(512, 480, flip=True)) != first
    assert of(settings=Settings(512, 480, (1.0, 2.0))) != first
    assert of(name="n") != first
    assert of(nn.Linear(3, 2)) != first
    with torch.no_grad():
        model.bias += 1
    assert of() != first
    changed = of()
    image.write_bytes(b"other")
    assert of() != changed
