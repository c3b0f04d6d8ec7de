"""Checkpoints: written whole or not at all, read back exactly, pruned."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import segmenter_fast as sf
from segmenter_fast.processes import World
from segmenter_fast.train import checkpoints
from segmenter_fast.train.checkpoints import Training
from segmenter_fast.train.engine import train
from segmenter_fast.train.logs import read_log
from segmenter_fast.train.preparing import prepare
from segmenter_fast.train.presets import Recipe
from segmenter_fast.weights.reading import CheckpointError
from support import training as support
from support.training import RECIPE, Squares, small_model, weights

HERE = World()


def trained(recipe: Recipe, steps: int) -> Training:
    """After some steps on noise."""
    module, training = prepare(small_model(recipe), 255, recipe, 10, torch.float32, HERE)
    stepper = support.Stepper(module, training, recipe, HERE, torch.float32)
    for seed in range(steps):
        draw = torch.Generator().manual_seed(seed)
        images = torch.randn(2, 3, 32, 32, generator=draw)
        stepper.step([(images, torch.randint(0, 2, (2, 32, 32), generator=draw))], 255, lambda: False)
    return training


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_everything_comes_back(tmp_path: Path, optimizer: str) -> None:
    recipe = RECIPE.replace(optimizer=optimizer, ema=0.9, lr=1e-2)
    before = trained(recipe, 3)
    path = checkpoints.save(tmp_path, checkpoints.gathered(before))
    assert path == tmp_path / "checkpoints" / "step-0000003.pt"
    after = trained(recipe, 0)
    checkpoints.restore(after, checkpoints.read(path), HERE)
    for name in ("model", "optimizer", "schedule", "scaler", "ema"):
        left, right = (getattr(training, name).state_dict() for training in (before, after))
        torch.testing.assert_close(left, right, rtol=0, atol=0, msg=name)
    assert after.step == 3


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    content = checkpoints.gathered(trained(RECIPE, 1))
    with pytest.raises(CheckpointError, match="the checkpoint of step 1 has no average of weights"):
        checkpoints.restore(trained(RECIPE.replace(ema=0.5), 0), content, HERE)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        checkpoints.restore(trained(RECIPE, 0), {**content, "model": small_model(embed_dim=64).state_dict()}, HERE)


def test_names_of_other_files_do_not_count(tmp_path: Path) -> None:
    assert checkpoints.steps_kept(tmp_path) == []
    (tmp_path / "checkpoints").mkdir()
    for name in ("step-0000010.pt", "step-0000002.pt", "step-12345678.pt", "step-3.pt", "step-0000004.pt.part"):
        (tmp_path / "checkpoints" / name).touch()
    assert checkpoints.steps_kept(tmp_path) == [2, 10, 12345678]
    checkpoints.prune(tmp_path, keep=1, best_step=2)
    assert checkpoints.steps_kept(tmp_path) == [2, 12345678]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    options = {"recipe": RECIPE, "out": tmp_path, "device": "cpu"}
    train(small_model(), Squares(), Squares(4, 1), **options)
    wanted = weights(tmp_path)
    newest = checkpoints.path_of(tmp_path, 6)
    newest.write_bytes(newest.read_bytes()[:1000])
    result = train(small_model(), Squares(), Squares(4, 1), resume="auto", **options)
    assert (result.steps, result.finished) == (6, True)
    assert all(torch.equal(wanted[key], value) for key, value in weights(tmp_path).items())
    [warning] = [record["message"] for record in read_log(tmp_path) if record["kind"] == "warning"]
    assert "step-0000006.pt is damaged" in warning
    for step in checkpoints.steps_kept(tmp_path):
        checkpoints.path_of(tmp_path, step).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read: .*0000006.pt .*0000004.pt"):
        train(small_model(), Squares(), None, resume="auto", **options)


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    for content, message in (
        ({"model": {}}, "no checkpoint of a training run"),
        ({**checkpoints.gathered(trained(RECIPE, 0)), "format_version": 2}, "has format 2; this program reads 1"),
    ):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match=message):
            checkpoints.read(tmp_path / "x.pt")


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
    training = trained(RECIPE, 2)
    earlier = checkpoints.save(tmp_path, checkpoints.gathered(training))
    before = earlier.read_bytes()
    training.step = 3
    content = checkpoints.gathered(training)
    with (
        full_disk(len(before) // 2),
        pytest.raises(OSError, match=r"is the disk full. the checkpoint of step 2 is whole"),
    ):
        checkpoints.save(tmp_path, content)
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
    assert checkpoints.steps_kept(tmp_path / "parts") == [2]
    for name in ("parts", "whole"):
        train(small_model(), Squares(), Squares(4, 1), RECIPE, tmp_path / name, device="cpu", resume="auto")
    assert not half.exists()
    wanted = weights(tmp_path / "whole")
    assert all(torch.equal(wanted[key], value) for key, value in weights(tmp_path / "parts").items())
    assert sf.load(tmp_path / "parts" / "last").config.num_classes == 2
