"""Linear layers on oneDNN's products: results, gradients, the calls that they serve, and models around them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import segmenter_fast as sf
from segmenter_fast.accelerate import forwards, linears
from segmenter_fast.accelerate.forwards import FusedLinear
from segmenter_fast.accelerate.linears import linear
from support.other_models import outputs_and_gradients, vit

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")


@pytest.fixture(autouse=True)
def products(monkeypatch: pytest.MonkeyPatch, onednn: None) -> list[tuple[int, ...]]:
    """Shapes of the inputs of oneDNN's products, which win on any machine and at any size."""
    seen: list[tuple[int, ...]] = []
    product = linears._product

    def counted(x: Tensor, *args: Any) -> Tensor:
        seen.append(tuple(x.shape))
        return product(x, *args)

    monkeypatch.setattr(linears, "_product", counted)
    for module in (forwards, linears):
        monkeypatch.setattr(module, "onednn_beats_mkl", lambda: True)
    for name in ("_LEAST", "_LEAST_FEATURES"):
        monkeypatch.setattr(linears, name, 1)
    return seen


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "tokens": lambda: torch.randn(2, 50, 96),
    "one row": lambda: torch.randn(1, 96),
    "channels first": lambda: torch.randn(2, 96, 50).mT,
    "one image, channels first": lambda: torch.randn(1, 96, 50).mT,
    "expanded": lambda: torch.randn(1, 96).expand(40, 96),
    "every second": lambda: torch.randn(40, 2, 96)[:, 0],
    "five dimensions": lambda: torch.randn(2, 3, 4, 5, 96),
    "overlapping": lambda: torch.randn(4000).as_strided((30, 96), (8, 1)),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_and_gradients(layout: str, bias: bool, products: list[tuple[int, ...]]) -> None:
    x, weight = LAYOUTS[layout]().requires_grad_(), torch.randn(64, 96, requires_grad=True)
    parameters = [weight, torch.randn(64, requires_grad=True)] if bias else [weight]
    reductions: list[Callable[[Tensor], Tensor]] = [Tensor.sum, lambda y: y.mT.contiguous().square().mean()]
    for reduce in reductions:
        found = []
        for function in (F.linear, linear):
            out = function(x, weight, parameters[1] if bias else None)
            found.append([out, *torch.autograd.grad(reduce(out), [x, *parameters])])
        for own, ours in zip(*found, strict=True):
            assert ours.shape == own.shape
            assert (ours - own).abs().max() <= 1e-5 * own.abs().max()
    assert len(products) == 6


def test_gradients_of_gradients() -> None:
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((3, 7, 16), (8, 16), (8,)))
    found = []
    for function in (F.linear, linear):
        grads = torch.autograd.grad(function(x, weight, bias).sin().sum(), [x, weight], create_graph=True)
        found.append(torch.autograd.grad(grads[0].square().sum() + grads[1].square().sum(), [x, weight, bias]))
    for own, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)


def test_only_the_gradients_that_are_wanted(products: list[tuple[int, ...]]) -> None:
    layer = sf.accelerate(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)))
    layer[2].weight.requires_grad_(False)
    layer(torch.randn(5, 16)).sum().backward()
    # Two forwards, the second layer's input, the first one's weight.
    assert products == [(5, 16), (5, 8), (5, 4), (8, 5)]
    assert layer[2].weight.grad is None


def test_several_gradients_at_once() -> None:
    x, weight = torch.randn(6, 16, requires_grad=True), torch.randn(8, 16)
    found = [
        torch.autograd.grad(function(x, weight, None), x, torch.eye(48).view(48, 6, 8), is_grads_batched=True)[0]
        for function in (F.linear, linear)
    ]
    torch.testing.assert_close(found[1], found[0])


WEIGHT = torch.randn(8, 16)
OTHERS: dict[str, Callable[[], Tensor]] = {
    "float64": lambda: linear(torch.randn(4, 16).double(), WEIGHT.double(), None),
    "no rows": lambda: linear(torch.randn(0, 16), WEIGHT, None),
    "a vector": lambda: linear(torch.randn(16), WEIGHT, None),
    "meta": lambda: linear(torch.randn(4, 16, device="meta"), WEIGHT.to("meta"), None),
    "vmap": lambda: torch.func.vmap(lambda x: linear(x, WEIGHT, None))(torch.randn(2, 4, 16)),
    "jvp": lambda: torch.func.jvp(lambda x: linear(x, WEIGHT, None), (torch.randn(4, 16),), (torch.ones(4, 16),))[1],
}


@pytest.mark.parametrize("case", OTHERS)
def test_calls_that_stay_with_pytorch(case: str, products: list[tuple[int, ...]]) -> None:
    OTHERS[case]()
    assert not products


def test_settings_and_few_products_stay_with_pytorch(
    monkeypatch: pytest.MonkeyPatch, products: list[tuple[int, ...]]
) -> None:
    x, (weight, bias) = torch.randn(4, 16), (WEIGHT, torch.randn(8))
    for context in (torch.autocast("cpu", torch.bfloat16), torch.backends.mkldnn.flags(enabled=False)):
        with context:
            linear(x, weight, bias)
    torch.jit.trace(lambda x: linear(x, weight, bias), x, check_trace=False)
    monkeypatch.setattr(linears, "_LEAST_FEATURES", 9)
    linear(x, weight, bias)
    assert not products
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x, torch.randn(8, 15), bias)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model(compiled: bool, products: list[tuple[int, ...]]) -> None:
    """Keys, hooks, copies, pickles and training stay; a second call changes nothing; restore undoes it."""
    model, images = vit("vit_tiny_patch16_224"), torch.randn(2, 3, 64, 64)
    expected, classes = outputs_and_gradients(model, images), [type(part) for part in model.modules()]
    keys, seen = list(model.state_dict()), list[int]()
    report = sf.acceleration_report(sf.accelerate(model))
    assert sf.acceleration_report(sf.accelerate(model)) == report
    assert report.linears == tuple(name for name, part in model.named_modules() if isinstance(part, nn.Linear))
    assert f"float32 products by oneDNN instead of MKL x {len(report.linears)} (blocks.0.attn.qkv," in str(report)
    assert list(model.state_dict()) == keys
    if compiled:
        run = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(run(images), expected["out"], rtol=1e-5, atol=1e-5)
        assert not products
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model) if not compiled else ():
        products.clear()
        twin.blocks[0].mlp.fc1.register_forward_hook(lambda *_: seen.append(1))
        ours = outputs_and_gradients(twin, images)
        assert seen == [1]
        seen.clear()
        assert len(products) == 3 * len(report.linears)
        for key, own in expected.items():
            assert (ours[key] - own).abs().max() <= 1e-5 * own.abs().max().clamp(min=1)
    assert [type(part) for part in sf.restore(model).modules()] == classes


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    layers = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    expected = outputs_and_gradients(layers, x := torch.randn(5, 16))
    sf.accelerate(layers)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.layers, x, use_reentrant=reentrant)

    ours = outputs_and_gradients(Checkpointed(), x)
    for key, own in expected.items():
        name = key if key in ("out", "images") else f"layers.{key}"
        torch.testing.assert_close(ours[name], own)


def test_models_that_keep_their_linear_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own models pack theirs; a layer whose forward was set, or of another class, stays; so do all elsewhere."""
    own = sf.create_model("seg_t_mask_16", num_classes=3, image_size=32)
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4))
    layers[1].forward = nn.Identity().forward
    with pytest.warns(UserWarning, match="replaced nothing"):
        sf.accelerate(own)
    assert not any(isinstance(part, FusedLinear) for part in own.modules())
    assert sf.acceleration_report(sf.accelerate(layers)).linears == ("0",)
    monkeypatch.setattr(forwards, "onednn_beats_mkl", lambda: False)
    with pytest.warns(UserWarning, match="replaced nothing"):
        assert not sf.acceleration_report(sf.accelerate(layers)).linears
