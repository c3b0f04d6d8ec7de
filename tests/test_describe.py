"""Tables of models; costs are compared with counts by hand."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import segmenter_fast as sf
from segmenter_fast.describe import count_macs, count_parameters, info_table


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


@pytest.mark.parametrize(
    ("variant", "positions", "program"),
    [
        (
            "seg_s_dinov2_linear_14",
            "learned, resized bicubic_antialias",
            "timm in the encoder, the official program in",
        ),
        ("seg_s_dinov3_linear_16", "rotary", "timm in the encoder, the official program in the decoder"),
        ("seg_t_linear_16", "learned, resized bilinear", "the official program"),
    ],
)
def test_facts_of_a_model(variant: str, positions: str, program: str) -> None:
    model = sf.create_model(variant, depth=1, num_classes=2)
    printed = Console(width=200, file=io.StringIO(), record=True)
    printed.print(info_table(model, model.config, "here"))
    rows = [line.split("│")[1:3] for line in printed.export_text().splitlines() if line.count("│") == 3]
    facts = {name.strip(): value.strip() for name, value in rows}
    assert facts["position embedding"] == positions
    assert facts["numerics of"].startswith(program)
    assert ("4 registers" in facts["prefix tokens"]) == ("dino" in variant)
