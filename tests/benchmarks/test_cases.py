"""Nothing is timed before it agrees, and the judges know right from wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from segmenter_fast import kernels
from segmenter_fast.benchmarks.cases import OURS, Case, DisagreementError, Row, Variant, run_case
from segmenter_fast.benchmarks.device import Ceilings
from segmenter_fast.benchmarks.ops import OPS, attention, mask_scores, upsample
from segmenter_fast.kernels import reference

CPU = torch.device("cpu")
CEILINGS = Ceilings(10.0, {"float32": 0.1, "bfloat16": 1.0})


def run(case: Case) -> dict[str, Row]:
    return {row.variant: row for row in run_case(case, CEILINGS, seconds=0.02, min_samples=2)}


def small(op: str, pass_: str, dtype: torch.dtype = torch.float32, map_: str = "noise") -> Case:
    """A case of 7 classes, 4x4 patches and 32 pixels (17 tokens), without the peer that is slow to compile."""
    if op == "attention":
        case = attention._case(CPU, dtype, 2, 17, pass_)
    elif op == "mask_scores":
        case = mask_scores._case(CPU, dtype, 2, pass_, 17, 8, 7)
    else:
        case = upsample._case(op, CPU, dtype, 2, pass_, upsample.Point(7, 8, 32, map_))
    return replace(case, variants={name: v for name, v in case.variants.items() if name != "compile"})


def with_ours(case: Case, change: Callable[[Any], Any]) -> Case:
    """The case with our output changed."""
    ours = case.variants[OURS]
    assert isinstance(ours, Variant)
    wrong = replace(ours, run=lambda *args: change(ours.run(*args)))
    return replace(case, variants=case.variants | {OURS: wrong})


PASSES = [(op, pass_) for op, table in upsample.OPS.items() for pass_ in table.copies]
PASSES += [("attention", "forward"), ("attention", "backward")]
PASSES += [("mask_scores", "forward"), ("mask_scores", "forward+backward")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("op", "pass_"), PASSES)
def test_every_case_agrees_and_is_timed(op: str, pass_: str, dtype: torch.dtype) -> None:
    rows = run(small(op, pass_, dtype))
    for name in ("eager", OURS):
        row = rows[name]
        assert row.status == "ok", row.note
        assert row.timing is not None
        assert row.timing.median_ms > 0
        assert row.share is not None
        assert (row.tflops is not None) == (op in {"attention", "mask_scores"})


def one_label_wrong(labels: torch.Tensor) -> torch.Tensor:
    labels = labels.clone()
    labels[1, 5, 9] = (labels[1, 5, 9] + 1) % 7
    return labels


def last_grown(out: Any) -> Any:
    """The last tensor of the output, with one element off by a tenth of the largest."""
    if isinstance(out, tuple):
        return (*out[:-1], last_grown(out[-1]))
    out = out.clone()
    out.view(-1)[-1] += 0.1 * out.abs().max()
    return out


def one_nan(out: Any) -> Any:
    out = out[0] if isinstance(out, tuple) else out
    return out.clone().fill_(float("nan"))


@pytest.mark.parametrize(("op", "pass_"), PASSES)
def test_a_wrong_result_of_ours_is_refused(op: str, pass_: str) -> None:
    change = one_label_wrong if op == "upsample_argmax" else last_grown
    with pytest.raises(DisagreementError, match="ours disagrees"):
        run(with_ours(small(op, pass_), change))


@pytest.mark.parametrize(("op", "pass_"), [("upsample_softmax", "forward"), ("attention", "backward")])
def test_nan_and_wrong_shapes_are_refused(op: str, pass_: str) -> None:
    with pytest.raises(DisagreementError):
        run(with_ours(small(op, pass_), one_nan))
    with pytest.raises(DisagreementError):
        run(with_ours(small(op, pass_), lambda out: out[:, :-1]))


def test_ours_failing_is_refused() -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("no such kernel")

    case = small("upsample_argmax", "forward")
    with pytest.raises(DisagreementError, match="no such kernel"):
        run(replace(case, variants={OURS: Variant(broken)}))


def test_a_peer_that_is_wrong_absent_or_too_large_is_a_row_without_figures() -> None:
    case = small("upsample_argmax", "forward")
    timed: list[int] = []

    def wrong(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        timed.append(1)
        return masks.new_zeros((masks.shape[0], *size), dtype=torch.long)

    peers: dict[str, Variant | str] = {
        "wrong": Variant(wrong),
        "absent": "not installed",
        "large": Variant(wrong, needs_bytes=2**60),
        "broken": Variant(lambda *args: 1 / 0),
    }
    rows = run(replace(case, variants=peers | case.variants))
    assert [rows[name].status for name in peers] == ["disagrees", "absent", "out of memory", "failed"]
    assert all(rows[name].timing is None and rows[name].error is None for name in peers)
    assert len(timed) == 1, "a wrong variant is called once, to be judged, and never timed"
    assert rows[OURS].timing is not None


def test_inputs_that_do_not_fit_are_rows() -> None:
    def too_large(generator: torch.Generator) -> tuple[Any, ...]:
        raise torch.OutOfMemoryError("out of memory")

    case = replace(small("upsample_argmax", "forward"), make_inputs=too_large)
    assert {row.status for row in run(case).values()} == {"out of memory"}


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


def test_masks_are_contiguous_for_every_peer() -> None:
    for map_ in upsample.MAPS:
        masks, *_ = small("upsample_argmax", "forward", map_=map_).make_inputs(torch.Generator().manual_seed(0))
        assert masks.is_contiguous()


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
    torch.testing.assert_close(attention._oracle(*one, False), out[0, :, 0])
    torch.testing.assert_close(attention._oracle(*one, True), expected[0, :, :, 0])


def test_bytes_are_counted_by_hand() -> None:
    argmax, both = small("upsample_argmax", "forward"), small("upsample_cross_entropy", "forward+backward")
    scores = small("mask_scores", "forward")
    assert scores.flops == 2 * 2 * 17 * 7 * 8
    assert scores.bytes_moved == 2 * (17 * 8 + 7 * 8 + 17 * 7) * 4
    masks, pixels = 2 * 7 * 4 * 4 * 4, 2 * 32 * 32
    assert argmax.bytes_moved == masks + pixels
    assert both.bytes_moved == 2 * masks + 8 * pixels
    assert small("attention", "forward").flops == 4 * 2 * 12 * 17 * 17 * 64


def test_the_timed_op_is_the_public_one() -> None:
    assert upsample.OPS["upsample_argmax"].ours is kernels.upsample_argmax
    assert upsample.OPS["upsample_softmax"].ours is kernels.upsample_softmax
