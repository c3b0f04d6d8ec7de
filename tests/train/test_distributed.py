"""Many processes compute what one computes, and a lost one ends the run without losing it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from segmenter_fast.processes import World
from segmenter_fast.train import checkpoints
from segmenter_fast.train.batches import Batches
from segmenter_fast.train.engine import train
from support import training as support
from support.training import RECIPE, Squares, small_model, step_gradients, weights

HERE = World()
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs a PyTorch with torch.distributed")


FIELDS = {"drop_path": 0.0, "ema": 0.9, "optimizer": "muon", "lr": 1e-3, "clip": 0.5}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """What two processes under torchrun left, see the support program, of which one was killed in the end."""
    out = tmp_path_factory.mktemp("two")
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", support.__file__]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(support.__file__).parents[1])}
    fields = json.dumps({**FIELDS, "parallel": "fsdp"})
    arguments = [*program, "ranks", str(out), fields]
    return out, subprocess.run(arguments, env=variables, capture_output=True, text=True, timeout=240)


def test_gradients_of_two_processes_are_those_of_one_with_the_double_batch(two: Any) -> None:
    out, done = two
    wanted = step_gradients(HERE, RECIPE.replace(drop_path=0.0))
    # As many ignored pixels in one half of the batch as in the other would hide a mean of means.
    shares = [sum(int((Squares().read(index)[1] != 255).sum()) for index in half) for half in ((0, 1), (2, 3))]
    assert shares[0] > 1.2 * shares[1]
    for name in ("ddp-1", "ddp-2", "fsdp-1", "fsdp-2"):
        assert (out / f"{name}.pt").exists(), done.stderr
        found = torch.load(out / f"{name}.pt")
        assert found.keys() == wanted.keys()
        assert max((found[key] - wanted[key]).abs().max() for key in wanted) < 1e-6, name


def test_a_signal_to_one_process_stops_all_and_a_killed_one_ends_the_run(two: Any) -> None:
    out, done = two
    assert (out / "stopped").exists(), done.stderr
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr or "lost the others" in done.stderr, done.stderr
    assert [path.name for path in (out / "run" / "checkpoints").iterdir()].count("step-0000005.pt") == 0
    assert checkpoints.steps_kept(out / "run") == [3, 4]


def test_one_process_goes_on_where_two_with_shards_were_lost(two: Any, tmp_path: Path) -> None:
    run, recipe = tmp_path / "parts", RECIPE.replace(**FIELDS)
    shutil.copytree(two[0] / "run", run)
    for out in (tmp_path / "whole", run):
        result = train(small_model(recipe), Squares(), Squares(4, 1), recipe, out, device="cpu", resume="auto")
        assert result.finished
    found, wanted = weights(run), weights(tmp_path / "whole")
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[key], wanted[key], atol=2e-5) for key in wanted)


def test_a_batch_must_be_divisible() -> None:
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 processes, got 4"):
        Batches(Squares(), RECIPE, small_model().config, World(0, 3))


def test_processes_share_a_batch_as_one_would_have_it() -> None:
    config = small_model().config
    [whole] = Batches(Squares(), RECIPE, config, HERE).between(3, 4)
    shares = [next(Batches(Squares(), RECIPE, config, World(rank, 2)).between(3, 4)) for rank in (0, 1)]
    assert torch.equal(torch.cat([share.parts[0][0] for share in shares]), whole.parts[0][0])
    assert torch.equal(torch.cat([share.parts[0][1] for share in shares]), whole.parts[0][1])
