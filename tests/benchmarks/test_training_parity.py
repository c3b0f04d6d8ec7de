"""Training with the fast kernels gives the reference's loss curve, and bfloat16 stays within the noise of seeds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from segmenter_fast.benchmarks import training_parity
from segmenter_fast.benchmarks.training_parity import TOLERANCE, Parity, Setting, compare, train

CPU = torch.device("cpu")
COMMITTED = sorted((Path(__file__).parents[2] / "benchmarks/results").glob("*/training_parity.json"))


@pytest.fixture(scope="module")
def parity() -> Parity:
    return compare(CPU, 50, 2, runs=("reference float32", "fast float32", "fast bfloat16"))


def test_fifty_steps_in_float32_agree_to_a_ten_thousandth(parity: Parity) -> None:
    assert parity.relative_difference <= TOLERANCE
    curve = parity.curves["fast float32"][0]
    assert len(curve) == 50
    assert np.mean(curve[-5:]) < 0.6 * curve[0]  # it does learn


def test_bfloat16_stays_within_the_noise_of_seeds(parity: Parity) -> None:
    assert 0 < parity.distances["fast bfloat16"] <= parity.noise
    assert parity.holds


def test_another_loss_is_found(parity: Parity) -> None:
    """A hundredth more learning rate is more than rounding, so the comparison can fail."""
    other = train("fast float32", 0, 10, CPU, Setting(lr=0.202))
    difference = np.abs(np.array(other) / parity.curves["reference float32"][0][:10] - 1).max()
    assert difference > TOLERANCE
    assert not dataclasses.replace(parity, relative_difference=difference).holds
    assert not dataclasses.replace(parity, distances={"fast bfloat16": 2 * parity.noise}).holds


@pytest.mark.interpret
def test_the_triton_kernels_train_alike() -> None:
    setting = Setting(side=16, classes=3, batch=1, depth=1)
    reference, fast = (train(f"{kind} float32", 0, 3, CPU, setting) for kind in ("reference", "fast"))
    assert fast == pytest.approx(reference, rel=TOLERANCE)


def test_the_script_writes_what_holds_and_nothing_else(
    parity: Parity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = dataclasses.replace(parity, curves={**parity.curves, "reference bfloat16": parity.curves["fast bfloat16"]})
    monkeypatch.setattr(training_parity, "compare", lambda *_: whole)
    assert training_parity.main(["--out", str(tmp_path), "--device", "cpu"]) == 0
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["training_parity.json", "training_parity.png"]
    wrong = dataclasses.replace(whole, relative_difference=1.0)
    monkeypatch.setattr(training_parity, "compare", lambda *_: wrong)
    assert training_parity.main(["--out", str(tmp_path / "wrong"), "--device", "cpu"]) == 1
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_committed_curves_hold(path: Path) -> None:
    content = json.loads(path.read_text())
    reference, fast = (np.array(content["curves"][f"{kind} float32"]) for kind in ("reference", "fast"))
    assert reference.shape[1] == 50
    assert (np.abs(fast - reference) / reference).max() == pytest.approx(content["relative_difference"])
    assert content["relative_difference"] <= TOLERANCE
    assert content["distances"]["fast bfloat16"] <= content["noise"]
    assert path.with_suffix(".png").exists()
