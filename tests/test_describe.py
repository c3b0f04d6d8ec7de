"""Costs counted by hand."""

from __future__ import annotations

import pytest

import segmenter_fast as sf
from segmenter_fast.describe import count_macs, count_parameters


@pytest.mark.parametrize(("size", "patches"), [(512, 1024), (100, 49)])
def test_macs_of_a_linear_model(size: int, patches: int) -> None:
    config = sf.VARIANTS["seg_t_linear_16"]
    tokens, dim = patches + 1, 192
    layer = tokens * 12 * dim * dim + 2 * tokens * tokens * dim  # qkv, proj, two of 4 dim; scores, weighted sum
    assert count_macs(config, size) == patches * dim * 3 * 16 * 16 + 12 * layer + patches * dim * 150


def test_parameters_of_a_linear_model() -> None:
    dim, depth, classes = 128, 1, 3
    fields = {"num_classes": classes, "image_size": 32, "embed_dim": dim, "depth": depth}
    model = sf.create_model("seg_t_linear_16", **fields, num_heads=2, decoder_num_heads=2)
    layer = 12 * dim * dim + 13 * dim
    embedding = 3 * 16 * 16 * dim + dim + (1 + 4) * dim + dim
    assert count_parameters(model) == embedding + depth * layer + 2 * dim + classes * dim + classes
