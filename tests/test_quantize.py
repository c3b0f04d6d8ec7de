"""Linear layers in 8 bits: near float32, with the Segmenter's state dict, copied, moved, compiled and refused."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from segmenter_fast import devices, quantize
from segmenter_fast.quantize import QUANTIZATIONS, QuantizedLinear, QuantizedMlp
from segmenter_fast.vit import Mlp
from support.models import pair
from support.real import PHOTOGRAPHS, crop, needs_real_weights, real_model


def multiplies_fp8() -> bool:
    one = torch.ones(16, 16).to(torch.float8_e4m3fn)
    scales = torch.ones(16, 1), torch.ones(1, 16)
    try:
        torch._scaled_mm(one, one.t(), *scales, out_dtype=torch.bfloat16)
    except RuntimeError:  # PyTorch 2.11 has one scale for all rows on a CPU
        return False
    return True


needs_fp8 = pytest.mark.skipif(not multiplies_fp8(), reason="needs fp8 products with a scale for each row on the CPU")
BOTH = pytest.mark.parametrize(
    "dtype", [torch.int8, pytest.param(torch.float8_e4m3fn, marks=needs_fp8)], ids=QUANTIZATIONS
)
# Largest relative error of one layer on normal inputs: int8 and fp8 (3 bits of mantissa) round this coarsely.
LAYER_ERROR = {torch.int8: 0.015, torch.float8_e4m3fn: 0.05}


def layers(dtype: torch.dtype, bias: bool = True) -> tuple[nn.Linear, QuantizedLinear]:
    linear = nn.Linear(192, 384, bias).requires_grad_(False)
    return linear, QuantizedLinear(linear, dtype)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


@BOTH
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 50, 192), (1, 3, 192), (0, 5, 192), (7, 192)])
def test_a_layer_is_near_float32(dtype: torch.dtype, bias: bool, shape: tuple[int, ...]) -> None:
    linear, quantized = layers(dtype, bias)
    for given in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(shape).to(given)
        found, expected = quantized(x), linear(x.float())
        assert (found.shape, found.dtype) == (expected.shape, given)
        assert not found.numel() or error(found, expected) < LAYER_ERROR[dtype]


@BOTH
def test_scales_belong_to_tokens_and_channels(dtype: torch.dtype) -> None:
    """A token or a channel 1000 times as large leaves the error of the others as it was; zeros stay exact."""
    linear, quantized = layers(dtype, bias=False)
    x = torch.randn(64, 192)
    x[0] *= 1000
    x[1] = 0
    assert error(quantized(x)[2:], linear(x)[2:]) < LAYER_ERROR[dtype]
    assert not quantized(x)[1].any()
    linear.weight[0] *= 1000
    assert error(QuantizedLinear(linear, dtype)(x)[2:, 1:], linear(x)[2:, 1:]) < LAYER_ERROR[dtype]


def test_extreme_values_stay_in_int8() -> None:
    linear = nn.Linear(64, 64, bias=False).requires_grad_(False)
    linear.weight.fill_(0.7)
    for value in (1e-30, 1.0, -3.0, 1e30):
        x = torch.full((20, 64), value)
        torch.testing.assert_close(QuantizedLinear(linear, torch.int8)(x), linear(x), rtol=1e-5, atol=1e-25)


@BOTH
def test_states_copies_and_moves(dtype: torch.dtype) -> None:
    linear, quantized = layers(dtype)
    x = torch.randn(3, 40, 192)
    expected = quantized(x)
    file = io.BytesIO()
    torch.save(quantized, file)
    file.seek(0)
    for other in (
        copy.deepcopy(quantized),
        pickle.loads(pickle.dumps(quantized)),
        torch.load(file, weights_only=False),
        copy.deepcopy(quantized).to(torch.bfloat16),
        copy.deepcopy(quantized).half(),
    ):
        assert torch.equal(other(x), expected)
    state = quantized.state_dict()
    assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in linear.state_dict().items()}
    assert all(value.dtype == torch.float32 for value in state.values())
    plain, again = nn.Linear(192, 384), layers(dtype)[1]
    plain.load_state_dict(state)
    assert error(plain(x), expected) < LAYER_ERROR[dtype]  # only the activations differ
    again.load_state_dict(state)
    torch.testing.assert_close(again(x), expected)
    again.load_state_dict(linear.state_dict(), assign=True)
    assert torch.equal(again(x), expected)
    with pytest.raises(RuntimeError, match=r"size mismatch for weight.*\(?\[3, 192\]"):
        again.load_state_dict({"weight": torch.zeros(3, 192), "bias": torch.zeros(3)})
    torch.testing.assert_close(again(x), expected)
    assert quantized.to("meta").weight.is_meta


def test_weights_fit_a_cpu_that_adds_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without VNNI, pairs of products saturate at 16 bits: such a CPU gets 7 bits, also of weights from elsewhere."""
    linear, quantized = layers(torch.int8)
    monkeypatch.setattr(quantize, "_largest_weight", lambda *_: 64.0)
    for fitted in (QuantizedLinear(linear, torch.int8), pickle.loads(pickle.dumps(quantized)), quantized.to("cpu")):
        assert fitted.weight.abs().amax() == 64
        x = torch.randn(50, 192)
        assert error(fitted(x), linear(x)) < 2 * LAYER_ERROR[torch.int8]


def test_products_of_this_cpu_are_exact() -> None:
    limit = int(quantize._largest_weight(torch.int8, "cpu"))
    rows = torch.full((33, 192), 127, dtype=torch.int8)
    for sign in (1, -1):
        weight = torch.full((48, 192), sign * limit, dtype=torch.int8)
        assert (quantize._int8_product(rows, weight) == sign * 127 * limit * 192).all()


@pytest.mark.parametrize("family", ["mask_16", "linear_16", "registers", "dinov3_swiglu"])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_a_model_in_int8_is_near_float32(family: str, dtype: str) -> None:
    model, _ = pair(family, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = model.optimize(dtype, compile=False, quantize="int8")
    plain = {name for name, module in fast.named_modules() if isinstance(module, nn.Linear)}
    assert plain == {"decoder.proj_dec" if "mask" in model.config.variant else "decoder.head"}
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, found = model(images), fast(images)
    assert error(found, expected) < 0.1
    assert set(fast.state_dict()) == set(model.state_dict())
    fast.load_state_dict(model.state_dict())
    torch.testing.assert_close(fast(images), found, rtol=0.05, atol=0.05)
    assert torch.equal(pickle.loads(pickle.dumps(fast))(images), fast(images))


def test_float32_beside_int8_where_bfloat16_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for feature, expected in (("amx_tile", torch.bfloat16), ("avx512_bf16", torch.float32), ("", torch.float32)):
        monkeypatch.setattr(devices, "cpu_has", lambda name, feature=feature: name == feature)
        assert devices.choose_dtype("auto", cpu, int8=True) == expected
    assert devices.choose_dtype("float16", cpu, int8=True) == torch.float16


def test_compiled_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model, _ = pair("mask_16", torch.float32)
    eager, compiled = (model.optimize("float32", compile=on, quantize="int8") for on in (False, True))
    images = torch.randn(1, 3, 40, 32)
    torch.testing.assert_close(compiled(images), eager(images), rtol=0, atol=2e-3)


def test_the_compiler_keeps_the_product() -> None:
    """Its own op for scaled products is 1000 times slower on CPUs without AMX (PyTorch 2.13)."""
    _, layer = layers(torch.int8)
    x = torch.randn(2, 20, 192)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        found, codes = run_and_get_code(torch.compile(layer, fullgraph=True), x)
    assert "_int_mm" in codes[0]
    assert "qlinear" not in codes[0]
    torch.testing.assert_close(found, layer(x), rtol=0, atol=1e-3)


@pytest.mark.parametrize("tokens", [0, 1, 1025, 2600])
def test_tokens_go_through_an_mlp_in_parts(tokens: int) -> None:
    mlp = Mlp(64, 128, 0.0).requires_grad_(False).eval()
    quantized = nn.Sequential(copy.deepcopy(mlp))
    quantize.quantize_linears(quantized, "int8")
    assert type(quantized[0]) is QuantizedMlp
    x = torch.randn(2, tokens, 64)
    found = quantized(x)
    torch.testing.assert_close(found, Mlp.forward(quantized[0], x), rtol=0, atol=1e-5)
    assert found.shape == x.shape
    assert not tokens or error(found, mlp(x)) < 2 * LAYER_ERROR[torch.int8]


def test_unknown_and_unsupported_are_refused() -> None:
    model, _ = pair("linear_16", torch.float32)
    with pytest.raises(ValueError, match=r"quantize must be None or one of int8, fp8, got 'int4'"):
        model.optimize(quantize="int4")
    with pytest.raises(ValueError, match=r"fp8' needs an NVIDIA GPU of the Hopper generation or newer, got .* cpu"):
        model.optimize(quantize="fp8")
    with pytest.raises(ValueError, match=r"needs a CPU, CUDA or ROCm device, got a model on meta"):
        quantize.check_quantization("int8", torch.device("meta"))


@pytest.mark.parametrize(("capability", "hip", "allowed"), [((9, 0), None, True), ((10, 0), None, True),
                                                            ((8, 9), None, False), ((9, 4), "7.0", False)])  # fmt: skip
def test_fp8_needs_hopper(
    capability: tuple[int, int], hip: str | None, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch, "version", SimpleNamespace(hip=hip))
    if allowed:
        quantize.check_quantization("fp8", torch.device("cuda"))
        return
    with pytest.raises(ValueError, match="Hopper generation or newer, got a model on a GPU"):
        quantize.check_quantization("fp8", torch.device("cuda"))


@needs_fp8
def test_a_model_in_fp8_is_near_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run on the CPU, whose scaled product has the signature and the numerics of a GPU's."""
    monkeypatch.setattr("segmenter_fast.inference_segmenter.check_quantization", lambda *_: None)
    model, _ = pair("mask_16", torch.float32)
    fast, images = model.optimize("float32", quantize="fp8", compile=False), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert error(fast(images), model(images)) < 0.3


def test_a_slow_width_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "cpu_is_fast_in_bfloat16", lambda: True)
    quantize.warn_of_slow_quantization.cache_clear()
    with pytest.warns(UserWarning, match="int8 gains nothing over bfloat16 .* below width 1024; .* width 192"):
        quantize.warn_of_slow_quantization("int8", 192, "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for arguments in (("int8", 192, "cpu"), ("int8", 1024, "cpu"), ("int8", 192, "cuda"), ("fp8", 192, "cpu")):
            quantize.warn_of_slow_quantization(*arguments)
    quantize.warn_of_slow_quantization.cache_clear()


@needs_real_weights
def test_labels_of_real_weights() -> None:
    """DINOv2 ViT-S/14 on a photograph: int8 keeps 98.5 % of the labels, bfloat16 99.7 %."""
    model = real_model()
    images = crop(model, PHOTOGRAPHS[2])
    with torch.no_grad():
        expected = model.segment(images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.optimize("float32", compile=False, quantize="int8").segment(images)
    assert len(expected.unique()) > 5
    assert (found == expected).float().mean() > 0.975
