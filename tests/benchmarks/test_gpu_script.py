"""``gpu.sh`` without a GPU says so, and its rehearsal runs every step and leaves every file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from segmenter_fast.benchmarks.warm import VARIANTS

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"


def run(*arguments: str, seconds: int, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=variables, cwd=cwd)


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
    *benchmarks.device*) printf "slug           made-up\\nmemory_bytes   85000000000\\n" ;;
    *$FAILS*) echo "it does not work" >&2; exit 1 ;;
    *$HANGS*) trap "echo stopped; exit 130" INT; while true; do read -rt 0.1 <> <(:); done ;;
esac
[[ -z ${CLOCK:-} || $* == *warm* || $1 == -c ]] && exit
spent=12
for word; do
    [[ $before == --budget || $before == --seconds ]] && spent=$((word + OVERTIME))
    before=$word
done
echo $(($(cat "$CLOCK") + spent)) > "$CLOCK"
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, str]:
    """Environment with a python that writes its arguments to a file and runs nothing; a step may fail, or never end."""
    path = tmp_path / "python"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return {"PYTHON": str(path), "CALLS": str(tmp_path / "calls"), "FAILS": "none", "HANGS": "none"}


def calls_of(stand_in: dict[str, str]) -> list[list[str]]:
    lines = [line.split() for line in Path(stand_in["CALLS"]).read_text().splitlines()]
    return [line for line in lines if line[0] != "-c"]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_step_is_asked_for_in_the_order_of_its_value(
    stand_in: dict[str, str], device: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = run(str(out), "480", seconds=60, DEVICE=device, **stand_in)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    lines = calls_of(stand_in)
    words = [" ".join(line) for line in lines]
    warm = [line for line in words if "benchmarks.warm" in line]
    steps = [line for line in words[1:] if line not in warm]
    gpu = device == "cuda"
    expected = ["parallel.py", "bench kernels", "benchmarks.tune", "--variant", "bench train"]
    expected += ["benchmarks.profiler", "benchmarks.plots"]
    if not gpu:
        expected.remove("benchmarks.tune")
    assert len(steps) == len(expected)
    assert all(part in step for part, step in zip(expected, steps, strict=True))
    assert len(warm) == gpu
    for line in lines:
        if "--out" in line and "parallel" not in line[0]:
            assert line[line.index("--out") + 1] == str(out)
            assert line[line.index("--device") + 1] == device
    budgets = [int(line[line.index("--budget") + 1]) for line in lines if "--budget" in line]
    assert all(budget > 50 for budget in budgets), "nothing took time, so each has its part of 480 s"
    folder = out / "made-up"
    with tarfile.open(folder / "results.tar.gz") as archive:
        assert "made-up/tests.log" in archive.getnames()
        assert not any(name.endswith(".gz") for name in archive.getnames())
    if gpu:
        test_files = steps[0].split()
        assert test_files[-2:] == ["-m", "gpu"]
        assert {"tests/kernels/test_upsample_argmax.py", "tests/test_graphs.py", "tests/gpu/test_training.py"} <= {
            *test_files
        }
        assert "seg_b_mask_16 --variant seg_s_mask_16" in steps[3]
        assert [word for word in steps[3].split() if word.startswith("seg_")] == list(VARIANTS), "as they are compiled"
        assert "attention upsample_cross_entropy upsample_argmax" in steps[1]
        assert [step for step in steps if "--no-compile" in step] == steps[5:6], "kernels of a profile have names then"


# Seconds that each step has at least, with those it may begin late; measured on an H200 with 16 cores.
NEEDS = {"tests": 120, "kernels": 65, "tune": 40, "throughput": 120, "training": 45, "profile": 25, "plots": 15}


@pytest.mark.parametrize("overtime", [0, 12, 20])
def test_eight_minutes_have_room_for_every_step(stand_in: dict[str, str], overtime: int, tmp_path: Path) -> None:
    """Each step takes all of its budget and some seconds more, by a clock that is made up."""
    (tmp_path / "clock").write_text("0")
    (tmp_path / "date").write_text('#!/usr/bin/env bash\ncat "$CLOCK"\n')
    (tmp_path / "date").chmod(0o755)
    clock = {"CLOCK": str(tmp_path / "clock"), "OVERTIME": str(overtime)}
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    done = run(str(tmp_path / "out"), "480", seconds=60, PATH=path, **clock, **stand_in)
    assert done.returncode == 0, done.stdout
    found = re.findall(r"^== (\w+) \(at (\d+) s, for (\d+) s\)", done.stdout, re.MULTILINE)
    assert [name for name, *_ in found] == list(NEEDS)
    short = {name: seconds for name, _, seconds in found if int(seconds) < NEEDS[name]}
    assert not short
    (end,) = re.findall(r"after (\d+) s$", done.stdout, re.MULTILINE)
    assert 400 < int(end) <= 480


@pytest.mark.parametrize("step", ["parallel.py", "bench kernels", "bench train", "benchmarks.profiler"])
def test_a_step_that_fails_is_told_and_the_others_run(stand_in: dict[str, str], step: str, tmp_path: Path) -> None:
    names = {"parallel.py": "tests", "bench kernels": "kernels", "bench train": "training"}
    done = run(str(tmp_path / "out"), seconds=60, **stand_in | {"FAILS": step, "DEVICE": "cpu"})
    assert done.returncode == 1
    name = names.get(step, "profile")
    assert done.stdout.endswith(f"== failed: {name}\n")
    assert (tmp_path / "out" / "made-up" / f"{name}.log").read_text() == "it does not work\n"
    assert "benchmarks.plots" in " ".join(calls_of(stand_in)[-1])


def test_a_step_that_never_ends_is_stopped_in_time(stand_in: dict[str, str], tmp_path: Path) -> None:
    start = time.monotonic()
    done = run(str(tmp_path / "out"), "30", seconds=90, **stand_in | {"HANGS": "parallel.py", "DEVICE": "cpu"})
    assert time.monotonic() - start < 30
    assert "== tests: exit code 124" in done.stdout
    assert "== failed: tests" in done.stdout
    assert "benchmarks.plots" in " ".join(calls_of(stand_in)[-1])


def test_a_relative_folder_is_the_caller_s(stand_in: dict[str, str], tmp_path: Path) -> None:
    done = run("here", seconds=60, cwd=tmp_path, **stand_in | {"DEVICE": "cpu"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "here" / "made-up" / "results.tar.gz").is_file()


@pytest.mark.parametrize("given", ["8min", "-3", "0", "1.5"])
def test_seconds_that_are_no_number_are_refused(stand_in: dict[str, str], given: str, tmp_path: Path) -> None:
    done = run(str(tmp_path / "out"), given, seconds=60, **stand_in)
    assert done.returncode == 2
    assert f"whole number above 0, got {given}" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_rehearsal_runs_every_step(tmp_path: Path) -> None:
    done = run(str(tmp_path), "600", seconds=600, DEVICE="cpu")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (folder,) = tmp_path.iterdir()
    names = {path.name for path in folder.iterdir()}
    written = {f"{name}.json" for name in ("throughput", "training", "mask_scores")}
    assert written | {"tests", "profile.txt", "training.png", "results.tar.gz"} <= names
    lines = (folder / "tests" / "tests.txt").read_text().splitlines()
    assert lines
    assert all(line.startswith("passed") for line in lines)
    training = json.loads((folder / "training.json").read_text())
    assert {row["status"] for case in training["cases"] for row in case["rows"]} == {"ok", "absent"}


def test_steps_without_time_are_told_and_count_as_failed(stand_in: dict[str, str], tmp_path: Path) -> None:
    done = run(str(tmp_path / "out"), "1", seconds=60, **stand_in | {"DEVICE": "cpu"})
    assert done.returncode == 1
    assert "no time left" in done.stdout
    assert "== failed: tests kernels throughput training profile" in done.stdout
