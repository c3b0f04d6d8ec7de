"""A run's folder is never lost, mixed or misread: signs of a run, the lock, damaged files, other data, more epochs."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from segmenter_fast.train import run_folder
from segmenter_fast.train.datasets.base import SampleError
from segmenter_fast.train.datasets.layouts import open_dataset
from segmenter_fast.train.datasets.shapes import make_folder
from segmenter_fast.train.engine import TrainResult, train
from segmenter_fast.train.logs import RunLog, read_log
from segmenter_fast.train.ownership import lock
from segmenter_fast.train.presets import Recipe
from segmenter_fast.train.run_folder import checkpoint_path, checkpoint_steps
from segmenter_fast.train.same_run import fingerprint
from segmenter_fast.weights.reading import CheckpointError
from support.training import RECIPE, Squares, small_model, weights

VALIDATION = Squares(4, 1)


def run(out: Path, recipe: Recipe = RECIPE, data: Any = None, val: Any = VALIDATION, **options: Any) -> TrainResult:
    return train(small_model(recipe), data or Squares(), val, recipe, out, device="cpu", **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    run(out)
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize("sign", ["run.json", "scores.json", "last", "best", "log.jsonl"])
def test_any_sign_of_a_run_needs_resume_or_overwrite(sign: str, out: Path) -> None:
    for path in out.iterdir():
        if path.name != sign:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match=rf"holds {sign} of a run, but no checkpoint .* --overwrite"):
        run(out)
    if sign in ("scores.json", "last", "best"):
        with pytest.raises(FileExistsError, match="no checkpoint to go on from"):
            run(out, resume="auto")
    assert all(path.read_bytes() == content for path, content in before.items())


def test_fields_that_an_earlier_version_did_not_have_have_their_defaults(out: Path) -> None:
    described = json.loads((out / "run.json").read_text())
    for name in ("in_channels", "bands", "pixel_scale"):
        del described["model"][name]
    (out / "run.json").write_text(json.dumps(described))
    assert run(out, resume="auto").finished
    described["model"]["in_channels"] = 4
    (out / "run.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="the model's in_channels is 3, was 4"):
        run(out, resume="auto")


def test_overwrite_starts_a_new_run(out: Path) -> None:
    (out / "notes.txt").write_text("mine")
    result = run(out, RECIPE.replace(steps=2, evaluate_every=2, seed=3), overwrite=True)
    assert result.steps == 2
    assert checkpoint_steps(out) == [2]
    assert [record["step"] for record in read_log(out) if record["kind"] == "evaluation"] == [2]
    assert json.loads((out / "scores.json").read_text())["best_step"] == 2
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="resume a run or overwrite it, not both"):
        run(out, resume="auto", overwrite=True)


def test_overwrite_removes_nothing_that_no_run_wrote(out: Path, tmp_path: Path) -> None:
    mine = ("best/notes.txt", "samples/photo.png", "checkpoints/mine.pt", "tensorboard/x")
    for name in mine:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match=r"best/notes.txt, checkpoints/mine.pt, samples/photo.png and 1 more, wh"):
        run(out, overwrite=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"} == {
        path: content for path, content in before.items() if path.name != ".lock"
    }
    for name in mine:
        (out / name).unlink()
    assert run(out, RECIPE.replace(steps=2), overwrite=True).finished
    (tmp_path / "folder/best").mkdir(parents=True)  # of a user, in a folder without a run
    (tmp_path / "folder/best/model.safetensors").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds best/model\.safetensors, which no run is recorded"):
        run(tmp_path / "folder", overwrite=True)


def test_a_record_of_files_that_are_gone_is_forgotten(out: Path) -> None:
    for path in out.iterdir():
        if path.name not in (".written", ".lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    run(out, RECIPE.replace(steps=1, evaluate_every=1, save_every=1, pictures=0), val=None)
    (out / "best").mkdir()
    (out / "best/config.json").write_text("mine")  # the run before wrote such a file, this one did not
    with pytest.raises(FileExistsError, match=r"holds best/config\.json, which no run is recorded"):
        run(out, overwrite=True)


def test_overwrite_removes_the_files_behind_a_link_to_a_folder(out: Path, tmp_path: Path) -> None:
    shutil.move(out / "checkpoints", tmp_path / "disk")
    (out / "checkpoints").symlink_to(tmp_path / "disk")
    left = out / "last/.saving-x"
    left.mkdir()
    (left / "model.safetensors").touch()  # of a process that was killed
    run(out, RECIPE.replace(steps=2), overwrite=True)
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["step-0000002.pt"]


class Unreadable(Squares):
    def __init__(self, reads: int) -> None:
        super().__init__()
        self.__dict__["left"] = reads

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        self.__dict__["left"] -= 1
        if self.__dict__["left"] < 0:
            raise SampleError("x.png cannot be read")
        return super().read(index)


def test_a_first_training_that_failed_before_its_first_step_needs_no_overwrite(tmp_path: Path) -> None:
    for reads in (0, 4):  # a step takes four
        with pytest.raises(SampleError):
            run(tmp_path, data=Unreadable(reads))
    with pytest.raises(FileExistsError, match=r"holds run.json, log.jsonl, .* but no checkpoint"):
        run(tmp_path)
    assert run(tmp_path, RECIPE.replace(steps=2), overwrite=True).finished


def test_a_second_training_on_one_folder_is_refused(tmp_path: Path) -> None:
    held = lock(tmp_path / "run")
    with pytest.raises(OSError, match=r"another training writes to .*run: wait for its end, or choose another --out"):
        run(tmp_path / "run")
    held.release()
    assert run(tmp_path / "run", RECIPE.replace(steps=2)).finished


@pytest.mark.parametrize("damage", ["half", "bytes", "folder", "link", "pipe", "list", "step", "optimizer", "model"])
def test_a_damaged_latest_checkpoint_gives_way_and_is_kept_aside(damage: str, out: Path) -> None:
    wanted, newest = weights(out), checkpoint_path(out, 6)
    whole = newest.read_bytes()
    newest.unlink()
    if damage == "half":
        newest.write_bytes(whole[: len(whole) // 2])
    elif damage == "bytes":  # of a tensor, in a file that is whole otherwise
        middle = len(whole) // 2
        newest.write_bytes(
            whole[:middle] + bytes([byte ^ 0xFF for byte in whole[middle : middle + 64]]) + whole[middle + 64 :]
        )
    elif damage == "folder":
        newest.mkdir()
        (newest / "x").touch()
    elif damage == "link":
        newest.symlink_to("nowhere")
    elif damage == "pipe":
        os.mkfifo(newest)
    elif damage == "list":
        torch.save([1, 2], newest)
    else:
        newest.write_bytes(whole)
        torch.save({**torch.load(newest), damage: {"x": [1]} if damage == "model" else "six"}, newest)
    result = run(out, resume="auto")
    assert (result.steps, result.finished) == (6, True)
    [warning] = [record["message"] for record in read_log(out) if record["kind"] == "warning"]
    assert warning.startswith("an earlier checkpoint is used, as ")
    assert warning.endswith("it is now step-0000006.pt.unreadable")
    assert os.path.lexists(newest.with_name("step-0000006.pt.unreadable"))
    assert all(torch.equal(wanted[key], value) for key, value in weights(out).items())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", "[]", "must hold a mapping"),
        ("run.json", '{"recipe": 5, "model": {}}', "is no description of a run: model and recipe must be mappings"),
        ("run.json", '{"recipe": {"lr": "fast"}, "model": {}}', "is no description of a run"),
        ("run.json", "{", "is refused as JSON"),
        ("scores.json", '{"last_step": 3}', "must hold the numbers last_step, last_miou, best_step, best_miou"),
        ("scores.json", '{"last_step": 4, "last_miou": "x", "best_step": 4, "best_miou": 1}', "must hold the numbers"),
    ],
)
def test_a_malformed_file_is_one_error(name: str, content: str, message: str, out: Path) -> None:
    (out / name).write_text(content)
    with pytest.raises(CheckpointError, match=message) as raised:
        run(out, resume="auto")
    assert str(out / name) in str(raised.value)


@pytest.mark.parametrize("part", ["optimizer", "schedule"])
def test_a_checkpoint_that_does_not_load_is_one_error(part: str, out: Path) -> None:
    path = checkpoint_path(out, 6)
    torch.save({**torch.load(path), part: {"state": [1], "param_groups": 3, "last_epoch": {}}}, path)
    with pytest.raises(CheckpointError, match="the checkpoint of step 6 does not fit the model, or is damaged: "):
        run(out, resume="auto")


def test_a_checkpoint_of_another_model_replaces_nothing(out: Path) -> None:
    path, before = checkpoint_path(out, 6), (out / "last/model.safetensors").read_bytes()
    content = torch.load(path)
    content["model"]["encoder.norm.weight"] = torch.ones(3)
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"step 6 does not fit the model: encoder\.norm\.weight"):
        run(out, resume="auto")
    assert (out / "last/model.safetensors").read_bytes() == before


def test_a_finished_run_can_be_lengthened(out: Path) -> None:
    longer = RECIPE.replace(steps=10)
    result = run(out, longer, resume="auto")
    assert (result.steps, result.finished) == (10, True)
    records = read_log(out)
    [message] = [record["message"] for record in records if record["kind"] == "lengthened"]
    assert message == "from 6 to 10 steps: the learning rate goes on as in a run of that length from the start"
    rates = {record["step"]: record["lr"] for record in records if record["kind"] == "step"}
    for step in (7, 8, 10):
        left = (1 - (step - 1) / 10) ** longer.power
        assert rates[step] == pytest.approx((longer.lr - longer.min_lr) * left + longer.min_lr)
    assert json.loads((out / "run.json").read_text())["recipe"]["steps"] == 10
    with pytest.raises(ValueError, match=r"steps is 8, was 10\. Go on"):
        run(out, RECIPE.replace(steps=8), resume="auto")


def test_a_run_that_is_not_finished_cannot_be_lengthened(out: Path) -> None:
    checkpoint_path(out, 6).unlink()
    with pytest.raises(ValueError, match=r"steps is 10, was 6\. Go on .*a finished run may get more --epochs"):
        run(out, RECIPE.replace(steps=10), resume="auto")


def test_an_evaluation_that_was_killed_before_its_end_appears_once(tmp_path: Path) -> None:
    save = run_folder.save_scores

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "save_scores", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert [record["step"] for record in read_log(tmp_path) if record["kind"] == "evaluation"] == [4]
    assert run_folder.save_scores is save
    run(tmp_path, resume="auto")
    assert [record["step"] for record in read_log(tmp_path) if record["kind"] == "evaluation"] == [4, 6]


def test_a_log_keeps_an_evaluation_that_is_complete(tmp_path: Path) -> None:
    run(tmp_path, RECIPE.replace(steps=4))
    for evaluated, left in ((True, [4]), (False, [])):
        with RunLog(tmp_path, 4, 4, resumed_step=4, evaluated=evaluated):
            pass
        assert [record["step"] for record in read_log(tmp_path) if record["kind"] == "evaluation"] == left


@dataclass(frozen=True)
class Renamed(Squares):
    def name(self, index: int) -> str:
        return f"square-{(index + 1) % self.length}"


def test_resume_notices_renamed_images(out: Path) -> None:
    with pytest.raises(ValueError, match="the data has other images: some were renamed, swapped or changed"):
        run(out, data=Renamed(), resume="auto")


def test_images_that_were_swapped_have_another_fingerprint(tmp_path: Path) -> None:
    make_folder(tmp_path, 5, 32, 0)
    first, second, *_ = sorted((tmp_path / "images/train").iterdir())
    for path, seed in ((first, 0), (second, 1)):  # noise of one size, which PNG does not compress
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)).save(path, "PNG")
    before = fingerprint(open_dataset(tmp_path))
    os.utime(first)
    assert fingerprint(open_dataset(tmp_path)) == before
    content = first.read_bytes()
    assert len(content) == second.stat().st_size
    second.replace(first)
    second.write_bytes(content)
    assert fingerprint(open_dataset(tmp_path)) != before
