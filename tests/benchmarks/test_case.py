"""Nothing is timed before it agrees, and what cannot be timed is a row that says why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from segmenter_fast.benchmarks.case import OURS, DisagreementError, Variant
from support.benchmarks import small_case, timed_rows


def test_ours_failing_is_refused() -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("no such kernel")

    case = small_case("upsample_argmax", "forward")
    with pytest.raises(DisagreementError, match="no such kernel"):
        timed_rows(replace(case, variants={OURS: Variant(broken)}))


def test_a_peer_that_is_wrong_absent_or_too_large_is_a_row_without_figures() -> None:
    case = small_case("upsample_argmax", "forward")
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
    rows = timed_rows(replace(case, variants=peers | case.variants))
    assert [rows[name].status for name in peers] == ["disagrees", "absent", "out of memory", "failed"]
    assert all(rows[name].timing is None and rows[name].error is None for name in peers)
    assert len(timed) == 1, "a wrong variant is called once, to be judged, and never timed"
    assert rows[OURS].timing is not None


def test_inputs_that_do_not_fit_are_rows() -> None:
    def too_large(generator: torch.Generator) -> tuple[Any, ...]:
        raise torch.OutOfMemoryError("out of memory")

    case = replace(small_case("upsample_argmax", "forward"), make_inputs=too_large)
    assert {row.status for row in timed_rows(case).values()} == {"out of memory"}
