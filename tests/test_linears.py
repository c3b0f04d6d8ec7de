"""Packed linear layers give the plain layers' results, and drop their copies when the weights change."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from segmenter_fast.devices import cpu_is_fast_in_bfloat16
from segmenter_fast.linears import PackedLinear, PackedMlp, pack_linears, unpack
from segmenter_fast.vit import Mlp
from support.accuracy import assert_as_accurate
from support.models import pair

DTYPES = (torch.float32, torch.bfloat16) if cpu_is_fast_in_bfloat16() else (torch.float32,)


def packed(layer: nn.Module) -> nn.Module:
    holder = nn.ModuleList([copy.deepcopy(layer)])
    pack_linears(holder)
    return holder[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 24), (2, 65, 24), (1, 1, 24)])
@torch.no_grad()
def test_packed_layers_are_as_accurate_as_plain_ones(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    plain, x = Mlp(24, 40, 0.0).to(dtype), torch.randn(shape).to(dtype)
    fast = packed(plain)
    assert isinstance(fast, PackedMlp)
    assert_as_accurate(fast(x), plain(x), copy.deepcopy(plain).double()(x.double()))
    assert fast.fc1.packed is not None
    every_second = torch.randn(*shape[:-1], 48)[..., ::2].to(dtype)
    torch.testing.assert_close(fast(every_second), fast(every_second.contiguous()))


@torch.no_grad()
def test_a_layer_without_bias_an_empty_batch_another_dtype_and_autocast() -> None:
    plain, x = nn.Linear(8, 5, bias=False), torch.randn(4, 8)
    fast = packed(plain)
    torch.testing.assert_close(fast(x), plain(x))
    torch.testing.assert_close(fast(x, gelu=True), nn.functional.gelu(plain(x)))
    assert fast(x[:0], gelu=True).shape == (0, 5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fast(x.bfloat16()), plain(x.bfloat16()))
    unpack(fast)
    torch.testing.assert_close(fast.double()(x.double()), plain.double()(x.double()))
    assert fast.packed is None


@torch.no_grad()
def test_the_inference_form_packs_and_drops_the_copies_with_the_weights() -> None:
    model, _ = pair("mask_16", torch.float32)
    fast, images = model.optimize(torch.float32, compile=False), torch.randn(1, 3, 32, 32)
    layers = [module for module in fast.modules() if isinstance(module, nn.Linear)]
    assert all(isinstance(layer, PackedLinear) for layer in layers)
    fast(images)
    assert all(layer.packed is not None for layer in layers)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert all(m.packed is None for m in other.modules() if isinstance(m, PackedLinear))
    fast.load_state_dict(model.state_dict())
    assert all(layer.packed is None for layer in layers)
    assert set(fast.state_dict()) == set(model.state_dict())


def test_a_compiled_form_leaves_packing_to_the_compiler() -> None:
    fast = pair("mask_16", torch.float32)[0].optimize(torch.float32, compile=True)
    assert not any(isinstance(module, PackedLinear) for module in fast.modules())
