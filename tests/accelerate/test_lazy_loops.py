"""Training and inference loops of the official program and of mmsegmentation; PyTorch's machinery around a model."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import segmenter_fast as sf
from segmenter_fast.accelerate import lazy_functions
from segmenter_fast.accelerate.forwards import Fused
from segmenter_fast.accelerate.full_size import FullSizeCalls
from segmenter_fast.accelerate.lazy import Upsampled, patch_scores
from segmenter_fast.kernels.cpu.native import unavailable
from support.lazy_pairs import IGNORED, assert_same_gradients, pair, resized
from support.other_models import build, images


@pytest.fixture(autouse=True)
def _small_tensors_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_functions, "FASTER_FROM", {})


def mmseg_loss(head: nn.Module, features: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss averaged over the valid pixels, and accuracy, as mmsegmentation's heads compute them."""
    logits = resized(head(features), labels.shape[1:])
    weight = torch.linspace(0.5, 2, 7, dtype=logits.dtype)
    pixels = F.cross_entropy(logits, labels, weight, reduction="none", ignore_index=IGNORED)
    value, label = logits.topk(1, dim=1)
    assert value.shape == label.shape == (len(labels), 1, *labels.shape[1:])
    correct = label.transpose(0, 1).eq(labels[None].expand_as(label.transpose(0, 1)))[:, labels != IGNORED]
    return pixels.sum() / (labels != IGNORED).sum(), correct.double().mean()


@pytest.mark.parametrize("training", [False, True])
def test_official_training_step(training: bool) -> None:
    model, fast, x, labels = pair()
    criterion = nn.CrossEntropyLoss(ignore_index=IGNORED)
    assert_same_gradients(model.train(training), fast.train(training), lambda m: criterion(m(x), labels))
    assert not sf.made_full_size(fast)
    assert torch.equal(fast.eval()(x).argmax(1), model.eval()(x).argmax(1))


def test_official_windows_make_the_logits() -> None:
    model, fast, x, _ = pair()
    maps = [torch.zeros(2, 7, 50, 71, dtype=x.dtype) for _ in range(2)]
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for logits in (model(x), fast(x), fast(x)):
            maps[type(logits) is Upsampled][:] = logits
    (warning,) = caught
    assert "__setitem__ made the logits (2, 7, 50, 71) in full" in str(warning.message)
    torch.testing.assert_close(*maps, rtol=1e-9, atol=1e-9)
    ((call, count),) = sf.made_full_size(fast).items()
    assert "__setitem__ at" in call
    assert __file__ in call
    assert count == 2
    with pytest.raises(ValueError, match="not accelerated"):
        sf.made_full_size(sf.restore(fast))


@pytest.mark.parametrize("training", [False, True])
def test_mmsegmentations_loss_and_accuracy(training: bool) -> None:
    model, fast, x, labels = pair("mmseg")
    model.train(training), fast.train(training)

    def loss(m: Any) -> Tensor:
        value, accuracy = mmseg_loss(m.decode_head, m.backbone(x), labels)
        accuracies.append(accuracy)
        return value

    accuracies: list[Tensor] = []
    assert_same_gradients(model, fast, loss)
    assert accuracies[0] == accuracies[1]
    assert not sf.made_full_size(fast)


def test_mmsegmentations_prediction() -> None:
    """A resize to the input, a crop of its padding, a second resize to the photograph."""
    model, fast, x, _ = pair("mmseg")

    def predict(m: nn.Module) -> list[Tensor]:
        logits = m(x)
        images = [resized(logits[i : i + 1, :, : 64 - 0, : 64 - 3], (90, 70)).squeeze(0) for i in range(2)]
        return [image.argmax(dim=0, keepdim=True) for image in images]

    with torch.no_grad():
        assert all(map(torch.equal, predict(fast), predict(model)))
    assert all(call.startswith("interpolate") for call in sf.made_full_size(fast))


def test_distributed_data_parallel(tmp_path: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
            model, fast, x, labels = pair()
            outputs: list[Tensor] = []

            def loss(m: nn.Module, x: Tensor = x, labels: Tensor = labels, outputs: list[Tensor] = outputs) -> Tensor:
                outputs.append(m(x))
                return F.cross_entropy(outputs[-1], labels, ignore_index=IGNORED)

            assert_same_gradients(*(nn.parallel.DistributedDataParallel(m, **options) for m in (model, fast)), loss)
            assert options or isinstance(outputs[1], Upsampled)
    finally:
        dist.destroy_process_group()


def test_compiled_code_takes_the_resized_tensor() -> None:
    model, fast, x, labels = pair()

    @torch.compile(backend="aot_eager")
    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, ignore_index=IGNORED)

    assert_same_gradients(model, fast, lambda m: loss(m(x)))
    several = torch.compile(lambda y: (y.argmax(1), y.softmax(1), y.max(1)[0]), backend="aot_eager")
    torch.testing.assert_close(several(fast(x)), several(model(x)), rtol=1e-7, atol=1e-9)
    assert type(torch.compile(fast, backend="aot_eager")(x)) is Tensor


def test_autocast() -> None:
    model, x = build("official", torch.float32), images("official", torch.float32)
    fast = sf.accelerate(copy.deepcopy(model))
    labels = torch.randint(7, (2, 50, 71))
    with torch.autocast("cpu", torch.bfloat16):
        for use in (lambda y: F.cross_entropy(y, labels), lambda y: y.softmax(1), lambda y: y.max(1)[0]):
            found, expected = use(fast(x)), use(model(x))
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)


def test_what_would_be_wrong_is_an_error() -> None:
    scores = torch.randn(1, 3, 4, 4, requires_grad=True) * 1
    waiting = resized(patch_scores(scores, FullSizeCalls()), (8, 8))
    waiting.argmax(1)
    with pytest.raises(RuntimeError, match="register_hook before"):
        waiting.register_hook(lambda grad: grad)
    scores.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        waiting.exp()


def test_dtype_and_shape_need_no_logits() -> None:
    calls, ones = FullSizeCalls(), torch.ones(1, dtype=torch.float64)
    waiting = F.interpolate(input=patch_scores(torch.randn(1, 3, 4, 4), calls), size=(8, 8), mode="bilinear")
    assert torch.equal(waiting.new_tensor([1, 2]), torch.tensor([1.0, 2.0]))
    assert ones.to(waiting).dtype == ones.type_as(waiting).dtype == torch.float32
    assert ones.expand_as(waiting).shape == torch.ones(192).view_as(waiting).shape == (1, 3, 8, 8)
    assert waiting.to(ones).dtype == torch.float64
    assert isinstance(waiting, Upsampled)
    assert not calls.counts


@pytest.mark.skipif(unavailable() is not None, reason="the limits are those of the C++ kernels")
def test_small_results_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    calls = FullSizeCalls()
    waiting = resized(patch_scores(torch.randn(1, 20, 16, 16), calls), (64, 64))
    assert type(waiting) is Upsampled
    waiting.softmax(1)
    assert type(waiting) is Tensor
    few, trained = torch.randn(1, 3, 4, 4), torch.randn(1, 20, 16, 16, requires_grad=True) * 1
    assert not any(type(resized(patch_scores(scores, calls), (64, 64))) is Upsampled for scores in (few, trained))
    assert not calls.counts


def test_labels_wait_from_where_they_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    scores = torch.randn(1, 20, 16, 16)

    def waits(scores: Tensor, side: int) -> bool:
        logits = F.interpolate(patch_scores(scores, FullSizeCalls()), size=(side, side), mode="bilinear")
        expected = F.interpolate(scores, size=(side, side), mode="bilinear").argmax(1)
        assert torch.equal(logits.argmax(1), expected)
        return type(logits) is Upsampled

    native = unavailable() is None
    found = [waits(scores, side) for side in (8, 32, 64)], waits(scores.to(memory_format=torch.channels_last), 64)
    assert found == ([False, False, native], False)
    monkeypatch.setenv("SEGMENTER_FAST_NATIVE", "0")
    assert not waits(scores, 64)


def test_named_heads() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 1))
    sf.accelerate(model, heads=["1"])
    assert sf.acceleration_report(model).patch_sized == ("1",)
    assert isinstance(resized(model(torch.zeros(1, 3, 4, 4)), 8), Upsampled)
    with pytest.raises(AttributeError, match="heads names modules that Sequential has not: head"):
        sf.accelerate(model, heads="head")
    sf.accelerate(model)
    assert sf.acceleration_report(model).patch_sized == ("1",)


def test_what_cannot_be_a_head_is_an_error() -> None:
    model = build("official")
    for name, found in (("", "contains the head 'decoder', which is known"), ("encoder.blocks", "returns no scores")):
        with pytest.raises(ValueError, match=rf"heads must name .* such as the last convolution; '{name}', .* {found}"):
            sf.accelerate(model, heads=[name])
    with pytest.raises(ValueError, match=r"contains the head '0\.decoder', which is known"):
        sf.accelerate(nn.Sequential(nn.Sequential(OrderedDict(decoder=model.decoder))), heads="0")
    assert not any(isinstance(part, Fused) for part in model.modules())
    pooled = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten())
    with pytest.raises(ValueError, match=r"accelerate\(heads=\) must name .* '1' returns \(2, 64\): .*restore"):
        sf.accelerate(pooled, heads="1")(torch.zeros(2, 3, 4, 4))


def test_full_size_calls_outlive_a_second_call() -> None:
    _, fast, x, _ = pair()
    with torch.no_grad(), pytest.warns(UserWarning, match="in full"):
        fast(x).sin()
    calls = sf.made_full_size(fast)
    assert len(calls) == 1
    assert sf.made_full_size(sf.accelerate(fast)) == calls
    for function in (sf.made_full_size, sf.acceleration_report):
        with pytest.raises(TypeError, match="got NoneType"):
            function(None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_labels_of_rounded_logits(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(3, 40, 4, stride=4), nn.Upsample(scale_factor=4, mode="bilinear")).eval()
    images = torch.randn(2, 3, 64, 64)
    expected = model(images).to(dtype).argmax(1)
    assert torch.equal(sf.accelerate(model, heads="0")(images).to(dtype).argmax(1), expected)
