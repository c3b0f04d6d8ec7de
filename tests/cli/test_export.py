"""``segmenter-fast export``."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from typer.testing import CliRunner

import segmenter_fast as sf
from segmenter_fast.cli import app
from support.checkpoints import GOLDEN
from support.models import normalised

MODEL = str(GOLDEN / "official_mask")  # 7 classes, images of 64


def test_it_writes_a_checked_file(tmp_path: Path) -> None:
    out = tmp_path / "model"
    arguments = ["export", MODEL, str(out), "--format", "onnx", "--size", "48x64", "--uint8", "--dynamic-batch"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert f"wrote {out}.onnx" in result.output
    assert "labels of 9,216 pixels: all as the model's" in result.output
    model, pixels = sf.load(MODEL).eval(), torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (labels,) = session.run(["labels"], {"images": pixels.numpy()})
    assert torch.equal(torch.from_numpy(labels), model.segment(normalised(model, pixels)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.pt2", "--format", "onnx"], "OUT must end in .onnx"),
        (["model.onnx", "--size", "64x"], "--size must be one side"),
        (["model.onnx", "--size", "0"], "--size must be one side"),
        (["model.onnx", "--batch-size", "0"], "batch_size must be at least 1"),
        (["model.onnx", "--dtype", "bfloat16"], "float32 or float16"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["export", MODEL, *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert not list(tmp_path.iterdir())
