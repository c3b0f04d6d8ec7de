"""Models of Hugging Face, segmentation_models_pytorch and torchvision, trained and used as before, after one line."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import segmenter_fast as sf
from segmenter_fast.accelerate import lazy_functions

SIDES = ((64, 64), (50, 71))
IGNORED = 255


# A package that transformers looks for; the folder of the same name in a checkout is not it.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]


def hugging_face(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    vit = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    vit |= {"image_size": 64, "patch_size": 16, "num_labels": 7}
    configs: dict[str, Callable[[], Any]] = {
        "Segformer": lambda: transformers.SegformerConfig(
            depths=[1] * 4,
            hidden_sizes=[32, 64, 64, 64],
            num_attention_heads=[1] * 4,
            decoder_hidden_size=32,
            num_labels=7,
        ),
        "DPT": lambda: transformers.DPTConfig(
            **vit, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[16] * 4, fusion_hidden_size=16
        ),
        "UperNet": lambda: transformers.UperNetConfig(
            backbone_config=transformers.ConvNextConfig(
                depths=[1] * 4, hidden_sizes=[16, 16, 32, 32], out_features=[f"stage{i}" for i in (1, 2, 3, 4)]
            ),
            hidden_size=32,
            auxiliary_in_channels=32,
            auxiliary_channels=16,
            num_labels=7,
        ),
        "Beit": lambda: transformers.BeitConfig(**vit, out_indices=[1, 2, 3, 4], use_relative_position_bias=True),
    }
    return getattr(transformers, f"{name}ForSemanticSegmentation")(configs[name]())


def smp(name: str) -> nn.Module:
    package = pytest.importorskip("segmentation_models_pytorch", reason="segmentation_models_pytorch is not installed")
    options: dict[str, dict[str, Any]] = {
        "Segformer": {"encoder_name": "mit_b0", "decoder_segmentation_channels": 16},
        "UPerNet": {"encoder_name": "mit_b0", "decoder_channels": 16},
        "DPT": {"encoder_name": "tu-vit_tiny_patch16_224", "dynamic_img_size": True, "decoder_fusion_channels": 16}
        | {"decoder_intermediate_channels": [16] * 4},
    }
    return getattr(package, name)(encoder_weights=None, classes=7, **options[name])


def torchvision(name: str) -> nn.Module:
    package = pytest.importorskip("torchvision.models.segmentation", reason="torchvision is not installed")
    return getattr(package, name)(weights=None, weights_backbone=None, num_classes=7)


class WithCrossEntropy(nn.Module):
    """A model whose user computes the loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(images)
        logits = out["out"] if isinstance(out, dict) else out
        weight = torch.linspace(0.5, 2, 7, dtype=logits.dtype)
        return F.cross_entropy(logits, labels, weight, ignore_index=IGNORED, label_smoothing=0.1), logits


@pytest.fixture(autouse=True)
def _small_tensors_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tests' small tensors, which PyTorch computes faster from the resize, take the fused ops."""
    monkeypatch.setattr(lazy_functions, "FASTER_FROM", {})


def build(kind: str) -> nn.Module:
    package, _, name = kind.partition(" ")
    torch.manual_seed(0)
    if package == "hf":
        return hugging_face(name).double()
    return WithCrossEntropy((smp if package == "smp" else torchvision)(name)).double()


def step(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    model.zero_grad()
    if isinstance(model, WithCrossEntropy):
        loss, logits = model(images, labels)
    else:
        out = model(pixel_values=images, labels=labels)
        loss, logits = out.loss, out.logits
    loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return loss.detach(), logits.detach(), grads


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        "hf Segformer",
        "hf DPT",
        "hf UperNet",
        "hf Beit",
        "smp Segformer",
        "smp DPT",
        "smp UPerNet",
        "torchvision lraspp_mobilenet_v3_large",
    ],
)
def test_losses_gradients_and_labels_are_the_models_own(kind: str, training: bool) -> None:
    model = build(kind).train(training)
    fast = sf.accelerate(copy.deepcopy(model))
    fixed = kind.startswith("smp") or kind in ("hf DPT", "hf Beit")  # they take multiples of their patches
    for batch, side in ((2, SIDES[0]), (2 if training else 1, SIDES[0 if fixed else 1])):
        images = torch.randn(batch, 3, *side, dtype=torch.float64)
        labels = torch.randint(7, (batch, *side))
        labels[:, :9] = IGNORED
        loss, logits, grads = step(model, images, labels)
        fast_loss, fast_logits, fast_grads = step(fast, images, labels)
        torch.testing.assert_close(fast_loss, loss, rtol=1e-9, atol=0)
        assert fast_grads.keys() == grads.keys()
        largest = max(grad.abs().max() for grad in grads.values())
        for name, grad in grads.items():
            torch.testing.assert_close(fast_grads[name], grad, rtol=1e-7, atol=1e-9 * float(largest), msg=name)
        assert torch.equal(fast_logits.argmax(1), logits.argmax(1))
    assert not sf.made_full_size(fast)
    torch.testing.assert_close(fast_logits.sin(), logits.sin(), rtol=1e-9, atol=1e-9)
    assert sf.acceleration_report(fast).patch_sized
    sf.restore(fast)
    assert {type(part) for part in fast.modules()} == {type(part) for part in model.modules()}


@pytest.mark.parametrize("name", ["Segformer", "DPT", "Beit"])
def test_post_processing_of_hugging_face(name: str) -> None:
    model = hugging_face(name).double().eval()
    import transformers

    processor = getattr(transformers, f"{name}ImageProcessor")()
    fast = sf.accelerate(copy.deepcopy(model))
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        out, fast_out = model(images), fast(images)
    for sizes in ([(100, 131), (64, 64)], None):
        expected = processor.post_process_semantic_segmentation(out, target_sizes=sizes)
        found = processor.post_process_semantic_segmentation(fast_out, target_sizes=sizes)
        assert [(a.dtype, a.shape) for a in found] == [(b.dtype, b.shape) for b in expected]
        assert all(map(torch.equal, found, expected))
