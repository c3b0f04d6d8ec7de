"""The run's folder: room on the disk, standing, leftovers."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from segmenter_fast.train import run_folder
from segmenter_fast.train.run_folder import Standing
from support.training import RECIPE, small_model

CONFIG = small_model().config


def test_a_disk_without_room_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10_000_000))
    run_folder.require_room(tmp_path, RECIPE, 100_000, 100_000)
    recipe = RECIPE.replace(optimizer="adamw", ema=0.9)
    with pytest.raises(OSError, match=r"has 0\.01 GB free, and the run needs 0\.08 GB .* lower --keep, which is 2"):
        run_folder.require_room(tmp_path, recipe, 1_000_000, 1_000_000)


def test_leftovers_of_a_killed_process_go(tmp_path: Path) -> None:
    assert not run_folder.open_run(tmp_path, RECIPE, CONFIG, 10, resume=True)
    left = tmp_path / "checkpoints" / ".saving-abc"
    left.mkdir()
    (left / "step-0000004.pt").touch()
    assert not run_folder.open_run(tmp_path, RECIPE, CONFIG, 10, resume=False), "there is nothing to lose yet"
    left.mkdir()
    (tmp_path / "checkpoints" / "step-0000002.pt").touch()
    assert run_folder.open_run(tmp_path, RECIPE, CONFIG, 10, resume=True)
    assert not left.exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"the run's folder .*file/run cannot be written: "):
        run_folder.open_run(tmp_path / "file" / "run", RECIPE, CONFIG, 10, resume=False)


def test_a_standing_knows_the_best_and_forgets_the_future(tmp_path: Path) -> None:
    standing = Standing().after(2, 0.5).after(4, 0.7).after(6, 0.7)
    assert standing == Standing(6, 0.7, 4, 0.7)
    assert run_folder.read_standing(tmp_path, 9) == Standing()
    run_folder.write_standing(tmp_path, standing)
    assert run_folder.read_standing(tmp_path, 6) == standing
    assert run_folder.read_standing(tmp_path, 5) == Standing(4, 0.7, 4, 0.7)
    assert run_folder.read_standing(tmp_path, 3) == Standing()


def test_the_best_model_is_a_copy_of_the_last(tmp_path: Path) -> None:
    run_folder.export(tmp_path, run_folder.LAST, CONFIG, {"x": torch.ones(2)})
    run_folder.copy_to_best(tmp_path)
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("last", "best")]
    assert files[0] == files[1] == ["config.json", "model.safetensors"]
