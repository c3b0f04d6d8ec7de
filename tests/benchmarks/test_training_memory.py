"""A training step needs at most half of the reference's memory, and nothing is measured of models that disagree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import segmenter_fast as sf
from segmenter_fast.benchmarks.training_memory import ALLOWED, Setting, main, step_peaks

COMMITTED = sorted((Path(__file__).parents[2] / "benchmarks/results").glob("*/training_memory.json"))
SMALL = ("--batch", "1", "--size", "256", "--device", "cpu")


def test_the_script_measures_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/training_memory.json")
    content = json.loads(path.read_text())
    peaks = content["peak_bytes"]
    # the reference holds the logits and their softmax's gradient at least
    assert peaks["reference"] > 2 * 150 * 256**2 * 4
    assert peaks["ours"] > 4 * 6_000_000  # the gradients
    assert content["ratio"] == pytest.approx(peaks["ours"] / peaks["reference"])
    assert f"ours / reference: {content['ratio']:.3f}" in capsys.readouterr().out


def test_models_that_disagree_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = sf.Segmenter.loss
    monkeypatch.setattr(sf.Segmenter, "loss", lambda *args: right(*args) * 1.01)
    with pytest.raises(ValueError, match="ours must agree with the reference on loss and gradient"):
        step_peaks(Setting(batch=1, size=64, classes=4), torch.device("cpu"))


def test_half_of_the_reference_was_measured_at_full_size() -> None:
    assert COMMITTED
    for path in COMMITTED:
        content = json.loads(path.read_text())
        assert content["setting"] == {"variant": "seg_t_mask_16", "batch": 4, "size": 512, "classes": 150}
        assert content["peak_bytes"]["ours"] <= ALLOWED * content["peak_bytes"]["reference"]
