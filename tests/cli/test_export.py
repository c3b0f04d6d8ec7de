"""``segmenter-fast export``."""

from __future__ import annotations

import signal
import subprocess
import sys
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


SLOW_CHECK = """
import sys, time
import segmenter_fast.export as export
export._write_onnx = lambda model, options, path: path.write_bytes(b"half")
export._check = lambda *_: (print("checking", flush=True), time.sleep(60))
from segmenter_fast.cli import main
main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_nothing_of_a_half_written_file(number: signal.Signals, code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOW_CHECK, "export", MODEL, str(tmp_path / "model.onnx")]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "checking\n"
        assert [path.name[:8] for path in tmp_path.iterdir()] == [".saving-"]
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
