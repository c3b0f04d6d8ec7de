"""Linear heads of users' own code on Hugging Face's and timm's backbones, found by their structure."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import segmenter_fast as sf
from segmenter_fast.accelerate import lazy_functions
from segmenter_fast.accelerate.lazy import Upsampled

# A package that transformers looks for; the folder of the same name in a checkout is not it.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]

TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "image_size": 64, "patch_size": 16}


def backbone(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    configuration = {"Dinov2": transformers.Dinov2Config, "DINOv3ViT": transformers.DINOv3ViTConfig}[kind]
    return getattr(transformers, f"{kind}Model")(configuration(**TINY))


class LinearSegmenter(nn.Module):
    """Backbone, BatchNorm and 1x1 convolution; the model, or its user, resizes."""

    def __init__(self, kind: str, resizes: bool) -> None:
        super().__init__()
        self.resizes, self.prefix = resizes, 1 if kind == "Dinov2" else 5
        self.backbone = backbone(kind)
        self.bn, self.classifier = nn.BatchNorm2d(64), nn.Conv2d(64, 7, 1)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.backbone(images).last_hidden_state[:, self.prefix :]
        scores = self.classifier(self.bn(tokens.mT.unflatten(2, (images.shape[2] // 16, -1))))
        return resized(scores, images.shape[2:]) if self.resizes else scores


class LinearTokens(nn.Module):
    """A Linear layer on tokens, inside of another module, whose scores a method resizes."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = backbone("Dinov2")
        self.head = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 7))

    def forward(self, images: Tensor) -> Tensor:
        scores = self.head(self.backbone(images).last_hidden_state[:, 1:])
        return self.upscale(scores.permute(0, 2, 1).reshape(len(images), 7, -1, images.shape[3] // 16), images)

    def upscale(self, scores: Tensor, images: Tensor) -> Tensor:
        return F.interpolate(scores, images.shape[2:], mode="bilinear", align_corners=False)


def resized(scores: Tensor, size: Any) -> Tensor:
    return F.interpolate(scores, size=tuple(size), mode="bilinear", align_corners=False)


@pytest.fixture(autouse=True)
def _small_tensors_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_functions, "FASTER_FROM", {})


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("head", ["Dinov2", "Dinov2, resized by its user", "DINOv3ViT", "tokens"])
def test_own_linear_heads(head: str, training: bool) -> None:
    kind, _, by_user = head.partition(",")
    torch.manual_seed(0)
    model = (LinearTokens() if kind == "tokens" else LinearSegmenter(kind, not by_user)).double().train(training)
    fast = sf.accelerate(copy.deepcopy(model))
    assert sf.acceleration_report(fast).patch_sized == (("head.1",) if kind == "tokens" else ("classifier",))
    images, labels = torch.randn(2, 3, 64, 80, dtype=torch.float64), torch.randint(7, (2, 64, 80))
    labels[:, :9] = 255
    found = []
    for one in (model, fast):
        torch.manual_seed(1)  # DINOv3 draws its coordinates in training
        logits = one(images)
        logits = resized(logits, labels.shape[1:]) if by_user else logits
        assert isinstance(logits, Upsampled) == (one is fast)
        loss = F.cross_entropy(logits, labels, torch.linspace(1, 2, 7, dtype=torch.float64), ignore_index=255)
        loss.backward()
        found.append((loss, {name: p.grad for name, p in one.named_parameters()}, logits.argmax(1)))
    (loss, grads, classes), (fast_loss, fast_grads, fast_classes) = found
    torch.testing.assert_close(fast_loss, loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(fast_grads, grads, rtol=1e-7, atol=1e-9)
    assert torch.equal(fast_classes, classes)
    assert not sf.made_full_size(fast)


@pytest.mark.filterwarnings("ignore:accelerate replaced nothing")
def test_what_does_not_resize_scores_is_no_head() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    for model in (
        timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=5),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1)),
        sf.create_model("seg_t_linear_16", image_size=64),
    ):
        assert not sf.acceleration_report(sf.accelerate(model)).patch_sized
