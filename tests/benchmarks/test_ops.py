"""Every op is timed only after it agrees; its judge refuses wrong results."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from segmenter_fast import kernels
from segmenter_fast.benchmarks import runner
from segmenter_fast.benchmarks.case import OURS, Case, DisagreementError, Variant, run_case
from segmenter_fast.benchmarks.ops import OPS, attention, in_turns, tokens, upsample
from segmenter_fast.benchmarks.results import read
from segmenter_fast.kernels import reference
from support.benchmarks import CEILINGS, CPU, small_case, timed_rows


def with_ours(case: Case, change: Callable[[Any], Any]) -> Case:
    """The case with our output changed."""
    ours = case.variant(OURS)
    wrong = replace(ours, run=lambda *args: change(ours.run(*args)))
    return replace(case, variants=case.variants | {OURS: wrong})


PASSES = [(op, pass_) for op, table in upsample.OPS.items() for pass_ in table.copies]
PASSES += [("attention", "forward"), ("attention", "backward")]
PASSES += [("mask_scores", "forward"), ("mask_scores", "forward+backward")]
PASSES += [(op, "forward") for op in tokens.OPS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("op", "pass_"), PASSES)
def test_every_case_agrees_and_is_timed(op: str, pass_: str, dtype: torch.dtype) -> None:
    rows = timed_rows(small_case(op, pass_, dtype))
    for name in ("eager", OURS):
        row = rows[name]
        assert row.status == "ok", row.note
        assert row.timing is not None
        assert row.timing.median_ms > 0
        assert row.share is not None
        assert (row.tflops is not None) == (op in {"attention", "mask_scores", "best_match", "attention with a bias"})


def one_label_wrong(labels: torch.Tensor) -> torch.Tensor:
    labels = labels.clone()
    labels[1, 5, 9] = (labels[1, 5, 9] + 1) % 7
    return labels


def last_grown(out: Any) -> Any:
    """The last tensor of the output, with one element off by a tenth of the largest."""
    if isinstance(out, tuple):
        return (*out[:-1], last_grown(out[-1]))
    out = out.clone()
    out[(-1,) * out.ndim] += 0.1 * out.abs().max()
    return out


def one_nan(out: Any) -> Any:
    out = out[0] if isinstance(out, tuple) else out
    return out.clone().fill_(float("nan"))


@pytest.mark.parametrize(("op", "pass_"), PASSES)
def test_a_wrong_result_of_ours_is_refused(op: str, pass_: str) -> None:
    change = one_label_wrong if op == "upsample_argmax" else last_grown
    with pytest.raises(DisagreementError, match="ours disagrees"):
        timed_rows(with_ours(small_case(op, pass_), change))


@pytest.mark.parametrize(("op", "pass_"), [("upsample_softmax", "forward"), ("attention", "backward")])
def test_nan_and_wrong_shapes_are_refused(op: str, pass_: str) -> None:
    with pytest.raises(DisagreementError):
        timed_rows(with_ours(small_case(op, pass_), one_nan))
    with pytest.raises(DisagreementError):
        timed_rows(with_ours(small_case(op, pass_), lambda out: out[:, :-1]))


def test_variants_of_every_op_include_eager_and_ours() -> None:
    for cases in OPS.values():
        case = cases(CPU, True)[0]
        assert case.variant("eager")
        assert case.variant(OURS)


def test_attention_names_its_optional_peers() -> None:
    variants = attention.attention_case(CPU, torch.float32, 1, 9, "forward").variants
    for peer, (package, _) in attention.PACKAGES.items():
        missing = importlib.util.find_spec(package) is None
        assert variants[peer] == (f"{package} is not installed" if missing else "it has no kernel for a CPU")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("quick", [True, False])
def test_cases_are_distinct_and_start_with_the_quick_ones(op: str, quick: bool) -> None:
    names = [case.name for case in OPS[op](CPU, quick)]
    assert len(set(names)) == len(names)
    assert names[0] == OPS[op](CPU, True)[0].name
    assert (len(names) <= 8) == quick


def test_the_upsample_grid_is_complete() -> None:
    cases = OPS["upsample_argmax"](CPU, False)
    float32 = {
        tuple(c.parameters[k] for k in ("classes", "patch", "size", "map")) for c in cases if c.dtype != torch.bfloat16
    }
    assert len(float32) == 4 * 3 * 3 * 2


@pytest.mark.parametrize("map_", upsample.MAPS)
def test_masks_have_the_layout_in_which_eager_is_fastest(map_: str) -> None:
    for op, layout in (("upsample_argmax", torch.channels_last), ("upsample_softmax", torch.contiguous_format)):
        masks, *_ = small_case(op, "forward", map_=map_).make_inputs(torch.Generator().manual_seed(0))
        assert masks.is_contiguous(memory_format=layout)


def test_smooth_maps_have_regions_and_noise_has_none() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (1, 150, 32, 32)
    smooth = upsample.smooth_map(shape, generator).argmax(1)
    noise = torch.randn(shape, generator=generator).argmax(1)

    def same_as_left(labels: torch.Tensor) -> float:
        return (labels[..., 1:] == labels[..., :-1]).float().mean().item()

    assert same_as_left(smooth) > 0.85
    assert same_as_left(noise) < 0.05


def test_the_oracle_of_attention_is_the_reference() -> None:
    qkv = torch.randn(1, 33, 3, 1, 8, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(1, 33, 1, 8, dtype=torch.float64)
    out = reference.attention(qkv)
    (expected,) = torch.autograd.grad(out, qkv, grad)
    one = qkv.detach()[0, :, :, 0], grad[0, :, 0]
    torch.testing.assert_close(attention.attention_oracle(*one, False), out[0, :, 0])
    torch.testing.assert_close(attention.attention_oracle(*one, True), expected[0, :, :, 0])


def test_bytes_are_counted_by_hand() -> None:
    argmax, both = small_case("upsample_argmax", "forward"), small_case("upsample_cross_entropy", "forward+backward")
    scores = small_case("mask_scores", "forward")
    assert scores.flops == 2 * 2 * 17 * 7 * 8
    assert scores.bytes_moved == 2 * (17 * 8 + 7 * 8 + 17 * 7) * 4
    masks, pixels = 2 * 7 * 4 * 4 * 4, 2 * 32 * 32
    assert argmax.bytes_moved == masks + pixels
    assert both.bytes_moved == 2 * masks + 8 * pixels
    assert small_case("attention", "forward").flops == 4 * 2 * 12 * 17 * 17 * 64


def test_the_timed_op_is_the_public_one() -> None:
    assert upsample.OPS["upsample_argmax"].ours is kernels.upsample_argmax
    assert upsample.OPS["upsample_softmax"].ours is kernels.upsample_softmax


def test_on_a_gpu_each_op_and_pass_comes_first_and_late_variants_after_them() -> None:
    cuda = torch.device("cuda")
    order = in_turns({op: OPS[op](cuda, False) for op in OPS})
    main = [(op, case.parameters["pass"]) for op, case in order[:10]]
    assert len(set(main)) == 9, "both passes of each op, but the argmax has one"
    assert {op for op, _ in main[:5]} == set(OPS)
    lengths = [
        case.parameters["tokens"] for op, case in order[:30] if op == "attention" and case.parameters["batch"] > 1
    ]
    assert set(lengths) == set(attention.FILLING)
    late = [number for number, (_, case) in enumerate(order) if "compile max-autotune" in case.variants]
    assert late[:8] == list(range(late[0], late[0] + 8)), "of the first two cases of four ops"
    assert late[0] > 10
    names = [(op, case.name) for op, case in order if "compile max-autotune" not in case.variants]
    assert len(names) == len(set(names))
    assert set(names) == {(op, case.name) for op in OPS for case in OPS[op](cuda, False)}


def test_a_late_variant_replaces_the_rows_of_its_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = small_case("upsample_argmax", "forward")
    both = replace(case, variants=case.variants | {"slow": replace(case.variant("eager"), late=True)})
    monkeypatch.setattr(runner, "measure_ceilings", lambda *args, **kwargs: CEILINGS)
    run = runner.Runner.start(CPU, [], tmp_path, True, 0.02)
    order = in_turns({"upsample_argmax": [both]})
    assert [len(one.variants) for _, one in order] == [2, 3]
    assert run.run(order[:1], math.inf) == run.run(in_turns({"upsample_argmax": [both]}), math.inf) == 0
    ((_, rows),) = read(next(tmp_path.glob("*/*.json"))).cases
    assert [row.variant for row in rows] == ["eager", OURS, "slow"]
    assert all(row.timing for row in rows)


def test_a_late_variant_that_is_not_ready_in_time_is_not_run() -> None:
    case = small_case("upsample_argmax", "forward")
    slow = Variant(lambda *_: time.sleep(60), late=True)
    rows = run_case(replace(case, variants=case.variants | {"slow": slow}), CEILINGS, 0.02, 2, time.monotonic() + 0.5)
    assert [(row.status, row.timing is None) for row in rows] == [("ok", False), ("ok", False), ("not run", True)]
