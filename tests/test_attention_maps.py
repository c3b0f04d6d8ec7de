"""Attention maps equal the attention probabilities of the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import segmenter_fast as sf
from segmenter_fast import segmenter as module
from segmenter_fast.reference import ReferenceSegmenter

FIELDS = {"image_size": 32, "num_classes": 5, "depth": 3, "embed_dim": 128, "num_heads": 2, "decoder_num_heads": 2}


@pytest.fixture(params=["seg_t_mask_16", "seg_s_dinov3_mask_16"])
def model(request: pytest.FixtureRequest) -> sf.Segmenter:
    model = sf.create_model(request.param, **FIELDS).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def oracle(model: sf.Segmenter, images: Tensor, layer: int, part: str) -> Tensor:
    """Probabilities computed from the input of the oracle's layer."""
    reference = ReferenceSegmenter(model.config).double().eval()
    reference.load_state_dict(model.state_dict())
    seen: list[tuple[Any, ...]] = []
    attention = getattr(reference, part).blocks[layer].attn
    attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    with torch.no_grad():
        reference(images)
        tokens, rotation = seen[0]
        b, n, dim = tokens.shape
        q, k, _ = attention.qkv(tokens).view(b, n, 3, 2, dim // 2).permute(2, 0, 3, 1, 4)
        if rotation is not None:
            q, k = rotation(q), rotation(k)
        return (q @ k.mT * (dim // 2) ** -0.5).softmax(-1)


@pytest.mark.parametrize(("part", "layer", "tokens"), [("encoder", 0, 7), ("encoder", -1, 7), ("decoder", 1, 11)])
def test_equals_the_oracle(model: sf.Segmenter, part: str, layer: int, tokens: int) -> None:
    images = torch.randn(2, 3, 40, 32, dtype=torch.float64)
    maps = model.attention_maps(images, layer, part)
    if part == "encoder":
        tokens += model.config.num_register_tokens
    assert maps.shape == (2, 2, tokens, tokens)
    torch.testing.assert_close(maps, oracle(model, images, layer, part), rtol=0, atol=1e-12)


def test_chunks_and_selected_queries(model: sf.Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    whole = model.attention_maps(images, 1)
    monkeypatch.setattr(module, "_CHUNK_VALUES", 70)
    torch.testing.assert_close(model.attention_maps(images, 1), whole, rtol=0, atol=1e-13)
    torch.testing.assert_close(model.attention_maps(images, 1, queries=slice(0, 1)), whole[:, :, :1])


def test_bfloat16_rows_sum_to_one_in_float32(model: sf.Segmenter) -> None:
    maps = model.bfloat16().attention_maps(torch.randn(1, 3, 32, 32), 2)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum(-1), torch.ones(1, 2, 5 + model.config.num_register_tokens))


def test_refusals(model: sf.Segmenter) -> None:
    images = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"layer must be in \[-3, 3\) for the encoder, got 3"):
        model.attention_maps(images, 3)
    with pytest.raises(ValueError, match="part must be 'encoder' or 'decoder', got 'head'"):
        model.attention_maps(images, 0, "head")
    linear = sf.create_model("seg_t_linear_16", **FIELDS)
    with pytest.raises(ValueError, match="linear decoder has no attention"):
        linear.attention_maps(images, 0, "decoder")
