"""The run's folder: room on the disk, scores, and checkpoints that are whole or not there."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import segmenter_fast as sf
from segmenter_fast.processes import World
from segmenter_fast.train import run_folder
from segmenter_fast.train.engine import train
from segmenter_fast.train.logs import read_log
from segmenter_fast.train.run_folder import (
    EvaluationSummary,
    checkpoint_path,
    checkpoint_steps,
    read_checkpoint,
    save_checkpoint,
)
from segmenter_fast.train.stepping import Stepper
from segmenter_fast.weights.reading import CheckpointError
from support import training as support
from support.training import RECIPE, Squares, small_model, weights

CONFIG = small_model().config


def state(step: int) -> dict[str, Any]:
    """The content of a checkpoint."""
    return {**Stepper(small_model(), 255, RECIPE, 10, World()).state_dict(), "step": step}


def test_a_disk_without_room_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10_000_000))
    run_folder.require_room(tmp_path, RECIPE, 100_000, 100_000)
    recipe = RECIPE.replace(optimizer="adamw", ema=0.9)
    with pytest.raises(OSError, match=r"has 0\.01 GB free, and the run needs 0\.08 GB .* lower --keep, which is 2"):
        run_folder.require_room(tmp_path, recipe, 1_000_000, 1_000_000)


def test_leftovers_of_a_killed_process_go(tmp_path: Path) -> None:
    model = small_model()
    assert run_folder.open_run(tmp_path, RECIPE, model, 10, resume=True) == (None, [])
    left = tmp_path / "checkpoints" / ".saving-abc"
    left.mkdir()
    (left / "step-0000004.pt").touch()
    assert run_folder.open_run(tmp_path, RECIPE, model, 10, resume=True) == (None, []), "there is nothing to lose yet"
    left.mkdir()
    save_checkpoint(tmp_path, state(2))
    content, problems = run_folder.open_run(tmp_path, RECIPE, model, 10, resume=True)
    assert content is not None
    assert (content["step"], problems) == (2, [])
    assert not left.exists()
    assert sf.load(tmp_path / "last").config == model.config


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"the run's folder .*file/run cannot be written: "):
        run_folder.open_run(tmp_path / "file" / "run", RECIPE, small_model(), 10, resume=False)


def test_the_summary_knows_the_best_and_leaves_out_later_steps(tmp_path: Path) -> None:
    run_folder.export_last(tmp_path, CONFIG, {"model": {"x": torch.ones(2)}, "ema": None})
    summary = EvaluationSummary().after(2, 0.5).after(4, 0.7).after(6, 0.7)
    assert summary == EvaluationSummary(6, 0.7, 4, 0.7)
    assert run_folder.read_scores(tmp_path, 9) == EvaluationSummary()
    run_folder.save_scores(tmp_path, summary, keep=1)
    assert not (tmp_path / "best").exists()
    assert run_folder.read_scores(tmp_path, 6) == summary
    assert run_folder.read_scores(tmp_path, 5) == EvaluationSummary(4, 0.7, 4, 0.7)
    assert run_folder.read_scores(tmp_path, 3) == EvaluationSummary()


def test_the_best_model_is_a_copy_of_the_last(tmp_path: Path) -> None:
    average = {"model": {"x": torch.zeros(2)}, "updates": 3}
    run_folder.export_last(tmp_path, CONFIG, {"model": {"x": torch.ones(2)}, "ema": average})
    run_folder.save_scores(tmp_path, EvaluationSummary().after(2, 0.5), keep=1)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "best" / name).read_bytes() == (tmp_path / "last" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == ["config.json", "model.safetensors"]


def test_names_of_other_files_do_not_count(tmp_path: Path) -> None:
    assert checkpoint_steps(tmp_path) == []
    (tmp_path / "checkpoints").mkdir()
    for name in ("step-0000010.pt", "step-0000002.pt", "step-12345678.pt", "step-3.pt", "step-0000004.pt.part"):
        (tmp_path / "checkpoints" / name).touch()
    assert checkpoint_steps(tmp_path) == [2, 10, 12345678]
    run_folder.prune(tmp_path, keep=1, best_step=2)
    assert checkpoint_steps(tmp_path) == [2, 12345678]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    options = {"recipe": RECIPE, "out": tmp_path, "device": "cpu"}
    train(small_model(), Squares(), Squares(4, 1), **options)
    wanted = weights(tmp_path)
    newest = checkpoint_path(tmp_path, 6)
    newest.write_bytes(newest.read_bytes()[:1000])
    result = train(small_model(), Squares(), Squares(4, 1), resume="auto", **options)
    assert (result.steps, result.finished) == (6, True)
    assert all(torch.equal(wanted[key], value) for key, value in weights(tmp_path).items())
    [warning] = [record["message"] for record in read_log(tmp_path) if record["kind"] == "warning"]
    assert "step-0000006.pt is damaged" in warning
    for step in checkpoint_steps(tmp_path):
        checkpoint_path(tmp_path, step).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read: .*0000006.pt .*0000004.pt"):
        train(small_model(), Squares(), None, resume="auto", **options)


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    for content, message in (
        ({"model": {}}, "no checkpoint of a training run"),
        ({**state(0), "format_version": 2}, "has format 2; this program reads 1"),
    ):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(tmp_path / "x.pt")


@contextmanager
def full_disk(free: int) -> Iterator[None]:
    """No file may grow beyond so many bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(tmp_path: Path) -> None:
    earlier = save_checkpoint(tmp_path, state(2))
    before = earlier.read_bytes()
    content = state(3)
    with (
        full_disk(len(before) // 2),
        pytest.raises(OSError, match=r"is the disk full. the checkpoint of step 2 is whole"),
    ):
        save_checkpoint(tmp_path, content)
    assert [path.name for path in earlier.parent.iterdir()] == [earlier.name]
    assert earlier.read_bytes() == before


def test_a_run_goes_on_after_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = torch.save

    def limited(content: dict[str, Any], path: Path) -> None:
        with full_disk(20_000) if content["step"] == 4 else full_disk(-1):
            write(content, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", limited)
        with pytest.raises(OSError, match=r"step-0000004.pt cannot be written .*the checkpoint of step 2 is whole"):
            train(small_model(), Squares(), None, RECIPE, tmp_path / "parts", device="cpu")
    train(small_model(), Squares(), None, RECIPE, tmp_path / "parts", device="cpu", resume="auto")
    train(small_model(), Squares(), None, RECIPE, tmp_path / "whole", device="cpu")
    wanted = weights(tmp_path / "whole")
    assert all(torch.equal(wanted[key], value) for key, value in weights(tmp_path / "parts").items())


def test_a_process_killed_in_mid_save_goes_on_from_the_last_whole_checkpoint(tmp_path: Path) -> None:
    program = [sys.executable, support.__file__, "slow", str(tmp_path / "parts"), "{}"]
    variables = {"PYTHONPATH": str(Path(support.__file__).parents[1]), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(program, env=os.environ | variables, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            half = Path(process.stdout.readline().strip())  # appears when the second checkpoint is half written
            assert half.exists()
        finally:
            process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    assert checkpoint_steps(tmp_path / "parts") == [2]
    for name in ("parts", "whole"):
        train(small_model(), Squares(), Squares(4, 1), RECIPE, tmp_path / name, device="cpu", resume="auto")
    assert not half.exists()
    wanted = weights(tmp_path / "whole")
    assert all(torch.equal(wanted[key], value) for key, value in weights(tmp_path / "parts").items())
    assert sf.load(tmp_path / "parts" / "last").config.num_classes == 2
