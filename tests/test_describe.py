"""Tables of models; costs are compared with counts by hand."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import segmenter_fast as sf
from segmenter_fast import exportable, kernels
from segmenter_fast.describe import count_macs, count_parameters, info_table
from segmenter_fast.reference import ReferenceSegmenter


def facts_of(config: sf.SegmenterConfig) -> dict[str, str]:
    printed = Console(width=200, file=io.StringIO(), record=True)
    printed.print(info_table(config, "here"))
    rows = [line.split("│")[1:3] for line in printed.export_text().splitlines() if line.count("│") == 3]
    return {name.strip(): value.strip() for name, value in rows}


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
    assert (
        count_parameters(model.config)
        == sum(p.numel() for p in model.parameters())
        == embedding + depth * layer + 2 * dim + classes * dim + classes
    )


SMALL = {"embed_dim": 64, "depth": 2, "num_heads": 2, "decoder_num_heads": 2, "num_classes": 5, "image_size": (32, 48)}


@pytest.mark.parametrize(
    "fields",
    [
        {"distillation_token": True, "head_classes": 7},
        {"head_classes": 3, "class_token": False, "decoder_depth": 0},
        {"mlp": "swiglu", "mlp_ratio": 2.55, "qkv_bias": False, "layer_scale": True, "num_register_tokens": 3},
        {"pos_embed_kind": "rotary", "decoder": "linear"},
        {"pos_embed_prefix": False, "mlp_ratio": 1.3},
    ],
)
def test_costs_are_those_of_the_model(fields: dict[str, Any]) -> None:
    config = sf.SegmenterConfig(**SMALL, **fields)
    with torch.device("meta"):
        model, images = ReferenceSegmenter(config).eval(), torch.empty(1, 3, 100, 100)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.masks(images)
    assert count_parameters(config) == sum(parameter.numel() for parameter in model.parameters())
    assert count_macs(config, 100) == counter.get_total_flops() // 2


@pytest.mark.parametrize("decoder", ["mask", "linear"])
@pytest.mark.parametrize(("matching", "channels"), [("bipartite", None), ("bipartite", 7), ("window", 1000)])
def test_costs_with_merging_are_those_of_the_tokens_that_are_left(
    decoder: str, matching: str, channels: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    merging = sf.TokenMerging((0, 2), (3 / 7, 0.2), None, matching, channels)  # 49 patches, then 28, 22
    config = sf.SegmenterConfig(**{**SMALL, "depth": 3}, decoder=decoder, merging=merging)
    ops = SimpleNamespace(**{**vars(kernels.reference), "merge_tokens": kernels.merge_tokens})  # sums, no products
    monkeypatch.setattr(exportable._PlainVisionTransformer, "ops", ops)
    model = exportable.ExportableSegmenter(sf.create_model(config), (100, 100), "masks", False, torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(1, 3, 100, 100))
    assert count_macs(config, 100) == counter.get_total_flops() // 2 < count_macs(config.replace(merging=None), 100)
    adaptive = config.replace(merging=sf.TokenMerging((0,), threshold=0.9))
    assert count_macs(adaptive) == count_macs(config.replace(merging=None))


def test_facts_of_a_model_that_merges() -> None:
    facts = facts_of(sf.VARIANTS["seg_t_mask_16"].replace(depth=3, merging={"layers": [1], "share": 0.25}))
    assert facts["token merging"] == "layers (1,), share 0.25, matching bipartite"
    assert facts["patch tokens by layer"] == "1024, 768, 768"
    assert re.fullmatch(r"(\d\.\d), (\d\.\d) without merging", facts["GMAC at 512 x 512"])
    facts = facts_of(sf.VARIANTS["seg_t_mask_16"].replace(merging={"layers": [1], "threshold": 0.9}))
    assert facts["token merging"] == "layers (1,), threshold 0.9, matching bipartite"
    assert facts["GMAC at 512 x 512"].startswith("fewer than the ")
    assert "patch tokens by layer" not in facts
    assert "token merging" not in facts_of(sf.VARIANTS["seg_t_mask_16"])


@pytest.mark.parametrize("name", sf.VARIANTS)
def test_parameters_of_the_variants(name: str) -> None:
    config = sf.VARIANTS[name].replace(depth=1)
    with torch.device("meta"):
        model = ReferenceSegmenter(config)
    assert count_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


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
    facts = facts_of(sf.VARIANTS[variant].replace(depth=1, num_classes=2))
    assert facts["position embedding"] == positions
    assert facts["numerics of"].startswith(program)
    assert ("4 registers" in facts["prefix tokens"]) == ("dino" in variant)
