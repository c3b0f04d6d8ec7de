"""What is recognised, and every reason to leave a module."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import segmenter_fast as sf
from segmenter_fast.accelerate.forwards import FusedAttention, FusedBlock
from segmenter_fast.accelerate.match import match_modules
from support.mmseg_lookalike import MmMultiheadAttention, MmSegmenterHead
from support.official_lookalike import OfficialBlock, OfficialMaskTransformer


class Plain(nn.Module):
    """The least that is attention: two projections and a number of heads."""

    def __init__(self, dim: int = 64, num_heads: int = 2) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


class OtherScale(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * q.shape[-1] ** -1.0).softmax(-1) @ v


class Causal(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class KeysFirst(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(k, q, v)


class Detached(Plain):
    """Right outputs, other gradients."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q.detach(), k, v)


class HiddenDropout(Plain):
    """Right in evaluation, other in training, and no Dropout child that says so."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1), 0.1, self.training) @ v


class KeepsMap(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.last_map = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return self.last_map @ v


class Sharpened(Plain):
    """An attribute decides about the scale."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q * self.factor, k, v)


class Modulated(Plain):
    """A function decides about the scale."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(self.function(q), k, v)


class Overridden(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Maps(nn.Module):
    """``(B, H, W, D)`` inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = 2, nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        raise AssertionError(f"not reached with tokens: {batch, height, width}")


class OptionalBias(nn.Module):
    """DINOv2's signature, with the scale written into the mathematics."""

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
    module.bias_table = nn.Parameter(torch.zeros(3, 2))  # no effect yet: only the structure tells
    return module


def with_own_forward() -> nn.Module:
    module = Plain()
    module.forward = types.MethodType(lambda self, x: x, module)  # type: ignore[method-assign]
    return module


def with_adapter() -> nn.Module:
    module = Plain()
    module.qkv = nn.Sequential(module.qkv)  # type: ignore[assignment]
    return module


def zero(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
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
    "rotary": (lambda: timm.layers.AttentionRope(64, 2), "its forward takes rope"),
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
    "scale": (OtherScale, "its outputs or gradients are not those of plain attention"),
    "scale_of_zeros": (lambda: zero(OtherScale()), "its outputs or gradients are not"),
    "causal": (Causal, "its outputs or gradients are not"),
    "keys_first": (KeysFirst, "its outputs or gradients are not"),
    "detached": (Detached, "its outputs or gradients are not"),
    "hidden_dropout": (HiddenDropout, "its outputs or gradients are not"),
    "keeps_map": (KeepsMap, "its forward keeps what it computes in last_map"),
    "other_input": (Maps, "it could not be tried: ValueError: not enough values to unpack (expected 4, got 3)"),
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
    module, reason = LEFT[case][0](), LEFT[case][1]
    ((name, found, match),) = match_modules(module)
    assert (name, found) == ("", module)
    assert isinstance(match, str)
    assert match.startswith(reason)
    with pytest.warns(UserWarning, match="replaced nothing"):
        sf.accelerate(module)
    assert sf.acceleration_report(module).left[0].reason == match


@pytest.mark.parametrize(
    "module",
    [
        Plain(),
        Plain(128, 1),
        zero(Plain()),
        OptionalBias(),
        Sharpened(1.0),
        timm.layers.Attention(64, 2, attn_drop=0.1),
    ],
    ids=["plain", "wide", "zeros", "optional", "sharpened", "timm"],
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


def test_layers_that_differ_in_an_attribute_are_judged_apart() -> None:
    double, same = (lambda q: 2 * q), (lambda q: q)
    layers = nn.ModuleList(
        [Sharpened(1.0), Sharpened(2.0), Sharpened(1.0), Modulated(same), Modulated(double), Modulated(same)]
    )
    matches = [match for _, _, match in match_modules(layers)]
    assert [match is FusedAttention for match in matches] == [True, False, True, True, False, True]


def test_equal_layers_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from segmenter_fast.accelerate import match as module

    trials: list[nn.Module] = []
    find_difference = module.find_difference
    monkeypatch.setattr(
        module, "find_difference", lambda part, *rest: trials.append(part) or find_difference(part, *rest)
    )
    assert len(list(match_modules(nn.ModuleList(Plain() for _ in range(5))))) == 5
    assert len(trials) == 1
