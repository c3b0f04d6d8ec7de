"""Whole-model throughput: refused where labels differ, and the README shows what is committed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from segmenter_fast.benchmarks import demo, throughput

ROOT = Path(__file__).parents[2]


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small images, and nothing compiled: what is tested here is the bookkeeping."""
    monkeypatch.setattr(demo, "SIDE", 64)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.usefixtures("_small")
def test_writes_figures_plot_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert throughput.main(["seg_t_linear_16", "--out", str(tmp_path), "--dtype", "float32", "--device", "cpu"]) == 0
    (path,) = tmp_path.glob("*/throughput.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert row["labels"] > 0.999
    assert 0 < row["fast"]["p20_ms"] <= row["fast"]["median_ms"] <= row["fast"]["p80_ms"]
    assert path.with_suffix(".png").stat().st_size > 1000
    assert f"{1000 / row['fast']['median_ms']:.2f}" in throughput.markdown(path)
    assert throughput.markdown(path) in capsys.readouterr().out


@pytest.mark.usefixtures("_small")
def test_a_wrong_kernel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "segmenter_fast.optimize.kernels.upsample_argmax", lambda m, s, c: m.new_zeros(1, 64, 64).byte()
    )
    assert throughput.main(["seg_t_mask_16", "--out", str(tmp_path), "--dtype", "float32", "--device", "cpu"]) == 1
    assert not list(tmp_path.glob("*/throughput.json"))


def test_unknown_variants_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        throughput.main(["seg_q"])
    assert "unknown variants seg_q" in capsys.readouterr().err


def test_the_readme_shows_the_committed_figures() -> None:
    committed = sorted((ROOT / "benchmarks" / "results").glob("*/throughput.json"))
    assert committed
    for path in committed:
        assert throughput.markdown(path) in (ROOT / "README.md").read_text()
