"""The worst ratio of our defaults to plain PyTorch is found, printed and written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from segmenter_fast import VARIANTS
from segmenter_fast.benchmarks import runner
from segmenter_fast.benchmarks.case import Row
from segmenter_fast.benchmarks.device import describe
from segmenter_fast.benchmarks.models import defaults
from segmenter_fast.benchmarks.models.comparison import REFERENCE
from segmenter_fast.benchmarks.models.defaults import FORWARD, OPTIMIZE, OUTPUTS, SDPA, ratios_of
from segmenter_fast.benchmarks.models.peers import ModelCase
from segmenter_fast.benchmarks.results import read
from segmenter_fast.cli import app
from support.benchmarks import CEILINGS, CPU, timing_of

OPTIONS = ("bench", "defaults", "--size=64", "--device=cpu", "--seconds=0.05")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("seg_t_mask_16", "seg_t_linear_16"):
        monkeypatch.setitem(VARIANTS, name, VARIANTS[name].replace(depth=2, decoder_depth=1))
    monkeypatch.setattr(runner, "measure_ceilings", lambda *args, **kwargs: CEILINGS)
    monkeypatch.setattr(defaults, "CLEARLY", 0.0)


def test_every_form_is_timed_against_plain_pytorch(tmp_path: Path) -> None:
    variants = "--variant=seg_t_mask_16", "--variant=seg_t_linear_16"
    done = CliRunner().invoke(app, [*OPTIONS, *variants, "--batch=1", "--batch=2", f"--out={tmp_path}"])
    assert done.exit_code == 0, done.output
    found = read(tmp_path / describe(CPU).slug / "defaults.json")
    assert len(found.cases) == 8, "two variants, two batches, labels and logits"
    for case, rows in found.cases:
        assert all(row.timing for row in rows)
        wanted = set(OUTPUTS.names[case["output"]]) - ({"ours accelerate"} if "linear" in case["variant"] else set())
        assert {row.variant for row in rows} == wanted
    worst = max(max(ratios) for ratios in ratios_of(found.cases).values())
    assert f"worst ratio: {worst[0]:.2f}x the time of plain PyTorch" in " ".join(done.output.split())


def test_the_ratio_is_over_the_faster_plain_form() -> None:
    def rows(**times: float) -> list[Row]:
        names = {"reference": REFERENCE, "sdpa": SDPA, "optimize": OPTIMIZE, "forward": FORWARD}
        return [Row(names[name], "ok", timing=timing_of(ms)) for name, ms in times.items()]

    case = ModelCase("seg_t_mask_16", torch.float32).parameters | {"output": "labels"}
    untimed = [Row(REFERENCE, "not run"), Row(OPTIMIZE, "not run")]
    cases = [
        (case, rows(reference=20.0, sdpa=10.0, optimize=5.0, forward=11.0)),
        (case | {"batch": 4}, rows(sdpa=10.0, optimize=12.0, forward=10.0)),
        (case | {"batch": 2}, untimed),
    ]
    found = ratios_of(cases)
    assert [ratio for ratio, _ in found[OPTIMIZE]] == pytest.approx([0.5, 1.2])
    assert [ratio for ratio, _ in found[FORWARD]] == pytest.approx([1.1, 1.0])
    assert "batch 4" in max(found[OPTIMIZE])[1]


def test_a_wrong_kernel_is_refused_and_a_budget_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*OPTIONS, "--variant=seg_t_mask_16", "--batch=1", f"--out={tmp_path}"]
    done = CliRunner().invoke(app, [*arguments, "--budget=0"])
    assert done.exit_code == 2
    assert "nothing was measured" in done.stderr
    assert len(read(tmp_path / describe(CPU).slug / "defaults.json").not_run) == 1
    monkeypatch.setattr("segmenter_fast.vit.kernels.attention", lambda qkv, **_: qkv[:, :, 2].contiguous())
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1, done.output
    assert "refused" in done.output
