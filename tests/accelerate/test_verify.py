"""Verification refuses every module whose results differ from those of the fused forward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmenter_fast.accelerate import match as module
from segmenter_fast.accelerate.forwards import FusedAttention
from segmenter_fast.accelerate.match import match_modules
from support.other_models import Plain, assert_left, zero


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
    """Equal outputs, different gradients."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q.detach(), k, v)


class HiddenDropout(Plain):
    """Equal in evaluation, different in training, without a Dropout child."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1), 0.1, self.training) @ v


class KeepsMap(Plain):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.last_map = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return self.last_map @ v


class Sharpened(Plain):
    """An attribute sets the scale."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q * self.factor, k, v)


class Modulated(Plain):
    """A function sets the scale."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(self.function(q), k, v)


class Maps(nn.Module):
    """``(B, H, W, D)`` inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = 2, nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        raise AssertionError(f"not reached with tokens: {batch, height, width}")


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "scale": (OtherScale, "its outputs or gradients are not those of plain attention"),
    "scale_of_zeros": (lambda: zero(OtherScale()), "its outputs or gradients are not"),
    "causal": (Causal, "its outputs or gradients are not"),
    "keys_first": (KeysFirst, "its outputs or gradients are not"),
    "detached": (Detached, "its outputs or gradients are not"),
    "hidden_dropout": (HiddenDropout, "its outputs or gradients are not"),
    "keeps_map": (KeepsMap, "its forward keeps what it computes in last_map"),
    "other_input": (Maps, "it could not be tried: ValueError: not enough values to unpack (expected 4, got 3)"),
}


@pytest.mark.parametrize("case", LEFT)
def test_different_results_are_refused(case: str) -> None:
    module, reason = LEFT[case]
    assert_left(module(), reason)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_layers_that_differ_in_an_attribute_are_verified_apart(dtype: torch.dtype) -> None:
    double, same = (lambda q: 2 * q), (lambda q: q)
    layers = nn.ModuleList(
        [Sharpened(1.0), Sharpened(2.0), Sharpened(1.0), Modulated(same), Modulated(double), Modulated(same)]
    )
    matches = [match for _, _, match in match_modules(layers.to(dtype))]
    assert [match is FusedAttention for match in matches] == [True, False, True, True, False, True]


def test_equal_layers_are_verified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trials: list[nn.Module] = []
    find_difference = module.find_difference
    monkeypatch.setattr(
        module, "find_difference", lambda part, *rest: trials.append(part) or find_difference(part, *rest)
    )
    assert len(list(match_modules(nn.ModuleList(Plain() for _ in range(5))))) == 5
    assert len(trials) == 1
