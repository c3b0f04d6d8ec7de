"""Finished rows are crash-safe, and used only by the run that they belong to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from segmenter_fast.inference.resume import FinishedRows, describe_image, describe_run, resume_files
from segmenter_fast.inference.settings import Settings

ROWS = np.arange(60, dtype=np.uint8).reshape(10, 6)
SIZE = (10, 6)


def opened(folder: Path, resume: bool = True, run: dict[str, object] | None = None) -> FinishedRows:
    run = run or {"model": 1, "options": 2, "image": 3}
    return FinishedRows(folder / "x.tif", run, SIZE, np.dtype(np.uint8), resume)


def test_rows_come_back(tmp_path: Path) -> None:
    first = opened(tmp_path)
    first.append(ROWS[:4])
    first.append(ROWS[4:5])
    again = opened(tmp_path)
    assert again.count == 5
    assert again.restarted is None
    again.append(ROWS[5:])
    assert np.array_equal(again.read(3, 9), ROWS[3:9])
    assert [len(band) for band in again.bands(4)] == [4, 4, 2]
    assert np.array_equal(np.concatenate(list(again.bands(3))), ROWS)
    again.remove()
    assert not list(tmp_path.iterdir())


def test_a_row_cut_short_does_not_count(tmp_path: Path) -> None:
    opened(tmp_path).append(ROWS[:3])
    with open(resume_files(tmp_path / "x.tif")[0], "ab") as file:
        file.write(b"half")
    again = opened(tmp_path)
    assert again.count == 3
    again.append(ROWS[3:])
    assert np.array_equal(again.read(0, 10), ROWS)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        ({"model": 0, "options": 2, "image": 3}, "the interrupted run had another model"),
        ({"model": 1, "options": 0, "image": 0}, "the interrupted run had other options and another image"),
    ],
)
def test_another_run_starts_with_no_rows_and_says_why(run: dict[str, object], reason: str, tmp_path: Path) -> None:
    opened(tmp_path).append(ROWS[:3])
    other = opened(tmp_path, run=run)
    assert other.count == 0
    assert other.restarted == reason
    assert opened(tmp_path, run=run).restarted is None


def test_without_resume_nothing_is_used(tmp_path: Path) -> None:
    opened(tmp_path).append(ROWS[:3])
    assert opened(tmp_path, resume=False).count == 0


@pytest.mark.parametrize("broken", ["", "[1]", "{"])
def test_a_broken_description_starts_with_no_rows(broken: str, tmp_path: Path) -> None:
    opened(tmp_path).append(ROWS[:3])
    resume_files(tmp_path / "x.tif")[1].write_text(broken)
    again = opened(tmp_path)
    assert again.count == 0
    assert again.restarted


def test_rows_without_a_description_are_not_used(tmp_path: Path) -> None:
    opened(tmp_path).append(ROWS[:3])
    resume_files(tmp_path / "x.tif")[1].unlink()
    assert opened(tmp_path).count == 0


def test_a_description_changes_with_all_that_labels_depend_on(tmp_path: Path) -> None:
    image = tmp_path / "x.png"
    image.write_bytes(b"image")
    model, settings = nn.Linear(3, 2), Settings(512, 480)

    def of(model: nn.Module = model, settings: Settings = settings) -> dict[str, object]:
        return describe_run(model, settings) | describe_image(image)

    first = of()
    assert of() == first
    assert of(settings=Settings(512, 480, flip=True)) != first
    assert of(settings=Settings(512, 480, (1.0, 2.0))) != first
    assert of(nn.Linear(3, 2)) != first
    with torch.no_grad():
        model.bias += 1
    assert of() != first
    changed = of()
    image.write_bytes(b"other")
    assert of() != changed
