"""Training steps: no time before loss and gradients agree with the reference; the command writes and draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from segmenter_fast import VARIANTS, kernels
from segmenter_fast.benchmarks import runner, training
from segmenter_fast.benchmarks.case import DisagreementError
from segmenter_fast.benchmarks.results import RESULTS, read
from segmenter_fast.benchmarks.training import StepShape, choose_steps, step_case
from support.benchmarks import CEILINGS, CPU, timed_rows

SMALL = StepShape(size=64, classes=7, batch=2)


@pytest.fixture(autouse=True)
def _shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    small = VARIANTS["seg_t_mask_16"].replace(depth=1, decoder_depth=1)
    monkeypatch.setitem(VARIANTS, "seg_t_mask_16", small)
    monkeypatch.setattr(runner, "measure_ceilings", lambda *args, **kwargs: CEILINGS)


@pytest.fixture
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_variant_agrees_and_is_timed(dtype: torch.dtype) -> None:
    rows = timed_rows(step_case(CPU, dtype, SMALL))
    low = dtype is torch.bfloat16
    assert list(rows) == ["eager", *(["eager AMP"] if low else []), "compile", "ours", "ours compiled"]
    for row in rows.values():
        assert row.status == "ok", row.note
        assert row.timing is not None
        assert row.timing.peak_bytes is None or row.timing.peak_bytes > 0
        assert row.images_s == pytest.approx(2e3 / row.timing.median_ms)
        assert row.tflops is not None
        assert row.gb_s is None
        assert row.error is not None
        assert row.error < (0.03 if low else 1e-5)


def test_compiled_steps_agree() -> None:
    rows = timed_rows(step_case(CPU, torch.float32, SMALL))
    for name in ("compile", "ours compiled"):
        assert rows[name].status == "ok", rows[name].note
        assert rows[name].error is not None
        assert rows[name].error < 1e-5


def scaled_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.upsample_cross_entropy
    monkeypatch.setattr(kernels, "upsample_cross_entropy", lambda *a, **k: 1.01 * right(*a, **k))


def a_gradient_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The output is right; the values' part of the gradient is not."""
    right = kernels.attention

    def wrong(qkv: torch.Tensor, **options: Any) -> torch.Tensor:
        return right(torch.cat([qkv[:, :, :2], qkv[:, :, 2:].detach()], 2), **options)

    monkeypatch.setattr(kernels, "attention", wrong)


def nan(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.mask_scores
    monkeypatch.setattr(kernels, "mask_scores", lambda *a: right(*a) * float("nan"))


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.parametrize("breaks", [scaled_loss, a_gradient_lost, nan])
def test_a_wrong_kernel_is_refused(
    breaks: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks(monkeypatch)
    with pytest.raises(DisagreementError, match="ours disagrees"):
        timed_rows(step_case(CPU, torch.float32, SMALL))


@pytest.mark.usefixtures("_uncompiled")
def test_only_the_compiled_form_being_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = step_case(CPU, torch.float32, SMALL)
    ours: Any = case.variants["ours compiled"]
    wrong = replace(ours, run=lambda *inputs: (ours.run(*inputs)[0], {}))
    with pytest.raises(DisagreementError, match="ours compiled disagrees"):
        timed_rows(replace(case, variants=case.variants | {"ours compiled": wrong}))


@pytest.mark.usefixtures("_uncompiled")
def test_the_command_writes_draws_and_names_what_is_left_out(tmp_path: Path) -> None:
    options = {"size": 64, "batch": 1, "device": CPU, "dtype": "float32", "quick": True, "compile": False}
    assert training.run_training(patches=[32], classes=[3, 5], out=tmp_path, **options) == 0
    (path,) = tmp_path.glob("*/training.json")
    found = read(path)
    assert [(case["patch"], case["classes"]) for case, _ in found.cases] == [(32, 3), (32, 5)]
    rows = {row.variant: row for row in found.cases[0][1]}
    assert rows["compile"].status == rows["ours compiled"].status == "absent"
    assert rows["ours"].timing is not None
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_what_cannot_fit_is_a_row() -> None:
    huge = step_case(CPU, torch.float32, StepShape("t", patch=8, size=8192, batch=64))
    eager: Any = huge.variants["eager"]
    assert eager.needs_bytes > 2**40


@pytest.mark.parametrize("given", [{"patches": [0]}, {"size": 8}, {"classes": [0]}, {"models": ["q"]}], ids=str)
def test_sizes_that_no_model_has_are_refused(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be|unknown variant"):
        training.run_training(**given, device=CPU, out=tmp_path)


def test_defaults_are_distinct_and_begin_with_the_most_valuable() -> None:
    assert choose_steps(torch.device("cuda"), False)[0] == StepShape("b", 16, 150, 512, 8)
    for device in (CPU, torch.device("cuda")):
        points = choose_steps(device, False)
        assert len(set(points)) == len(points)
        assert {8, 16, 32} <= {point.patch for point in points}
        assert {19, 150, 1000} <= {point.classes for point in points}


def test_our_steps_took_at_most_half_of_the_reference_s_memory() -> None:
    """The committed steps with 150 classes."""
    committed = sorted(RESULTS.glob("*/training.json"))
    assert committed
    for path in committed:
        found = [rows for case, rows in read(path).cases if case["classes"] == 150]
        assert found
        for rows in found:
            peaks = {row.variant: row.timing.peak_bytes for row in rows if row.timing and row.timing.peak_bytes}
            assert peaks["ours"] <= 0.5 * peaks["eager"]
