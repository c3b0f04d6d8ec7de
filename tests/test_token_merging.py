"""Schedules of token merging: names, JSON, errors, counts of tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest

import segmenter_fast as sf
from segmenter_fast.config import SegmenterConfig, variant_config
from segmenter_fast.token_merging import MERGING, TokenMerging


@pytest.mark.parametrize(
    "merging",
    [
        sf.TokenMerging((3, 4), 0.1),
        sf.TokenMerging((3, 4), (0.1, 0.2)),
        sf.TokenMerging((1,), threshold=0.9, matching="window"),
        sf.TokenMerging((1,), 0.1, channels=64, crowd=0.1),
    ],
)
def test_schedules_are_saved_as_json(merging: TokenMerging) -> None:
    config = variant_config("seg_t_mask_16").replace(merging=merging)
    fields = json.loads(json.dumps(config.to_dict()))
    assert SegmenterConfig.from_dict(fields) == config
    assert TokenMerging.of(json.dumps(fields["merging"]), config.depth) == merging


def test_configurations_without_merging_are_saved_as_before() -> None:
    config = variant_config("seg_t_mask_16")
    assert "merging" not in config.to_dict()
    assert SegmenterConfig.from_dict(config.to_dict()).merging is None


@pytest.mark.parametrize("name", MERGING)
def test_named_schedules_fit_every_depth(name: str) -> None:
    for depth in (1, 4, 12, 24, 40):
        merging = variant_config("seg_t_mask_16").replace(depth=depth, merging=name).merging
        assert merging is not None
        tokens = merging.tokens_left(1024, depth)
        assert len(tokens) == depth
        assert tokens == sorted(tokens, reverse=True)
    assert TokenMerging.of(name, 12) == MERGING[name]
    assert TokenMerging.of("none", 12) is None
    assert variant_config("seg_t_mask_16").replace(merging="none").merging is None


def test_tokens_left() -> None:
    merging = TokenMerging((1, 2), (0.25, 0.5))
    assert merging.tokens_left(16, 4) == [16, 12, 6, 6]
    assert merging.tokens_left(1, 4) == [1, 1, 1, 1]
    fewer = merging.fewer(0.5)
    assert fewer is not None
    assert fewer.shares == (0.125, 0.25)
    assert merging.fewer(0) is None
    fewer = TokenMerging((1,), threshold=0.8).fewer(0.5)
    assert fewer is not None
    assert fewer.threshold == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        ("fsat", r"one of none, fast, faster, or fields in JSON, got 'fsat'; did you mean fast\?"),
        ("{", "is no JSON"),
        (3, "must be a TokenMerging, its fields or a name, got 3"),
        ({"share": 0.1}, "needs layers"),
        ({"layers": [1], "shares": 0.1}, "unknown field of token merging shares; known are layers, share"),
        ({"layers": [1]}, "a share or a threshold"),
        ({"layers": [1], "share": 0.1, "threshold": 0.9}, "a share or a threshold"),
        ({"layers": [2, 1], "share": 0.1}, "increasing"),
        ({"layers": [-1], "share": 0.1}, "from 0 on"),
        ({"layers": [1, 12], "share": 0.1}, r"must be in \[0, 12\) for this encoder, got \(1, 12\)"),
        ({"layers": [1], "share": 0.6}, r"in \[0, 0.5\]: at most every other token merges; got 0.6"),
        ({"layers": [1], "share": float("nan")}, "share must be"),
        ({"layers": [1, 2], "share": [0.1]}, "one for each of layers"),
        ({"layers": [1], "threshold": 1.0}, r"in \(-1, 1\), got 1.0"),
        ({"layers": [1], "share": 0.1, "channels": 0}, "channels of token merging must be at least 1, or None"),
        ({"layers": [1], "share": 0.1, "crowd": float("inf")}, "crowd must be a finite number or null, got inf"),
        ({"layers": [1], "threshold": 0.9, "crowd": 0.1}, "must be 0 with a threshold, got 0.1"),
        ({"layers": [1], "threshold": 0.9, "matching": "random"}, "bipartite, window, got 'random'"),
    ],
)
def test_refusals_say_what_is_allowed(merge: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        variant_config("seg_t_mask_16").replace(merging=merge)
