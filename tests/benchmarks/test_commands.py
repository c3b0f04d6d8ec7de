"""``segmenter-fast bench ...`` hands its options on, and the exit codes back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from segmenter_fast.benchmarks import ops, training
from segmenter_fast.benchmarks.models import defaults, throughput
from segmenter_fast.benchmarks.report import compare
from segmenter_fast.cli import app


def invoke(function: tuple[Any, str], arguments: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of ``function``, which finds something wrong; the exit code has to be 1."""
    given: list[Any] = []

    def record(*args: Any, **kwargs: Any) -> bool:
        given.extend([args, kwargs])
        return True  # 1 case was refused, or something got worse

    monkeypatch.setattr(*function, record)
    assert CliRunner().invoke(app, ["bench", *arguments.split()]).exit_code == 1
    return given


def test_models(monkeypatch: pytest.MonkeyPatch) -> None:
    options = "--variant a --variant b --size 64 --batch 2 --classes 7 --dtype float32 --device cpu --no-compile"
    options += " --no-extras --seconds 0.5 --budget 9 --out x"
    args, kwargs = invoke((throughput, "run_models"), options, monkeypatch)
    assert args == (["a", "b"], [64], [2], [7], ["float32"], ())
    cpu = torch.device("cpu")
    wanted = {"device": cpu, "compile": False, "extras": False, "seconds": 0.5, "budget": 9.0, "out": Path("x")}
    assert kwargs == wanted
    args, kwargs = invoke((throughput, "run_models"), "--device cpu", monkeypatch)
    assert not any(args)
    assert (kwargs["compile"], kwargs["extras"], kwargs["budget"]) == (True, True, 540)


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    options = "defaults --variant a --size 64 --batch 2 --device cpu --seconds 0.5 --budget 9 --out x"
    args, kwargs = invoke((defaults, "run_defaults"), options, monkeypatch)
    assert args == (["a"], 64, [2])
    assert kwargs == {"device": torch.device("cpu"), "seconds": 0.5, "budget": 9.0, "out": Path("x")}


def test_train(monkeypatch: pytest.MonkeyPatch) -> None:
    options = "train --model t --model s --patch 8 --classes 19 --size 64 --batch 3 --device cpu --dtype float32"
    args, kwargs = invoke((training, "run_training"), f"{options} --no-compile --quick --budget 9 --out x", monkeypatch)
    assert args == (["t", "s"], [8], [19], 64, 3)
    wanted = {"dtype": "float32", "compile": False, "quick": True, "budget": 9.0, "out": Path("x")}
    assert kwargs == wanted | {"device": torch.device("cpu")}


def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    args, kwargs = invoke((ops, "run_ops"), "kernels attention --quick --device cpu --out x", monkeypatch)
    assert args == (["attention"],)
    assert kwargs == {"device": torch.device("cpu"), "quick": True, "out": Path("x"), "budget": None}


def test_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    args, _ = invoke((compare, "print_comparison"), "compare a b --force", monkeypatch)
    assert args == (Path("a"), Path("b"), True)


@pytest.mark.parametrize("arguments", ["kernels softmax", "compare nowhere nowhere", "train --size 8 --device cpu"])
def test_errors_of_users_have_exit_code_2(arguments: str) -> None:
    done = CliRunner().invoke(app, ["bench", *arguments.split()])
    assert done.exit_code == 2
    assert "error: " in done.output


@pytest.mark.parametrize("module", ["plots", "report.tables"])
def test_help_changes_nothing(module: str) -> None:
    command = [sys.executable, "-m", f"segmenter_fast.benchmarks.{module}", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "Usage" in done.stdout
