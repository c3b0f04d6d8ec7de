"""``segmenter-fast train``: options become the recipe; mistakes give one line and exit code 2."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import segmenter_fast as sf
from segmenter_fast.cli import app
from segmenter_fast.train import datasets
from segmenter_fast.train.datasets.base import SampleError
from segmenter_fast.train.logs import read_log
from support.training import Signalled, Squares, small_model

SIZES = {"steps": 2, "batch-size": 2, "crop": 32, "resize": 32, "window": 32, "stride": 32, "workers": 0, "pictures": 0}
SMALL = [part for name, value in SIZES.items() for part in (f"--{name}", str(value))]
NUMERICS = ["--precision", "float32", "--device", "cpu", "--log-every", "1"]


@pytest.fixture
def squares(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Data sets that the data option opens, by split, and the kind that was asked for."""
    opened: dict[str, Any] = {"train": Squares(), "val": Squares(2, 1)}

    def open_dataset(data: str, kind: str, split: str, options: object) -> Any:
        opened["kind"] = kind
        return opened[split]

    monkeypatch.setattr(datasets, "open_dataset", open_dataset)
    return opened


def run(out: Path, *options: str, preset: str = "folder") -> Result:
    given = ["train", "--data", "x", "--preset", preset, "--out", str(out), *SMALL, *NUMERICS, *options]
    return CliRunner().invoke(app, given)


def test_options_override_the_preset(tmp_path: Path, squares: dict[str, Any]) -> None:
    done = run(tmp_path, "--lr", "0.002", "--no-flip", "--optimizer", "sgd")
    assert done.exit_code == 0, done.output
    assert "2 steps done, 2 in this call, 0 skipped; " in done.output
    recipe = json.loads((tmp_path / "run.json").read_text())["recipe"]
    assert (recipe["lr"], recipe["flip"], recipe["optimizer"], recipe["clip"]) == (0.002, False, "sgd", 1.0)
    assert squares["kind"] == "folder"
    config = sf.load(tmp_path / "last").config
    assert (config.variant, config.class_names, config.image_size) == ("seg_t_mask_16", Squares.class_names, (32, 32))


def test_epochs_overrule_a_preset_that_counts_steps(tmp_path: Path, squares: dict[str, Any]) -> None:
    done = run(tmp_path, "--epochs", "1", "--steps", "0", "--batch-size", "5", preset="shapes")
    assert done.exit_code == 0, done.output
    assert "2 steps done" in done.output


def test_a_checkpoint_with_other_classes_is_refused_without_new_classes(
    tmp_path: Path, squares: dict[str, Any]
) -> None:
    fields = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3, "num_classes": 5}
    small_model(decoder_depth=2, decoder_num_heads=3, **fields).save_pretrained(tmp_path / "start")
    start = ["--pretrained", str(tmp_path / "start")]
    refused = run(tmp_path / "run", *start)
    assert refused.exit_code == 2
    assert "has 5 classes, the data 2: --new-classes starts from random class weights" in refused.output
    taken = run(tmp_path / "run", *start, "--new-classes", "--freeze", "encoder")
    assert taken.exit_code == 0, taken.output
    assert "need training" in taken.output
    encoders = [sf.load(tmp_path / name).encoder.norm.weight for name in ("start", "run/last")]
    assert encoders[0].equal(encoders[1])


@pytest.mark.parametrize(("given", "kept"), [((), True), (("--merge", "none"), False)])
def test_a_checkpoint_keeps_its_merging_where_no_other_is_given(
    given: tuple[str, ...], kept: bool, tmp_path: Path, squares: dict[str, Any]
) -> None:
    fields = {"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 2, "merging": "fast"}
    start = small_model(**fields)
    start.save_pretrained(tmp_path / "start")
    done = run(tmp_path / "run", "--variant", "seg_m_mask_8", "--pretrained", str(tmp_path / "start"), *given)
    assert done.exit_code == 0, done.output
    assert sf.load(tmp_path / "run/last").config.merging == (start.config.merging if kept else None)


def test_another_run_and_another_recipe_are_refused(tmp_path: Path, squares: dict[str, Any]) -> None:
    assert run(tmp_path).exit_code == 0
    again = run(tmp_path)
    assert again.exit_code == 2
    assert "holds a run" in again.output
    other = run(tmp_path, "--resume", "auto", "--lr", "0.5")
    assert other.exit_code == 2
    assert "lr is 0.5, was 0.0001" in other.output


def test_a_signal_ends_with_the_code_that_help_tells(tmp_path: Path, squares: dict[str, Any]) -> None:
    squares["train"] = Signalled(reads=2, number=signal.SIGTERM)
    stopped = run(tmp_path)
    assert stopped.exit_code == 75, stopped.output
    assert "--resume auto goes on" in stopped.output
    squares["train"] = Squares()
    assert "2 steps done, 1 in this call, 0 skipped; " in run(tmp_path, "--resume", "auto").output
    assert "2 steps done, 0 in this call, 0 skipped; " in run(tmp_path, "--resume", "auto").output
    assert [record["step"] for record in read_log(tmp_path) if record["kind"] == "step"] == [1, 2]
    assert "75" in CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).output


class Broken(Squares):
    def read(self, index: int) -> Any:
        if index == 3:
            raise SampleError("photos/square-3.png cannot be read")
        return super().read(index)


def test_a_broken_sample_is_fatal_or_skipped(tmp_path: Path, squares: dict[str, Any]) -> None:
    squares["train"] = Broken()
    fatal = run(tmp_path / "raise", "--steps", "5")
    assert fatal.exit_code == 2
    assert fatal.output.splitlines()[-1] == "error: photos/square-3.png cannot be read"
    skipped = run(tmp_path / "skip", "--steps", "5", "--broken", "skip")
    assert skipped.exit_code == 0, skipped.output
    assert [record["message"] for record in read_log(tmp_path / "skip") if record["kind"] == "broken"] == [
        "photos/square-3.png cannot be read; another sample takes its place"
    ]


def test_a_folder_made_and_mislabelled(tmp_path: Path) -> None:
    made = CliRunner().invoke(app, ["dataset", "make", str(tmp_path / "data"), "--images", "5", "--size", "32"])
    assert made.exit_code == 0, made.output
    given = ["train", "--data", str(tmp_path / "data"), "--preset", "folder", *SMALL, *NUMERICS]
    trained = CliRunner().invoke(app, [*given, "--out", str(tmp_path / "run")])
    assert trained.exit_code == 0, trained.output
    assert len(sf.load(tmp_path / "run" / "best").config.class_names) > 1
    for path in (tmp_path / "data").glob("labels/train/*.png"):
        Image.new("L", (32, 32), 77).save(path)
    wrong = CliRunner().invoke(app, [*given, "--out", str(tmp_path / "wrong"), "--workers", "1"])
    assert wrong.exit_code == 2
    assert "labels/train/" in wrong.output
    assert "77" in wrong.output
    for path in (tmp_path / "data").glob("images/train/*"):
        path.unlink()
    empty = CliRunner().invoke(app, [*given, "--out", str(tmp_path / "empty")])
    missing = CliRunner().invoke(app, ["train", "--data", str(tmp_path / "none"), *given[3:], "--out", "x"])
    for failed in (empty, missing):
        assert failed.exit_code == 2, failed.output
        assert failed.output.startswith("error: ")
        assert str(tmp_path) in failed.output


def test_mistakes_are_one_line(tmp_path: Path, squares: dict[str, Any]) -> None:
    for options, message in {
        ("--lr", "-1"): "error: lr must be positive",
        ("--variant", "seg_x"): "error: unknown variant 'seg_x'",
        ("--pretrained", str(tmp_path / "nothing")): "nothing",
        ("--accumulate", "3"): "error: accumulate must be at most 2",
        ("--class-map", "ground=x"): "of a checkpoint with a decoder: give one as --pretrained",
        ("--class-map", "order", "--pretrained", "timm"): "of a checkpoint with a decoder: --pretrained timm has none",
    }.items():
        failed = run(tmp_path / "run", *options)
        assert failed.exit_code == 2, options
        assert message in failed.output
    os.mkdir(tmp_path / "closed")
    (tmp_path / "closed" / "run").touch()
    failed = run(tmp_path / "closed" / "run")
    assert failed.exit_code == 2
    assert "cannot be written" in failed.output
