"""Fused forwards: the outputs and gradients of the original ones, which every call that is not plain still runs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import segmenter_fast as sf
from support.accuracy import assert_as_accurate
from support.mmseg_lookalike import MmEncoderDecoder
from support.official_lookalike import OfficialBlock, OfficialSegmenter
from support.other_models import KINDS, MODELS, build, images, outputs_and_gradients, timm, vit


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_in_float64(name: str, training: bool, ops: list[str]) -> None:
    model, x = build(name).train(training), images(name)
    expected = outputs_and_gradients(model, x)
    assert sf.accelerate(model) is model
    assert model.training == training
    ops.clear()
    ours = outputs_and_gradients(model, x)
    assert ops == ["attention"] * (2 if "vit" in name or name in ("deit", "dinov2_registers") else 3) + (
        ["mask_scores"] if name == "official" else []
    )
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_low_precision_is_as_accurate_as_before(name: str, dtype: torch.dtype) -> None:
    model, x = build(name, dtype), images(name, dtype)
    oracle = outputs_and_gradients(copy.deepcopy(model).double(), x.double())
    peer = outputs_and_gradients(model, x)
    ours = outputs_and_gradients(sf.accelerate(model), x)
    for key in ("out", "images"):
        assert ours[key].dtype == dtype
        assert_as_accurate(ours[key], peer[key], oracle[key])


@pytest.mark.parametrize("batch", [1, 2])
def test_masks_have_the_official_strides(batch: int) -> None:
    model, x = build("official").eval(), images("official")[:1].repeat(batch, 1, 1, 1)
    with torch.no_grad():
        tokens = model.encoder(x, return_features=True)[:, 1:]
        before = model.decoder(tokens, x.shape[2:])
        after = sf.accelerate(model).decoder(tokens, x.shape[2:])
    assert after.stride() == before.stride()
    assert torch._prims_common.suggest_memory_format(after) == torch.channels_last


@pytest.mark.parametrize("name", KINDS)
def test_autocast_keeps_the_dtype_and_the_accuracy(name: str) -> None:
    model, x = build(name, torch.float32), images(name, torch.float32)
    oracle = copy.deepcopy(model).double()(x.double())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        peer = model(x)
        ours = sf.accelerate(model)(x)
    assert ours.dtype == peer.dtype
    assert_as_accurate(ours.float(), peer.float(), oracle, ulps=4 * 2**16)  # of bfloat16


@pytest.mark.parametrize("name", KINDS)
def test_compiles_without_a_graph_break(name: str) -> None:
    model, x = build(name, torch.float32), images(name, torch.float32)
    expected = outputs_and_gradients(sf.accelerate(model), x)
    ours = outputs_and_gradients(torch.compile(model, backend="aot_eager", fullgraph=True), x)
    torch.testing.assert_close(ours["out"], expected["out"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours["images"], expected["images"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["official", "mmseg", "vit_tiny"])
def test_attention_dropout_takes_the_original_path_in_training(name: str, ops: list[str]) -> None:
    model = {
        "official": lambda: OfficialSegmenter(dropout=0.1),
        "mmseg": lambda: MmEncoderDecoder(attn_drop=0.1),
        "vit_tiny": lambda: vit("vit_tiny_patch16_224", attn_drop_rate=0.1),
    }[name]()
    model, x = model.double().train(), images(name)
    expected = outputs_and_gradients(model, x)
    sf.accelerate(model)
    ops.clear()
    ours = outputs_and_gradients(model, x)
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, msg=key)
    # The official encoder has no dropout. Its decoder's layer has, but the decoder's end does not depend on it.
    assert ops == (["attention", "attention", "mask_scores"] if name == "official" else [])
    ops.clear()
    model.eval()(x)
    assert ops.count("attention") == (2 if name == "vit_tiny" else 3)


def test_masks_take_the_original_path(ops: list[str]) -> None:
    x, blocked = torch.randn(2, 6, 128, dtype=torch.float64), torch.ones(6, 6, dtype=torch.bool).tril()
    mm = MODELS["mmseg"]().double().eval().backbone.layers[0].attn
    cases = [
        (OfficialBlock(128, 2, 64, 0.0, 0.0).double(), {"mask": blocked}),
        (timm.layers.Attention(128, 2).double(), {"attn_mask": blocked}),
        (timm.layers.Attention(128, 2).double(), {"is_causal": True}),
        (mm, {"attn_mask": ~blocked}),
        (mm, {"key_padding_mask": torch.tensor([[False] * 5 + [True]] * 2)}),
        (mm, {"query_pos": torch.randn_like(x)}),
        (mm, {"key": torch.randn_like(x)}),
        (mm, {"residual": torch.randn_like(x)}),
    ]
    for module, given in cases:
        sf.restore(module)
        expected, plain = module(x, **given), module(x)
        sf.accelerate(module)
        ops.clear()
        assert torch.equal(module(x, **given), expected)
        assert not ops
        torch.testing.assert_close(module(x), plain)
        assert ops == ["attention"]
        torch.testing.assert_close(module(x, **dict.fromkeys(given)), plain)


def test_official_attention_maps(ops: list[str]) -> None:
    model, x = build("official"), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = model.encoder.get_attention_map(x, 1)
    sf.accelerate(model)
    ops.clear()
    maps = model.encoder.get_attention_map(x, 1)
    assert ops == ["attention"]  # of the layer before
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1], dtype=x.dtype))
    tokens = torch.randn(1, 17, 128, dtype=torch.float64)
    _, maps = model.encoder.blocks[0].attn(tokens)
    assert maps.shape == (1, 2, 17, 17)


def test_hooks_inside_see_what_they_saw(ops: list[str]) -> None:
    """Hooks on the probabilities, as for attention maps, and on the projections, as for features."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, out: seen.__setitem__(name, out[1] if isinstance(out, tuple) else out)

    official, timms, x = build("official"), build("vit_tiny"), images("vit_tiny")
    timms.blocks[0].attn.fused_attn = False
    for model, inner in ((official, official.encoder.blocks[0].attn), (timms, timms.blocks[0].attn.attn_drop)):
        handle = inner.register_forward_hook(keep("map"))
        sf.accelerate(model)
        assert not seen, "trying the module out fired a hook"
        ops.clear()
        model(x)
        assert seen.pop("map").shape[-1] == 17
        assert ops.count("attention") == (2 if model is official else 1)
        handle.remove()
        ops.clear()
        model(x)
        assert ops.count("attention") == (3 if model is official else 2)
    timms.blocks[0].attn.qkv.register_forward_hook(keep("qkv"))
    timms.blocks[0].attn.register_forward_hook(keep("attn"))
    ops.clear()
    timms(x)
    assert seen["qkv"].shape == (2, 17, 3 * 192)
    assert seen["attn"].shape == (2, 17, 192)
    assert ops == ["attention"] * 2


def test_a_forward_set_later_is_the_one_that_runs(ops: list[str]) -> None:
    for name, find in (
        ("official", lambda model: model.encoder.blocks[0].attn),
        ("mmseg", lambda model: model.backbone.layers[0].attn.attn),
        ("vit_tiny", lambda model: model.blocks[0].attn),
    ):
        model = sf.accelerate(build(name))
        inner, calls = find(model), []
        own = inner.forward
        inner.forward = lambda *args, own=own, calls=calls, **kwargs: calls.append(1) or own(*args, **kwargs)
        model(images(name))
        assert calls == [1], name


def test_symbolic_traces_are_those_of_the_original() -> None:
    block, x = OfficialBlock(128, 2, 64, 0.0, 0.0).double().eval(), torch.randn(2, 6, 128, dtype=torch.float64)
    model = nn.Sequential(block)
    expected = torch.fx.symbolic_trace(model).graph
    graph = torch.fx.symbolic_trace(sf.accelerate(model))
    assert [str(node) for node in graph.graph.nodes] == [str(node) for node in expected.nodes]
    torch.testing.assert_close(graph(x), block(x))


def test_a_norm_set_later_takes_the_original_path(ops: list[str]) -> None:
    attention, x = timm.layers.Attention(128, 2).double().eval(), torch.randn(2, 6, 128, dtype=torch.float64)
    sf.accelerate(attention)
    ops.clear()
    attention.q_norm = nn.LayerNorm(64, dtype=torch.float64)
    expected = sf.restore(copy.deepcopy(attention))(x)
    assert torch.equal(attention(x), expected)
    assert not ops


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", KINDS)
def test_on_a_gpu(name: str, dtype: torch.dtype, ops: list[str]) -> None:
    model, x = build(name, dtype).cuda(), images(name, dtype).cuda()
    oracle = outputs_and_gradients(copy.deepcopy(model).double(), x.double())
    peer = outputs_and_gradients(model, x)
    sf.accelerate(model)
    ops.clear()  # of the verification, which is on the CPU
    ours = outputs_and_gradients(model, x)
    assert bool(ops) == (dtype != torch.float64)
    for key in ("out", "images"):
        assert_as_accurate(ours[key], peer[key], oracle[key])
