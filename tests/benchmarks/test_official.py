"""The model given to ``accelerate`` has the reference's outputs and strides; every layer of it is replaced."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import segmenter_fast as sf
from segmenter_fast import VARIANTS
from segmenter_fast.benchmarks.models.official import OfficialLike
from segmenter_fast.benchmarks.models.peers import ModelCase, build
from support.benchmarks import CPU

CASE = ModelCase("seg_t_mask_16", torch.float32, size=72, classes=7)


@pytest.mark.parametrize("batch", [1, 2])
def test_outputs_and_strides_are_the_references(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "seg_t_mask_16", VARIANTS["seg_t_mask_16"].replace(depth=3, decoder_depth=2))
    with torch.inference_mode():
        _, reference, images = build(replace(CASE, batch=batch), CPU)
        official = OfficialLike(reference).eval()
        found, expected = official(images), reference(images)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert found.stride() == expected.stride()
        swapped = sf.accelerate(official)
        report = sf.acceleration_report(swapped)
        assert not report.left
        assert sorted(item.op for item in report.replaced) == ["attention"] * 5 + ["mask_scores"]
        torch.testing.assert_close(swapped(images), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(reference(images), expected, rtol=0, atol=0), "the reference stays as it was"
