"""``segmenter-fast bench ...`` hands its options on, and the exit codes back."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from segmenter_fast.benchmarks import compare, kernels, training
from segmenter_fast.cli import app


def invoke(module: object, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ``main`` of ``module`` is called with; its exit code, 1, has to come back."""
    given: list[str] = []
    monkeypatch.setattr(module, "main", lambda options: given.extend(options) or 1)
    assert CliRunner().invoke(app, ["bench", *arguments]).exit_code == 1
    return given


def test_train(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [
        "train",
        "--model",
        "t",
        "--model",
        "s",
        "--patch",
        "8",
        "--classes",
        "19",
        "--size",
        "64",
        "--batch",
        "3",
    ]
    arguments += ["--device", "cpu", "--dtype", "float32", "--no-compile", "--quick", "--budget", "9", "--out", "x"]
    given = invoke(training, arguments, monkeypatch)
    wanted = ["--model=t", "--model=s", "--patch=8", "--classes=19", "--size=64", "--batch=3", "--budget=9.0"]
    wanted += ["--quick", "--no-compile", "--device", "cpu", "--dtype", "float32", "--out", "x"]
    assert given == wanted


def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    given = invoke(kernels, ["kernels", "attention", "--quick", "--out", "x"], monkeypatch)
    assert given == ["attention", "--device", "auto", "--out", "x", "--quick"]


def test_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoke(compare, ["compare", "a", "b", "--force"], monkeypatch) == ["a", "b", "--force"]


def test_comparing_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["bench", "compare", str(tmp_path), str(tmp_path)]).exit_code == 2
