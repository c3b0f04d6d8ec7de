"""Tests in parallel processes: each runs once, the most valuable first, and what is missing or broken stops nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.parallel import rank

SCRIPT = Path(__file__).parent / "support" / "parallel.py"
CONFTEST = """
import sys
sys.path.insert(0, {folder!r})
from support.parallel import pytest_addoption, pytest_configure
from support import no_hypothesis
no_hypothesis.install()
"""
TESTS = """
import time
import pytest
from hypothesis import given, settings, strategies as st

@pytest.mark.parametrize("number", range(6))
def test_number(number):
    time.sleep(0.1)
    assert number != 3, "three is wrong"

@pytest.mark.parametrize("name", ["a"])
@settings(max_examples=3)
@given(st.integers(0, 5), data=st.data())
def test_any_shape(name, tmp_path, number, data): ...

def test_opcheck(): ...
"""


def run(folder: Path, *, seconds: float = 60, **files: str) -> tuple[int, str, str]:
    """Exit code, output and tests.txt of two processes over the files."""
    files = {"conftest": CONFTEST.format(folder=str(SCRIPT.parents[1]))} | files
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    command = [
        sys.executable,
        str(SCRIPT),
        "--processes",
        "2",
        "--seconds",
        str(seconds),
        "--out",
        "found",
        ".",
        "-p",
        "no:hypothesispytest",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=folder)
    lines = folder / "found" / "tests.txt"
    return done.returncode, done.stdout + done.stderr, lines.read_text() if lines.exists() else ""


def test_each_test_runs_once_and_a_failure_is_told(tmp_path: Path) -> None:
    code, output, lines = run(tmp_path, test_all=TESTS)
    assert code == 1
    assert "6 passed, 1 failed, 1 skipped, 0 of 8 not ended" in output
    assert "FAILED test_all.py::test_number[3]" in output
    assert len(lines.splitlines()) == len(set(lines.splitlines())) == 8
    assert "test_any_shape[a]" in lines.splitlines()[0] + lines.splitlines()[1], "the most valuable come first"
    assert "three is wrong" in (tmp_path / "found" / "failures.txt").read_text()


def test_a_missing_package_and_a_broken_context_stop_nothing(tmp_path: Path) -> None:
    broken = (
        "import pytest\n@pytest.mark.parametrize('n', range(3))\ndef test_n(n):\n assert n, 'an illegal memory access'"
    )
    code, output, lines = run(tmp_path, test_missing="import no_such_package", test_broken=broken)
    assert code == 1
    assert "ModuleNotFoundError: No module named 'no_such_package'" in output
    assert "2 passed, 1 failed" in output
    assert len(lines.splitlines()) == 3


def test_the_time_is_kept_and_what_was_cut_is_named(tmp_path: Path) -> None:
    code, output, lines = run(tmp_path, seconds=6, test_long="import time\ndef test_long(): time.sleep(99)")
    assert code == 1
    assert "CUT test_long.py::test_long" in output
    assert "1 of 1 not ended" in output
    assert lines.startswith("cut ")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (
            "kernels/test_ops.py::test_same_input_same_bits[gpu-attention]",
            "test_graphs.py::test_graphs_on_every_device[0]",
        ),
        ("test_graphs.py::test_graphs_on_every_device[0]", "gpu/test_training.py::test_amp"),
        ("gpu/test_training.py::test_amp", "kernels/test_attention.py::test_any_shape[gpu]"),
        ("kernels/test_attention.py::test_any_shape[gpu]", "kernels/test_attention.py::test_vmap[gpu-0]"),
    ],
)
def test_the_order(first: str, second: str) -> None:
    assert rank(first) < rank(second)
