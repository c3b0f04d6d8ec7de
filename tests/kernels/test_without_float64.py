"""The plain formulations on a device without float64, as Apple's GPUs are: a CPU on which float64 is refused."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import segmenter_fast as sf
from segmenter_fast.kernels import registry
from segmenter_fast.kernels.bilinear import Axis
from support.models import normalised, pair

MODULES = ["bilinear", "cpu.labels", "cpu.upsample_cross_entropy"]


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor) and leaf.dtype == torch.float64:
                raise TypeError(f"float64 from {function}")
        return results


@pytest.fixture
def no_float64(monkeypatch: pytest.MonkeyPatch) -> NoFloat64:
    for name in MODULES:
        module = importlib.import_module(f"segmenter_fast.kernels.{name}")
        monkeypatch.setattr(module, "widest", lambda device: torch.float32)
    taps = Axis.taps

    def on_the_cpu(axis: Axis, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        with _disable_current_modes():
            return taps(axis, device)

    monkeypatch.setattr(Axis, "taps", on_the_cpu)
    return NoFloat64()


def loss(model: sf.Segmenter, images: Tensor) -> Tensor:
    target = torch.arange(images[:, 0].numel()).view(images[:, 0].shape) % model.config.num_classes
    value = model.loss(images, target, weight=torch.rand(model.config.num_classes), label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(value, model.decoder.cls_emb)
    return gradient


@pytest.mark.parametrize(
    "compute", [loss, sf.Segmenter.segment, sf.Segmenter.probabilities], ids=["loss", "segment", "probabilities"]
)
def test_models(compute: Callable[[sf.Segmenter, Tensor], Tensor], no_float64: NoFloat64) -> None:
    model, _ = pair("mask_16", torch.float32)
    images = normalised(model, torch.randint(0, 256, (2, 3, 40, 50), dtype=torch.uint8))
    torch.manual_seed(0)
    expected = compute(model, images)
    torch.manual_seed(0)
    with no_float64:
        found = compute(model, images)
    torch.testing.assert_close(found, expected)


def test_apple_s_gpus_have_no_float64() -> None:
    assert [registry.widest(device) for device in ("cpu", "cuda:1", "mps")] == [
        torch.float64,
        torch.float64,
        torch.float32,
    ]
