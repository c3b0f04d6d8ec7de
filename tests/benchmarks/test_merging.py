"""The benchmark of token merging: figures, labels kept, and a schedule whose labels are wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import segmenter_fast.benchmarks.models.merging as merging
from segmenter_fast import VARIANTS, inference_segmenter
from segmenter_fast.benchmarks.device import Ceilings
from segmenter_fast.benchmarks.models import comparison
from segmenter_fast.benchmarks.models.peers import ModelCase
from segmenter_fast.benchmarks.results import Result, read
from segmenter_fast.token_merging import MERGING, TokenMerging
from support.benchmarks import CEILINGS, CPU
from support.real import PHOTOGRAPHS, WEIGHTS, needs_real_weights


def run(
    out: Path, monkeypatch: pytest.MonkeyPatch, weights: Path | None = None, photographs: Sequence[Path] = ()
) -> tuple[int, Result]:
    monkeypatch.setattr("segmenter_fast.benchmarks.runner.measure_ceilings", lambda *_, **__: Ceilings(1.0, {}))
    monkeypatch.setattr("segmenter_fast.benchmarks.runner.Runner.draw", lambda self, plots: None)
    refused = merging.run_merging(weights, photographs, ["seg_m_mask_8"], "float32", device=CPU, seconds=0.0, out=out)
    return refused, read(next(out.glob("*/merging.json")))


def test_speed_needs_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused, result = run(tmp_path, monkeypatch)
    [(case, rows)] = result.cases
    assert refused == 0
    assert case["variant"] == "seg_m_mask_8"
    assert case["tokens"] == 4097
    assert [row.variant for row in rows] == ["ours exact", *(f"ours {name}" for name in MERGING)]
    assert all(row.timing and row.images_s and row.labels is None for row in rows)
    assert rows[1].note == f"{TokenMerging.of('fast', 4).tokens_left(4096, 4)[-1]} of 4096 patch tokens left"


def test_a_form_that_disagrees_with_its_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = merging._labels
    plain = merging.Segmenter

    def wrong(model, images):
        labels = honest(model, images)
        return labels if isinstance(model, plain) or model.config.merging is None else labels + 1

    monkeypatch.setattr(merging, "_labels", wrong)
    refused, result = run(tmp_path, monkeypatch)
    assert refused == 2
    assert [row.status for row in result.cases[0][1]] == ["ok", "refused", "refused"]


@needs_real_weights
def test_labels_of_real_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "UNIFORM", {})
    refused, result = run(tmp_path, monkeypatch, WEIGHTS, PHOTOGRAPHS[:2])
    exact, fast, faster = result.cases[0][1]
    assert refused == 0
    assert exact.labels > 0.9999  # ties that rounding decides
    assert 0.96 < fast.labels < 1
    assert exact.note.endswith("of crops 100.00% of the labels, 100.00% of the worst")
    kept = [float(share) / 100 for share in re.findall(r"([\d.]+)%", fast.note)]
    assert 0.9 < kept[1] <= kept[0] < 1
    assert 0.9 < faster.labels < fast.labels


def test_weights_without_photographs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give at least one"):
        merging.run_merging(WEIGHTS, [], device=CPU, out=tmp_path)


def test_rows_of_a_form_that_merges_otherwise_than_its_model_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "absence", lambda *_: "left out here")
    monkeypatch.setitem(VARIANTS, "seg_t_mask_16", VARIANTS["seg_t_mask_16"].replace(depth=2, decoder_depth=1))
    merge, right = '{"layers": [0], "share": 0.5}', inference_segmenter.run_blocks
    case = ModelCase("seg_t_mask_16", torch.float32, size=64, classes=7, compile=False, merge=(merge,))
    rows = comparison.compare_models(case, CPU, CEILINGS, 0.0)
    assert [row.status for row in rows[-2:]] == ["ok", "ok"]

    def late(blocks: Any, x: Any, rotation: Any, grid: Any, schedule: TokenMerging | None) -> Any:
        return right(blocks, x, rotation, grid, schedule and replace(schedule, layers=(1,)))

    monkeypatch.setattr(inference_segmenter, "run_blocks", late)
    rows = comparison.compare_models(case, CPU, CEILINGS, 0.0)
    assert {row.status for row in rows} == {"refused"}
    assert len(rows) == len(comparison.MODELS) + 1
    assert f"ours {merge}: " in rows[0].note
