"""OpenVINO and ONNX Runtime give the reference's labels, or a row that says why they have no figures."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from segmenter_fast import VARIANTS
from segmenter_fast.benchmarks.case import OURS, Row
from segmenter_fast.benchmarks.models import comparison, runtimes
from segmenter_fast.benchmarks.models.comparison import RUNTIMES, compare_models
from segmenter_fast.benchmarks.models.peers import ModelCase, build, with_sdpa
from segmenter_fast.benchmarks.models.runtimes import ONNX_RUNTIME, OPENVINO, absence, make_call
from support.benchmarks import CEILINGS, CPU

CASE = ModelCase("seg_t_mask_16", torch.float32, size=72, batch=2, classes=7, compile=False)


@pytest.fixture(autouse=True)
def _shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "seg_t_mask_16", VARIANTS["seg_t_mask_16"].replace(depth=2, decoder_depth=1))


def need(runtime: str) -> None:
    for package in runtimes.PACKAGES[runtime]:
        pytest.importorskip(package, reason=f"{runtime} needs the package {package}")


def rows() -> dict[str, Row]:
    return {row.variant: row for row in compare_models(CASE, CPU, CEILINGS, 0.05)}


def test_each_has_the_references_labels_and_figures() -> None:
    for name in RUNTIMES:
        need(name)
    found = rows()
    for name in RUNTIMES:
        timing, share = found[name].timing, found[name].labels
        assert timing is not None
        assert timing.peak_bytes, "the buffers that it keeps from its first call count"
        assert share is not None
        assert share > 0.999


@pytest.mark.parametrize(("dtype", "hint"), [(torch.float32, "f32"), (torch.bfloat16, "bf16")])
def test_openvino_is_told_the_precision_and_the_threads(
    dtype: torch.dtype, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to itself it computes in bfloat16 where the CPU has it, on all cores."""
    need(OPENVINO)
    import openvino

    given: dict[str, Any] = {}

    def stop(core: Any, model: Any, device: str, settings: dict[str, Any]) -> Any:
        given.update(settings)
        raise InterruptedError

    monkeypatch.setattr(openvino, "convert_model", lambda *_, **__: None)
    monkeypatch.setattr(openvino.Core, "compile_model", stop)
    _, reference, images = build(CASE, CPU)
    with pytest.raises(InterruptedError):
        make_call(OPENVINO, with_sdpa(reference, torch.float32), images, dtype)
    assert given["INFERENCE_PRECISION_HINT"] == hint
    assert given["INFERENCE_NUM_THREADS"] == torch.get_num_threads() == 1


def test_a_missing_package_is_a_row_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = rows()
    for name in RUNTIMES:
        assert found[name].status == "absent"
        assert "pip install 'segmenter-fast[bench-peers]'" in found[name].note
    assert "onnxscript" in found[ONNX_RUNTIME].note
    assert found[OURS].status == "ok"
    assert absence(OPENVINO, torch.device("cuda")) == "for a CPU only"


def test_wrong_labels_and_errors_of_a_runtime_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(runtime: str, *_: Any) -> Any:
        if runtime == OPENVINO:
            raise RuntimeError("no such op")
        return lambda: torch.zeros(2, 72, 72, dtype=torch.int64)

    monkeypatch.setattr(comparison, "absence", lambda *_: None)
    monkeypatch.setattr(comparison, "make_call", make)
    found = rows()
    assert (found[OPENVINO].status, found[OPENVINO].note) == ("failed", "RuntimeError: no such op")
    assert (found[ONNX_RUNTIME].status, found[ONNX_RUNTIME].timing) == ("disagrees", None)
    assert found[OURS].status == "ok"
