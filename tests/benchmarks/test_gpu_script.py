"""``gpu.sh`` without a GPU says so, and its rehearsal runs every step and leaves every file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"


def run(*arguments: str, seconds: int, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=variables)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    done = run(str(tmp_path), seconds=120)
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_rehearsal_needs_a_folder_and_a_device_that_there_is() -> None:
    assert "name a folder" in run(seconds=60, DEVICE="cpu", OUT="").stderr
    assert "DEVICE must be cuda or cpu" in run("x", seconds=60, DEVICE="tpu").stderr


STAND_IN = """#!/usr/bin/env bash
echo "$@" >> "$CALLS"
case "$*" in
    *benchmarks.device*) echo "slug           made-up" ;;
    *"bench train"*) exit "${TRAINING:-0}" ;;
esac
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A python that writes its arguments to a file and runs nothing."""
    path = tmp_path / "python"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_step_is_asked_for(stand_in: Path, device: str, tmp_path: Path) -> None:
    out, calls = tmp_path / "out", tmp_path / "calls"
    done = run(str(out), "480", seconds=60, DEVICE=device, PYTHON=str(stand_in), CALLS=str(calls))
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert (out / "made-up").is_dir()
    lines = [line.split() for line in calls.read_text().splitlines() if line.startswith("-m")]
    names = ["benchmarks.device", "pytest", "cli", "cli", "benchmarks.profiler", "cli", "benchmarks.plots"]
    assert [line[1].removeprefix("segmenter_fast.") for line in lines] == names
    assert [line[2] for line in lines if line[1].endswith("cli")] == ["bench"] * 3
    assert [line[3] for line in lines if line[1].endswith("cli")][1:] == ["train", "kernels"]
    for line in lines[2:6]:
        assert line[line.index("--device") + 1] == device
        assert line[line.index("--out") + 1] == str(out)
    budgets = [float(line[line.index("--budget") + 1]) for line in lines if "--budget" in line]
    assert budgets[:2] == [pytest.approx(150, abs=2)] * 2, "a third of what is left but half a minute"
    if device == "cuda":
        assert lines[1][:4] == ["-m", "pytest", "-m", "gpu"]
        assert "--no-compile" not in calls.read_text()
        assert "attention upsample_cross_entropy upsample_argmax" in calls.read_text()


def test_a_step_that_fails_is_told_and_the_others_run(stand_in: Path, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    done = run(str(tmp_path / "out"), seconds=60, DEVICE="cpu", PYTHON=str(stand_in), CALLS=str(calls), TRAINING="1")
    assert done.returncode == 1
    assert "== failed: training" in done.stdout
    assert "benchmarks.plots" in calls.read_text()


@pytest.mark.slow
def test_the_rehearsal_runs_every_step(tmp_path: Path) -> None:
    done = run(str(tmp_path), "600", seconds=600, DEVICE="cpu")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (folder,) = tmp_path.iterdir()
    names = {path.name for path in folder.iterdir()}
    written = {f"{name}.json" for name in ("throughput", "training", "mask_scores")}
    assert written | {"tests.xml", "profile.txt", "training.png"} <= names
    training = json.loads((folder / "training.json").read_text())
    assert {row["status"] for case in training["cases"] for row in case["rows"]} == {"ok", "absent"}


def test_steps_without_time_are_told_and_count_as_failed(stand_in: Path, tmp_path: Path) -> None:
    environment = {"DEVICE": "cpu", "PYTHON": str(stand_in), "CALLS": str(tmp_path / "calls")}
    done = run(str(tmp_path / "out"), "1", seconds=60, **environment)
    assert done.returncode == 1
    assert "no time left" in done.stdout
    assert "== failed: tests throughput training profile kernels" in done.stdout
