"""``gpu.sh`` where there is no GPU: it says so, and its rehearsal runs every step and leaves every file."""

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


def test_the_rehearsal_runs_every_step(tmp_path: Path) -> None:
    done = run(str(tmp_path), "600", seconds=600, DEVICE="cpu")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (folder,) = tmp_path.iterdir()
    names = {path.name for path in folder.iterdir()}
    written = {f"{name}.json" for name in ("throughput", "training", "profile", "mask_scores")}
    assert written | {"tests.xml", "training.png"} <= names
    profiles = json.loads((folder / "profile.json").read_text())["profiles"]
    assert [profile["name"] for profile in profiles] == ["inference", "training step"]
    assert all(profile["kernels"] and profile["busy_ms"] > 0 for profile in profiles)
    training = json.loads((folder / "training.json").read_text())
    assert {row["status"] for case in training["cases"] for row in case["rows"]} == {"ok", "absent"}


@pytest.mark.slow
def test_steps_without_time_are_told_and_count_as_failed(tmp_path: Path) -> None:
    done = run(str(tmp_path), "1", seconds=300, DEVICE="cpu")
    assert done.returncode == 1
    assert "no time left" in done.stdout
    assert "== failed: tests throughput training profile kernels" in done.stdout
