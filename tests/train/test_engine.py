"""The training loop: files of a run, interruptions that change nothing, one process and two."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import segmenter_fast as sf
from segmenter_fast.processes import World
from segmenter_fast.train import run_folder
from segmenter_fast.train.engine import DivergedError, train
from segmenter_fast.train.logs import read_log
from segmenter_fast.train.presets import Recipe
from segmenter_fast.train.run_folder import checkpoint_path, checkpoint_steps, read_checkpoint
from support import training as support
from support.training import RECIPE, ROUNDING, Signalled, Squares, difference, small_model, step_gradients, weights

VALIDATION = Squares(4, 1)


def run(out: Path, recipe: Recipe = RECIPE, data: Any = None, **options: Any) -> Any:
    return train(small_model(recipe), data or Squares(), VALIDATION, recipe, out, device="cpu", **options)


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_run_leaves_checkpoints_models_scores_and_a_log(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert (result.steps, result.finished, result.skipped) == (6, True, 0)
    assert checkpoint_steps(tmp_path) == [4, 6]
    assert same(sf.load(tmp_path / "last").state_dict(), weights(tmp_path))
    assert sf.load(tmp_path / "best").config.num_classes == 2
    assert json.loads((tmp_path / "scores.json").read_text())["last_step"] == 6
    records = read_log(tmp_path)
    assert [record["step"] for record in records if record["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records if record["kind"] == "evaluation"] == [4, 6]
    assert result.scores.miou == pytest.approx(records[-1]["miou"])


def test_training_learns(tmp_path: Path) -> None:
    recipe = RECIPE.replace(optimizer="adamw", lr=3e-3, steps=60, save_every=60, evaluate_every=60, drop_path=0.0)
    run(tmp_path, recipe)
    losses = [record["loss"] for record in read_log(tmp_path) if record["kind"] == "step"]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])


@pytest.mark.parametrize(
    "fields",
    [
        {"drop_path": 0.5, "ema": 0.9},
        {"optimizer": "adamw", "lr": 1e-3, "warmup": 2, "weight_decay": 0.1, "clip": 0.5, "accumulate": 2},
        {"workers": 2, "batch_size": 3},
        {"merge": '{"layers": [1], "share": 0.5}', "merge_warmup": 5, "activation_checkpointing": True, "ema": 0.9},
    ],
    ids=lambda fields: ",".join(fields),
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, fields: dict[str, Any], number: signal.Signals) -> None:
    recipe = RECIPE.replace(**fields)
    run(tmp_path / "whole", recipe)
    interrupted = Signalled(reads=recipe.batch_size * 2 + 1, number=number) if not recipe.workers else None
    if interrupted is None:
        short = recipe.replace(save_every=3)
        first = _stopped_after_save(tmp_path / "parts", short, number)
    else:
        first = run(tmp_path / "parts", recipe, interrupted)
        assert first.steps == 3  # the step in which the signal came is finished
        assert checkpoint_steps(tmp_path / "parts") == [2, 3]
    assert not first.finished
    second = run(tmp_path / "parts", recipe, resume="auto")
    assert (second.steps, second.finished) == (6, True)
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    for name in ("last", "best"):
        assert same(*(sf.load(tmp_path / part / name).state_dict() for part in ("parts", "whole")))
    losses = [
        [record["loss"] for record in read_log(tmp_path / part) if record["kind"] == "step"]
        for part in ("parts", "whole")
    ]
    assert losses[0] == losses[1]


def test_the_shares_of_merging_rise_in_four_stairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    merged = sf.segmenter.VisionTransformer.merged

    def seen(encoder: Any, images: torch.Tensor) -> Any:
        shares.append(encoder.merging.shares[0] if encoder.merging else 0.0)
        return merged(encoder, images)

    monkeypatch.setattr(sf.segmenter.VisionTransformer, "merged", seen)
    recipe = RECIPE.replace(merge='{"layers": [1], "share": 0.4}', merge_warmup=4, steps=6, evaluate_every=6)
    train(small_model(recipe), Squares(), None, recipe, tmp_path, device="cpu")
    assert shares == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.4])
    assert sf.load(tmp_path / "last").config.merging == sf.TokenMerging((1,), 0.4)
    described = json.loads((tmp_path / "run.json").read_text())
    assert (described["recipe"]["merge"], described["recipe"]["merge_warmup"]) == (recipe.merge, 4)
    with pytest.raises(ValueError, match="merge_warmup=4 needs token merging"):
        train(small_model(), Squares(), None, recipe.replace(merge="none"), tmp_path, resume="auto", device="cpu")
    exact = recipe.replace(merge="none", merge_warmup=0)
    with pytest.raises(ValueError, match="merge is 'none'"):
        train(small_model(), Squares(), None, exact, tmp_path, resume="auto", device="cpu")
    with pytest.raises(ValueError, match="did you mean fast"):
        small_model(recipe.replace(merge="fsat"))


def _stopped_after_save(out: Path, recipe: Recipe, number: signal.Signals) -> Any:
    """Workers read ahead of the steps, so the signal comes with a save instead."""
    write = run_folder.save_checkpoint

    def saved(folder: Path, content: dict[str, Any]) -> Path:
        path = write(folder, content)
        if content["step"] == 3:
            signal.raise_signal(number)
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "save_checkpoint", saved)
        return run(out, recipe)


def test_an_evaluation_stopped_by_a_signal_is_repeated(tmp_path: Path) -> None:
    signalled = Signalled(reads=2, number=signal.SIGTERM)
    first = train(small_model(), Squares(), signalled, RECIPE, tmp_path, device="cpu")
    assert (first.steps, first.finished, first.scores) == (4, False, None)
    assert not (tmp_path / "best").exists()
    second = run(tmp_path, resume="auto")
    assert (second.steps, second.finished) == (6, True)
    assert [record["step"] for record in read_log(tmp_path) if record["kind"] == "evaluation"] == [4, 6]


def test_float16_goes_on_with_its_scale(tmp_path: Path) -> None:
    recipe = RECIPE.replace(precision="float16", drop_path=0.0)
    run(tmp_path / "whole", recipe)
    run(tmp_path / "parts", recipe, Signalled(reads=9, number=signal.SIGTERM))
    run(tmp_path / "parts", recipe, resume="auto")
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    content = read_checkpoint(checkpoint_path(tmp_path / "parts", 6))
    assert content["scaler"]["scale"] > 0


def test_a_loss_that_is_not_finite_is_skipped_and_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _spoil(monkeypatch, steps={2})
    result = run(tmp_path)
    assert (result.steps, result.skipped) == (6, 1)
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())
    [told] = [record for record in read_log(tmp_path) if record["kind"] == "skipped"]
    assert told["message"].startswith("step 3: loss nan")
    assert told["message"].count("square-") == RECIPE.batch_size


def test_a_loss_that_stays_not_finite_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _spoil(monkeypatch, steps=set(range(3, 100)))
    recipe = RECIPE.replace(steps=20, max_bad_steps=4)
    with pytest.raises(DivergedError, match=r"4 steps in a row, up to step 7 .*square-\d"):
        run(tmp_path, recipe)
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())


def _spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the loss of some steps NaN."""
    loss, calls = sf.Segmenter.loss, iter(range(1000))

    def spoilt(*arguments: Any, **options: Any) -> torch.Tensor:
        value = loss(*arguments, **options)
        return value * float("nan") if next(calls) in steps else value

    monkeypatch.setattr(sf.Segmenter, "loss", spoilt)


def test_activation_checkpointing_and_parts_change_nothing_but_rounding(tmp_path: Path) -> None:
    plain = RECIPE.replace(drop_path=0.0)
    run(tmp_path / "plain", plain)
    wanted = weights(tmp_path / "plain")
    for name, fields in {
        "recomputed": {"activation_checkpointing": True},
        "parts": {"accumulate": 4},
        "channels_last": {"channels_last": True},
    }.items():
        run(tmp_path / name, plain.replace(**fields))
        found = weights(tmp_path / name)
        assert difference(found, wanted) < 20 * ROUNDING, name  # after six steps


def test_a_frozen_encoder_stays_as_it_is(tmp_path: Path) -> None:
    before = small_model().state_dict()
    run(tmp_path / "encoder", RECIPE.replace(freeze="encoder"))
    run(tmp_path / "layers", RECIPE.replace(freeze_layers=1))
    changed = {
        name: {key for key, value in weights(tmp_path / name).items() if not torch.equal(value, before[key])}
        for name in ("encoder", "layers")
    }
    assert all(key.startswith("decoder.") for key in changed["encoder"])
    assert "encoder.blocks.1.attn.qkv.weight" in changed["layers"]
    assert not any(key.startswith(("encoder.blocks.0.", "encoder.pos", "encoder.patch")) for key in changed["layers"])


def test_another_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(FileExistsError, match=r"last checkpoint is of step 6; go on with it by --resume auto"):
        run(tmp_path)
    with pytest.raises(ValueError, match=r"seed is 3, was 0; lr is 0\.5, was 0\.05\. Go on"):
        run(tmp_path, RECIPE.replace(lr=0.5, seed=3, keep=5), resume="auto")
    with pytest.raises(ValueError, match="the model's embed_dim is 64, was 32"):
        train(small_model(embed_dim=64), Squares(), None, RECIPE, tmp_path, resume="auto", device="cpu")
    with pytest.raises(ValueError, match="the data has 11 samples, had 10"):
        run(tmp_path, data=Squares(11), resume="auto")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model has 3 classes, the training data 2"):
        train(small_model(num_classes=3), Squares(), None, RECIPE, tmp_path, device="cpu")
    with pytest.raises(ValueError, match="the validation data has no samples"):
        train(small_model(), Squares(), Squares(0), RECIPE, tmp_path, device="cpu")
    with pytest.raises(ValueError, match="accumulate must be at most 4"):
        run(tmp_path, RECIPE.replace(accumulate=5))
    assert not list(tmp_path.iterdir())


FIELDS = {"drop_path": 0.0, "ema": 0.9, "optimizer": "muon", "lr": 1e-3, "clip": 0.5}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Files and output of two processes under torchrun, see the support program; one was killed in the end."""
    if not torch.distributed.is_available():
        pytest.skip("needs a PyTorch with torch.distributed")
    out = tmp_path_factory.mktemp("two")
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", support.__file__]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(support.__file__).parents[1])}
    fields = json.dumps({**FIELDS, "parallel": "fsdp"})
    arguments = [*program, "ranks", str(out), fields]
    return out, subprocess.run(arguments, env=variables, capture_output=True, text=True, timeout=240)


def test_gradients_of_two_processes_are_those_of_one_with_the_double_batch(two: Any) -> None:
    out, done = two
    wanted = step_gradients(World(), RECIPE.replace(drop_path=0.0))
    # As many ignored pixels in one half of the batch as in the other would hide a mean of means.
    shares = [sum(int((Squares().read(index)[1] != 255).sum()) for index in half) for half in ((0, 1), (2, 3))]
    assert shares[0] > 1.2 * shares[1]
    for name in ("ddp-1", "ddp-2", "fsdp-1", "fsdp-2"):
        assert (out / f"{name}.pt").exists(), done.stderr
        found = torch.load(out / f"{name}.pt")
        assert found.keys() == wanted.keys()
        assert difference(found, wanted) < ROUNDING, name
    exact, wanted = wanted, step_gradients(World(), RECIPE.replace(merge=support.MERGE, drop_path=0.0))
    assert difference(torch.load(out / "merged.pt"), wanted) < ROUNDING < difference(exact, wanted)


def test_a_signal_to_one_process_stops_all_and_a_killed_one_ends_the_run(two: Any) -> None:
    out, done = two
    assert (out / "stopped").exists(), done.stderr
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr or "lost the others" in done.stderr, done.stderr
    assert [path.name for path in (out / "run" / "checkpoints").iterdir()].count("step-0000005.pt") == 0
    assert checkpoint_steps(out / "run") == [3, 4]


def test_one_process_goes_on_where_two_with_shards_were_lost(two: Any, tmp_path: Path) -> None:
    run, recipe = tmp_path / "parts", RECIPE.replace(**FIELDS)
    shutil.copytree(two[0] / "run", run)
    for out in (tmp_path / "whole", run):
        result = train(small_model(recipe), Squares(), Squares(4, 1), recipe, out, device="cpu", resume="auto")
        assert result.finished
    found, wanted = weights(run), weights(tmp_path / "whole")
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[key], wanted[key], atol=2e-5) for key in wanted)
