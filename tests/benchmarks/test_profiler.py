"""The profile names the operators of an inference and of a training step, once their outputs are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from segmenter_fast import VARIANTS
from segmenter_fast.benchmarks.profiler import profile

SMALL: dict[str, Any] = {"model": "t", "size": 32, "classes": 3, "dtype": "float32", "compile": False, "device": "cpu"}


@pytest.fixture(autouse=True)
def _shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "seg_t_mask_16", VARIANTS["seg_t_mask_16"].replace(depth=2, decoder_depth=1))


def test_the_longest_operators_are_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile(**SMALL, out=tmp_path)
    (path,) = tmp_path.glob("*/profile.txt")
    text = path.read_text()
    assert text == capsys.readouterr().out
    assert "float32, compiled False" in text.splitlines()[1]
    for name, table in zip(("inference", "training step"), text.split("\n\n")[1:], strict=True):
        lines = table.splitlines()
        assert lines[0] == f"{name}, 5 calls"
        shares = [float(line.split()[1].rstrip("%")) for line in lines[4:9]]
        assert shares == sorted(shares, reverse=True)
        assert shares[0] > 0
        assert "addmm" in table or "linear_pointwise" in table


def test_a_wrong_kernel_is_not_profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segmenter_fast.vit.kernels.attention", lambda qkv, **_: qkv[:, :, 2].contiguous())
    with pytest.raises(ValueError, match="training step is wrong"):
        profile(**SMALL, out=tmp_path)
    assert not list(tmp_path.iterdir())
