"""Whole-model throughput: what is wrong, has no room or no time is a row without figures; README and plots follow."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from segmenter_fast.benchmarks import agreement, models, plots, readme, split, throughput
from segmenter_fast.benchmarks.cases import Row
from segmenter_fast.benchmarks.device import Ceilings, describe
from segmenter_fast.benchmarks.models import MODELS, OURS, PEER, REFERENCE, Point, run_point
from segmenter_fast.benchmarks.results import read, write
from segmenter_fast.benchmarks.timing import Timing
from segmenter_fast.cli import app

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CEILINGS = Ceilings(10.0, {"float32": 0.3})
POINT = Point("seg_t_mask_16", torch.float32, size=64, classes=7, compile=False)
SMALL = ("--size=64", "--classes=7", "--dtype=float32", "--device=cpu", "--no-compile", "--seconds=0.05")


@pytest.fixture
def _ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "measure_ceilings", lambda *args, **kwargs: CEILINGS)
    monkeypatch.setattr(throughput, "CLASSES", (3,))


@pytest.fixture
def _wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that returns the values: logits of the right shape and scale, and wrong."""
    monkeypatch.setattr("segmenter_fast.vit.kernels.attention", lambda qkv: qkv[:, :, 2].contiguous())


def rows_of(point: Point, seconds: float = 0.05) -> dict[str, Row]:
    return {row.variant: row for row in run_point(point, CPU, CEILINGS, seconds)}


def bench(out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *SMALL, f"--out={out}", *arguments])


@pytest.mark.usefixtures("_ceilings")
def test_the_command_writes_figures_plots_and_a_table(tmp_path: Path) -> None:
    done = bench(tmp_path, "--variant=seg_t_mask_16", "--variant=seg_t_mask_32")
    assert done.exit_code == 0, done.output
    folder = tmp_path / describe(CPU).slug
    assert sorted(path.name for path in folder.iterdir()) == [
        *("classes.json", "classes.png", "split.json", "split.png", "throughput.json", "throughput.png")
    ]
    found = read(folder / "throughput.json")
    assert [(case["patch"], case["tokens"]) for case, _ in found.cases] == [(16, 17), (32, 5)]
    for _, rows in found.cases:
        by_name = {row.variant: row for row in rows}
        assert tuple(by_name) == MODELS
        for name in (REFERENCE, PEER, OURS):
            row = by_name[name]
            assert row.timing is not None
            assert row.images_s == pytest.approx(1000 / row.timing.median_ms)
            assert row.timing.p20_ms <= row.timing.median_ms <= row.timing.p80_ms
            assert row.error is not None
            assert row.error < 1e-4
            assert row.labels is not None
            assert row.labels > 0.99
            assert row.share is not None
        assert by_name["peer cuDNN"].status == "absent"
    assert [case["classes"] for case, _ in read(folder / "classes.json").cases] == [3]
    assert {case["part"] for case, _ in read(folder / "split.json").cases} == set(split.PARTS)
    assert "[1/5," in done.output
    assert "over ref. " in done.output


def test_flops_and_batches_are_counted() -> None:
    one = rows_of(POINT)[OURS]
    assert one.timing is not None
    assert one.tflops == pytest.approx(POINT.flops / one.timing.median_ms / 1e9)
    assert one.share == pytest.approx(one.tflops / 0.3)
    assert replace(POINT, batch=3).flops == 3 * POINT.flops
    model, _, images = models.build(replace(POINT, batch=3), CPU)
    assert images.shape == (3, 3, 64, 64)
    assert not torch.equal(images[0], images[1])
    assert model.config.num_classes == 7


@pytest.mark.usefixtures("_ceilings", "_wrong_kernel")
def test_a_wrong_kernel_is_refused(tmp_path: Path) -> None:
    done = bench(tmp_path, "--variant=seg_t_mask_16")
    assert done.exit_code == 1, done.output
    assert "refused" in done.output
    for path in tmp_path.glob("*/*.json"):
        found = read(path)
        assert found.refused
        assert all(row.status == "refused" and row.timing is None for _, rows in found.cases for row in rows)
    assert len(list(tmp_path.glob("*/*.json"))) == 3
    assert not list(tmp_path.rglob("*.png")), "nothing was timed"


def test_labels_that_are_no_argmax_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def neighbour(masks: Tensor, size: Any, crop: Any) -> Tensor:
        return (torch.nn.functional.interpolate(masks.float(), size=size).argmax(1) + 1) % masks.shape[1]

    monkeypatch.setattr("segmenter_fast.optimize.kernels.upsample_argmax", neighbour)
    rows = rows_of(POINT)
    assert {row.status for row in rows.values()} == {"refused"}
    assert "labels are" in rows[OURS].note


def test_no_room_for_the_reference_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "available_memory", lambda device: 1000)
    rows = rows_of(POINT)
    assert rows[REFERENCE].status == "out of memory"
    assert "SDPA" in rows[REFERENCE].note
    assert rows[REFERENCE].timing is None
    assert rows[OURS].status == rows[PEER].status == "ok"
    monkeypatch.setattr(split, "available_memory", lambda device: 1000)
    found = split.split_point(POINT, CPU, 0.05)
    assert {row.status for _, rows in found for row in rows} == {"out of memory"}


@pytest.mark.parametrize(
    ("error", "status"),
    [(torch.OutOfMemoryError("CUDA out of memory"), "out of memory"), (RuntimeError("x"), "failed")],
)
def test_a_peer_that_fails_is_a_row(error: Exception, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(models._Session, "_peer", fail)
    rows = rows_of(POINT)
    assert (rows[PEER].status, rows[PEER].timing) == (status, None)
    assert rows[OURS].status == "ok"


@pytest.mark.usefixtures("_ceilings")
def test_what_the_budget_has_no_time_for_is_not_run(tmp_path: Path) -> None:
    done = bench(tmp_path, "--budget=0", "--variant=seg_t_mask_32", "--variant=seg_t_mask_16")
    assert done.exit_code == 0, done.output
    for path in tmp_path.glob("*/*.json"):
        found = read(path)
        assert len(found.not_run) == len({case["variant"] + str(case["classes"]) for case, _ in found.cases})
        assert all(row.status == "not run" and "budget" in row.note for _, rows in found.cases for row in rows)
    assert len(list(tmp_path.glob("*/*.json"))) == 3
    assert not list(tmp_path.rglob("*.png"))


def test_the_pace_is_learnt() -> None:
    pace = throughput.Pace(1.0, 60.0)
    job = throughput.Job("throughput", replace(POINT, compile=True))
    assert pace.expects(job, 3.0) == pytest.approx(63.0)

    def learn(job: throughput.Job, seconds: float, took: float) -> None:
        timing = Timing(1000 * seconds, 990 * seconds, 1010 * seconds, 5, 1, 1, "perf_counter", None)
        row = Row(REFERENCE, "ok", timing=timing, tflops=job.point.flops / seconds / 1e12)
        pace.learn(job, [({}, [row])], took)

    learn(job, 1.0, 40.0)
    assert pace.expects(job, 3.0) == pytest.approx(40.0), "12 calls of a second, and what the compiler took"
    learn(job, 9.0, 9 * 12 + 28.0)
    learn(job, 2.0, 2 * 12 + 28.0)
    learn(replace(job, op="classes"), 5.0, 90.0)
    assert pace.expects(job, 3.0) == pytest.approx(2 * 12 + 28), "that of most, not of the last"


@pytest.mark.parametrize("arguments", [["--variant=seg_q"], ["--size=0"]])
def test_bad_options_are_named(arguments: list[str], tmp_path: Path) -> None:
    done = bench(tmp_path, *arguments)
    assert done.exit_code == 2
    assert "seg_q" in done.output or "size" in done.output


def test_a_nan_and_an_off_label_have_a_fault() -> None:
    yardstick = agreement.Yardstick(agreement.Agreement(1e-6, 1.0), torch.float32)
    assert yardstick.fault_of_logits(2e-6) is None
    assert yardstick.fault_of_logits(float("nan"))
    assert yardstick.fault_of_logits(1e-3)
    assert yardstick.fault_of_labels(0.999) is None
    assert yardstick.fault_of_labels(0.98)
    logits = torch.randn(1, 5, 40, 40)
    labels = logits.argmax(1)
    assert yardstick.fault_of_argmax(labels, logits) is None
    assert yardstick.fault_of_argmax((labels + 1) % 5, logits)
    broken = agreement.Yardstick(agreement.Agreement(50.0, 0.0), torch.float32)
    assert broken.fault_of_logits(1.0), "a peer that is wrong itself excuses nothing"


def test_plots_come_from_json_alone(tmp_path: Path) -> None:
    (committed,) = sorted((ROOT / "benchmarks" / "results").glob("*/throughput.json"))[:1]
    found = read(committed)
    write(found, tmp_path)
    assert plots.main([str(tmp_path / found.device.slug)]) == 0
    (drawn,) = tmp_path.rglob("*.png")
    assert drawn.name == "throughput.png"
    assert drawn.stat().st_size > 10_000


def test_the_readme_shows_the_committed_figures(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    results = ROOT / "benchmarks" / "results"
    assert readme.rewritten(text, results) == text, "run python -m segmenter_fast.benchmarks.readme"
    committed = sorted(results.glob("*/throughput.json"))
    assert committed
    content = json.loads(committed[0].read_text())
    timed = next(row for case in content["cases"] for row in case["rows"] if row["timing"])
    timed["images_s"] *= 2
    folder = tmp_path / committed[0].parent.name
    folder.mkdir()
    (folder / "throughput.json").write_text(json.dumps(content))
    assert readme.rewritten(text, tmp_path) != text
    with pytest.raises(ValueError, match="one block"):
        readme.rewritten("no block", results)
