"""The profile names the operators of an inference and of a training step, once their outputs are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from segmenter_fast.benchmarks.profiler import profile

SMALL: dict[str, Any] = {"model": "t", "size": 32, "classes": 3, "dtype": "float32", "compile": False, "device": "cpu"}


def test_shares_and_times_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile(**SMALL, top=5, out=tmp_path)
    (path,) = tmp_path.glob("*/profile.json")
    content = json.loads(path.read_text())
    assert [found["name"] for found in content["profiles"]] == ["inference", "training step"]
    for found in content["profiles"]:
        assert len(found["kernels"]) == 5
        times = [kernel["ms"] for kernel in found["kernels"]]
        assert times == sorted(times, reverse=True)
        assert 0 < sum(times) <= found["busy_ms"]
        assert times[0] == pytest.approx(found["kernels"][0]["share"] * found["busy_ms"])
    assert "addmm" in capsys.readouterr().out


def test_a_wrong_kernel_is_not_profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segmenter_fast.vit.kernels.attention", lambda qkv: qkv[:, :, 2].contiguous())
    with pytest.raises(ValueError, match="training step is wrong"):
        profile(**SMALL, out=tmp_path)
    assert not list(tmp_path.iterdir())
