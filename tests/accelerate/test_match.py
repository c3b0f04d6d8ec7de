"""Matching by structure: the modules that are recognised, and every reason to leave one."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmenter_fast.accelerate.forwards import FusedAttention, FusedBlock
from segmenter_fast.accelerate.match import match_modules
from support.mmseg_lookalike import MmMultiheadAttention, MmSegmenterHead
from support.official_lookalike import OfficialBlock, OfficialMaskTransformer
from support.other_models import Plain, assert_left, timm, zero


class Overridden(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class OptionalBias(nn.Module):
    """DINOv2's signature, and no attribute for the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = 2, nn.Linear(64, 192, bias=False), nn.Linear(64, 64)

    def forward(self, x: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        if attn_bias is not None:
            raise NotImplementedError
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def with_bias_table() -> nn.Module:
    module = Plain()
    module.bias_table = nn.Parameter(torch.zeros(3, 2))  # no effect yet: only the structure shows it
    return module


def with_own_forward() -> nn.Module:
    module = Plain()
    module.forward = types.MethodType(lambda self, x: x, module)  # type: ignore[method-assign]
    return module


def with_adapter() -> nn.Module:
    module = Plain()
    module.qkv = nn.Sequential(module.qkv)  # type: ignore[assignment]
    return module


def mmcv(**attention: object) -> nn.Module:
    wrapper = MmMultiheadAttention(64, 2, 0.0, 0.0, 0.0, True)
    wrapper.attn = nn.MultiheadAttention(64, 2, **attention)  # type: ignore[arg-type]
    return wrapper


def decoder(norm: nn.Module) -> nn.Module:
    module = OfficialMaskTransformer(5, 64, 1, 0, 16, 0.0)
    module.mask_norm = norm  # type: ignore[assignment]
    return module


def odd_block() -> nn.Module:
    block = OfficialBlock(64, 1, 64, 0.0, 0.0)
    block.drop_path.register_parameter("gamma", nn.Parameter(torch.ones(64)))
    block.gamma = block.drop_path.gamma
    return block


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "query_norm": (
        lambda: timm.layers.Attention(64, 2, qk_norm=True, norm_layer=nn.LayerNorm),
        "it has q_norm (LayerNorm), which the fused forward does not use",
    ),
    "gate": (lambda: timm.layers.Attention(64, 2, gated=True), "it has gate (Linear), which"),
    "head_size": (lambda: Plain(96, 2), "head size 48 is none of 16, 32, 64, 80, 96, 128"),
    "overridden": (Overridden, "Overridden overrides the forward of Plain"),
    "own_forward": (with_own_forward, "its forward was set on the instance"),
    "bias_table": (with_bias_table, "it has bias_table, which the fused forward does not use"),
    "adapter": (with_adapter, "qkv and proj must be Linear, they are Sequential and Linear"),
    "heads": (lambda: Plain(64, 3), "qkv makes 192 features, not 3 times the 64 of proj in 3 heads"),
    "torch": (lambda: nn.MultiheadAttention(64, 2), "torch.nn.MultiheadAttention is taken only inside mmcv's wrapper"),
    "mmcv_keys": (lambda: mmcv(kdim=32), "its attn is not a plain torch.nn.MultiheadAttention"),
    "mmcv_bias": (lambda: mmcv(add_bias_kv=True), "its attn adds keys of its own"),
    "mmcv_zero": (lambda: mmcv(add_zero_attn=True), "its attn adds keys of its own"),
    "mmseg_head": (lambda: MmSegmenterHead(5, 64, 1, 0), "its scores are divided by norms of at least 1e-12"),
    "mask_norm": (lambda: decoder(nn.LayerNorm(5, elementwise_affine=False)), "its mask_norm is not a LayerNorm with"),
    "no_mask_norm": (lambda: decoder(nn.Identity()), "its mask_norm is not a LayerNorm with"),
    "by_name": (lambda: timm.layers.AttentionPoolLatent(64, num_heads=2), "it has no qkv and proj"),
}


@pytest.mark.parametrize("case", LEFT)
def test_left(case: str) -> None:
    module, reason = LEFT[case]
    assert_left(module(), reason)


@pytest.mark.parametrize(
    "module",
    [
        Plain(),
        Plain(128, 1),
        zero(Plain()),
        OptionalBias(),
        timm.layers.Attention(64, 2, attn_drop=0.1),
    ],
    ids=["plain", "wide", "zeros", "optional", "timm"],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_taken(module: nn.Module, dtype: torch.dtype) -> None:
    ((_, _, match),) = match_modules(module.to(dtype))
    assert match is FusedAttention


def test_a_block_that_is_more_than_a_block_is_left_with_its_attention() -> None:
    matches = {name: match for name, _, match in match_modules(odd_block())}
    assert matches.keys() == {"", "attn"}
    assert matches[""] == "it has gamma, which the fused forward does not use"
    assert str(matches["attn"]).startswith("it returns more than a tensor")
    ((_, _, match),) = match_modules(OfficialBlock(64, 1, 64, 0.0, 0.0))
    assert match is FusedBlock
