"""Training steps: no time before loss and gradients agree with the reference; the command writes and draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from segmenter_fast import VARIANTS, kernels
from segmenter_fast.benchmarks import run as run_module
from segmenter_fast.benchmarks import training
from segmenter_fast.benchmarks.cases import Case, DisagreementError, Row, run_case
from segmenter_fast.benchmarks.device import Ceilings
from segmenter_fast.benchmarks.results import read
from segmenter_fast.benchmarks.training import Point, chosen_points, make_case

CPU = torch.device("cpu")
CEILINGS = Ceilings(10.0, {"float32": 0.1, "bfloat16": 1.0})
SMALL = Point(size=64, classes=7, batch=2)


@pytest.fixture(autouse=True)
def _shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    small = VARIANTS["seg_t_mask_16"].replace(depth=1, decoder_depth=1)
    monkeypatch.setitem(VARIANTS, "seg_t_mask_16", small)
    monkeypatch.setattr(run_module, "measure_ceilings", lambda *args, **kwargs: CEILINGS)


@pytest.fixture
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def run(case: Case) -> dict[str, Row]:
    return {row.variant: row for row in run_case(case, CEILINGS, seconds=0.02, min_samples=2)}


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_variant_agrees_and_is_timed(dtype: torch.dtype) -> None:
    rows = run(make_case(CPU, dtype, SMALL))
    low = dtype is torch.bfloat16
    assert list(rows) == ["eager", *(["eager AMP"] if low else []), "compile", "ours", "ours compiled"]
    for row in rows.values():
        assert row.status == "ok", row.note
        assert row.timing is not None
        assert row.images_s == pytest.approx(2e3 / row.timing.median_ms)
        assert row.tflops is not None
        assert row.gb_s is None
        assert row.error is not None
        assert row.error < (0.03 if low else 1e-5)


def test_compiled_steps_agree() -> None:
    rows = run(make_case(CPU, torch.float32, SMALL))
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

    def wrong(qkv: torch.Tensor) -> torch.Tensor:
        return right(torch.cat([qkv[:, :, :2], qkv[:, :, 2:].detach()], 2))

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
        run(make_case(CPU, torch.float32, SMALL))


@pytest.mark.usefixtures("_uncompiled")
def test_only_the_compiled_form_being_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(CPU, torch.float32, SMALL)
    ours: Any = case.variants["ours compiled"]
    wrong = replace(ours, run=lambda *inputs: (ours.run(*inputs)[0], {}))
    with pytest.raises(DisagreementError, match="ours compiled disagrees"):
        run(replace(case, variants=case.variants | {"ours compiled": wrong}))


@pytest.mark.usefixtures("_uncompiled")
def test_the_command_writes_draws_and_names_what_is_left_out(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--dtype", "float32", "--quick", "--size", "64", "--batch", "1", "--no-compile"]
    options += ["--classes", "3", "--classes", "5", "--patch", "32", "--out", str(tmp_path)]
    assert training.main(options) == 0
    (path,) = tmp_path.glob("*/training.json")
    found = read(path)
    assert [(case["patch"], case["classes"]) for case, _ in found.cases] == [(32, 3), (32, 5)]
    rows = {row.variant: row for row in found.cases[0][1]}
    assert rows["compile"].status == rows["ours compiled"].status == "absent"
    assert rows["ours"].timing is not None
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_what_cannot_fit_is_a_row() -> None:
    huge = make_case(CPU, torch.float32, Point("t", patch=8, size=8192, batch=64))
    eager: Any = huge.variants["eager"]
    assert eager.needs_bytes > 2**40


@pytest.mark.parametrize("arguments", [["--patch", "0"], ["--size", "8"], ["--classes", "0"], ["--batch", "0"]])
def test_sizes_that_no_model_has_are_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        training.main([*arguments, "--device", "cpu", "--out", str(tmp_path)])
    assert "must be" in capsys.readouterr().err


def test_defaults_are_distinct_and_begin_with_the_most_valuable() -> None:
    assert chosen_points(torch.device("cuda"), False)[0] == Point("b", 16, 150, 512, 8)
    for device in (CPU, torch.device("cuda")):
        points = chosen_points(device, False)
        assert len(set(points)) == len(points)
        assert {8, 16, 32} <= {point.patch for point in points}
        assert {19, 150, 1000} <= {point.classes for point in points}
