"""Whole models: one that is wrong, has no room or no time is a row without figures."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from segmenter_fast import VARIANTS
from segmenter_fast.benchmarks import case, runner
from segmenter_fast.benchmarks.case import OURS, Row
from segmenter_fast.benchmarks.deadline import time_limit
from segmenter_fast.benchmarks.device import describe
from segmenter_fast.benchmarks.models import comparison, parts, throughput
from segmenter_fast.benchmarks.models.comparison import MODELS, PEER, REFERENCE, Accuracy, Limits, compare_models
from segmenter_fast.benchmarks.models.peers import ModelCase, build
from segmenter_fast.benchmarks.results import read
from segmenter_fast.cli import app
from support.benchmarks import CEILINGS, CPU, timing_of

CASE = ModelCase("seg_t_mask_16", torch.float32, size=64, classes=7, compile=False)
SMALL = ("--size=64", "--classes=7", "--dtype=float32", "--device=cpu", "--no-compile", "--seconds=0.05")


@pytest.fixture(autouse=True)
def _shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("seg_t_mask_16", "seg_t_mask_32"):
        monkeypatch.setitem(VARIANTS, name, VARIANTS[name].replace(depth=2, decoder_depth=1))


@pytest.fixture(autouse=True)
def _no_runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take seconds to convert a model; test_runtimes.py has them."""
    monkeypatch.setattr(comparison, "absence", lambda *_: "left out here")


@pytest.fixture
def _ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "measure_ceilings", lambda *args, **kwargs: CEILINGS)
    monkeypatch.setattr(throughput, "CLASSES", (3,))


@pytest.fixture
def _wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that returns the values: logits of the right shape and scale, and wrong."""
    monkeypatch.setattr("segmenter_fast.vit.kernels.attention", lambda qkv, **_: qkv[:, :, 2].contiguous())


def rows_of(model: ModelCase) -> dict[str, Row]:
    return {row.variant: row for row in compare_models(model, CPU, CEILINGS, 0.05)}


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
    assert {case["part"] for case, _ in read(folder / "split.json").cases} == set(parts.PARTS)
    assert "[1/5," in done.output
    assert "peer cuDNN: absent" in done.output
    assert done.output.count("\nours ") == 9, "two models, one of other classes, two of three parts"


def test_flops_and_batches_are_counted() -> None:
    one = rows_of(CASE)[OURS]
    assert one.timing is not None
    assert one.tflops == pytest.approx(CASE.flops / one.timing.median_ms / 1e9)
    assert one.share == pytest.approx(one.tflops / CEILINGS.matmul_tflops["float32"])
    assert replace(CASE, batch=3).flops == 3 * CASE.flops
    model, _, images = build(replace(CASE, batch=3), CPU)
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


@pytest.mark.usefixtures("_ceilings")
def test_token_merging_has_rows_of_its_own(tmp_path: Path) -> None:
    half = '{"layers": [0], "share": 0.5}'
    done = bench(tmp_path, "--variant=seg_t_mask_16", "--no-extras", "--merge=none", f"--merge={half}")
    assert done.exit_code == 0, done.output
    [(_, rows)] = read(next(tmp_path.glob("*/throughput.json"))).cases
    assert tuple(row.variant for row in rows) == (*MODELS, "ours none", f"ours {half}")
    exact, none, merged = rows[-3:]
    assert exact.labels == none.labels == 1
    assert merged.labels is not None
    assert merged.labels < 0.9
    assert all(row.timing and row.tflops for row in rows[-3:])
    work = [row.tflops * row.timing.median_ms * 1e9 for row in (exact, none, merged)]
    assert work == pytest.approx([CASE.flops, CASE.flops, CASE.flops_with(json.loads(half))])
    assert work[2] < 0.75 * work[1]
    assert f"seg_t_mask_16 {half}" in " ".join(done.output.split())


def test_labels_that_are_no_argmax_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def neighbour(masks: Tensor, size: Any, crop: Any, **_: Any) -> Tensor:
        return (torch.nn.functional.interpolate(masks.float(), size=size).argmax(1) + 1) % masks.shape[1]

    monkeypatch.setattr("segmenter_fast.decoders.kernels.upsample_argmax", neighbour)
    rows = rows_of(CASE)
    assert {row.status for row in rows.values()} == {"refused"}
    assert "labels are" in rows[OURS].note


def test_no_room_for_the_reference_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case, "available_memory", lambda device: 1000)
    rows = rows_of(CASE)
    assert rows[REFERENCE].status == "out of memory"
    assert "SDPA" in rows[REFERENCE].note
    assert rows[REFERENCE].timing is None
    assert rows[OURS].status == rows[PEER].status == "ok"
    found = parts.GROUPS.measure(CASE, CPU, 0.05)
    assert {row.status for _, rows in found for row in rows} == {"out of memory"}


@pytest.mark.parametrize(
    ("error", "status"),
    [(torch.OutOfMemoryError("CUDA out of memory"), "out of memory"), (RuntimeError("x"), "failed")],
)
def test_a_peer_that_fails_is_a_row(error: Exception, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(comparison.Comparison, "_peer", fail)
    rows = rows_of(CASE)
    assert (rows[PEER].status, rows[PEER].timing) == (status, None)
    assert rows[OURS].status == "ok"


@pytest.fixture
def _staged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of CUDA, with peers that are not compiled."""
    for module in (comparison, throughput):
        monkeypatch.setattr(module, "in_stages", lambda device: True)
    right = comparison.Comparison.makers

    def makers(self: comparison.Comparison) -> Any:
        return right(self) | {name: self._peer for name in comparison.LATE}

    monkeypatch.setattr(comparison.Comparison, "makers", makers)


@pytest.mark.usefixtures("_ceilings", "_staged")
def test_rows_come_one_by_one_and_the_slowest_to_compile_after_all_cases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[list[set[str]]] = []

    def record(result: Any, out: Path) -> None:
        written.append([{row.variant for row in rows if row.timing} for _, rows in result.cases])

    monkeypatch.setattr(throughput, "write", record)
    cases = [replace(CASE, variant=variant) for variant in ("seg_t_mask_16", "seg_t_mask_32")]
    jobs = [throughput.Job("throughput", case, late=late) for late in (False, True) for case in cases]
    throughput.run_jobs(jobs, [], device=CPU, seconds=0.02, budget=None, out=tmp_path)
    steps = [REFERENCE, OURS, PEER, comparison.CUDNN, comparison.AUTOTUNED]
    early, late = [set(steps[:n]) for n in (2, 3)], [set(steps[:n]) for n in (4, 5)]
    expected = [[found, set()] for found in (*early, early[-1])] + [[early[-1], found] for found in (*early, early[-1])]
    expected += [[found, early[-1]] for found in (*late, late[-1])] + [[late[-1], found] for found in (*late, late[-1])]
    assert written == expected


@pytest.mark.usefixtures("_staged")
def test_a_peer_that_is_not_ready_in_time_is_not_run_and_the_others_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: Any) -> Any:
        time.sleep(60)

    right, calls, limits = comparison.Comparison._peer, iter([0, 1, 2]), iter([math.inf, 60.0, 0.2, 0.2])
    monkeypatch.setattr(comparison.Comparison, "_peer", lambda self: slow() if next(calls) else right(self))
    # Ours has no limit; the peer has as much as it needs.
    monkeypatch.setattr(comparison, "time_limit", lambda _: time_limit(time.monotonic() + next(limits)))
    rows = {row.variant: row for row in compare_models(CASE, CPU, CEILINGS, 0.02)}
    assert all(rows[name].timing for name in (REFERENCE, OURS, PEER))
    assert all(rows[name].status == "not run" and not rows[name].timing for name in comparison.LATE)
    assert "time was up" in rows[comparison.CUDNN].note


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


def test_the_time_of_a_case_is_estimated_from_those_before() -> None:
    estimate = throughput.TimeEstimate(1.0, 60.0)
    job = throughput.Job("throughput", replace(CASE, compile=True))
    assert estimate.expect(job, 3.0) == pytest.approx(63.0)

    def update(job: throughput.Job, seconds: float, took: float) -> None:
        row = Row(REFERENCE, "ok", timing=timing_of(1000 * seconds), tflops=job.case.flops / seconds / 1e12)
        estimate.update(job, [({}, [row])], took)

    update(job, 1.0, 40.0)
    assert estimate.expect(job, 3.0) == pytest.approx(40.0), "12 calls of a second, and the time of the compiler"
    update(job, 9.0, 9 * 12 + 28.0)
    update(job, 2.0, 2 * 12 + 28.0)
    update(replace(job, op="classes"), 5.0, 90.0)
    assert estimate.expect(job, 3.0) == pytest.approx(2 * 12 + 28), "the median, not the last one"


@pytest.mark.parametrize(
    ("argument", "named"), [("--variant=seg_q", "seg_q"), ("--size=0", "size"), ("--merge=fats", "did you mean fast?")]
)
def test_bad_options_are_named(argument: str, named: str, tmp_path: Path) -> None:
    done = bench(tmp_path, argument)
    assert done.exit_code == 2
    assert named in done.output


def test_a_nan_and_an_off_label_have_a_fault() -> None:
    limits = Limits(Accuracy(1e-6, 1.0), torch.float32)
    assert limits.logits_fault(2e-6) is None
    assert limits.logits_fault(float("nan"))
    assert limits.logits_fault(1e-3)
    assert limits.labels_fault(0.999) is None
    assert limits.labels_fault(0.98)
    logits = torch.randn(1, 5, 40, 40)
    labels = logits.argmax(1)
    assert limits.argmax_fault(labels, logits) is None
    assert limits.argmax_fault((labels + 1) % 5, logits)
    broken = Limits(Accuracy(50.0, 0.0), torch.float32)
    assert broken.logits_fault(1.0), "a peer that is wrong itself excuses nothing"


def test_jobs_begin_with_the_most_valuable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends early leaves files that name what is still to come."""

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "measure_ceilings", lambda *args, **kwargs: CEILINGS)
    monkeypatch.setattr(throughput, "compare_models", lambda case, *_: [Row(name, "absent") for name in MODELS])
    monkeypatch.setattr(throughput.Groups, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        throughput.run_models(sizes=[64], dtypes=["float32"], device=CPU, out=tmp_path)
    folder = tmp_path / describe(CPU).slug
    assert sorted(path.name for path in folder.iterdir()) == ["classes.json", "throughput.json"]
    assert [case["classes"] for case, _ in read(folder / "classes.json").cases] == list(throughput.CLASSES)
    found = read(folder / "throughput.json")
    assert [case["variant"] for case, _ in found.cases] == list(throughput.DEFAULT)
    states = [rows[0].status for _, rows in found.cases]
    assert states == ["absent"] * throughput.BEFORE_EXTRAS + ["not run"] * 6
    assert len(found.not_run) == 6
    assert found.not_run[0].endswith("the run ended before it")
