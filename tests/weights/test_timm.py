"""timm's encoders: randomly initialised, no download."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import segmenter_fast as sf
from segmenter_fast import VARIANTS, SegmenterConfig
from segmenter_fast.config import variant_config
from segmenter_fast.weights import timm as weights
from segmenter_fast.weights.create import create_model
from segmenter_fast.weights.reading import CheckpointError

timm = weights.import_timm()


def randomised(name: str, **options: Any) -> nn.Module:
    """A timm model no parameter of which is trivial, so that a wrong map shows."""
    model = timm.create_model(name, pretrained=False, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def assert_same_features(theirs: nn.Module, config: SegmenterConfig, size: int) -> None:
    model = sf.Segmenter(config).eval()
    model.encoder.load_state_dict(weights.encoder_state(theirs.state_dict(), config))
    images = torch.randn(1, 3, size, size)
    with torch.no_grad():
        wanted = theirs.forward_features(images)[:, config.num_prefix_tokens :]
        torch.testing.assert_close(model.encoder(images), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "size"),
    [
        ("seg_t_linear_16", 384),
        ("seg_s_linear_32", 384),
        ("seg_b_linear_32", 384),
        ("seg_t_deit_linear_16", 224),
        ("seg_b_linear_8", 224),
    ],
)
def test_features_are_timms_own(variant: str, size: int) -> None:
    config = variant_config(variant).replace(depth=2, image_size=size, encoder_norm_eps=1e-6)
    assert config.timm_backbone is not None
    assert_same_features(randomised(config.timm_backbone, depth=2), config, size)


def test_features_with_registers_and_layer_scale_are_timms_own() -> None:
    config = VARIANTS["seg_s_linear_16"].replace(
        depth=2,
        patch_size=14,
        image_size=224,
        num_register_tokens=4,
        pos_embed_prefix=False,
        layer_scale=True,
        encoder_norm_eps=1e-6,
    )
    assert_same_features(randomised("vit_small_patch14_reg4_dinov2", depth=2, img_size=224), config, 224)


@pytest.mark.parametrize("variant", [name for name, config in VARIANTS.items() if config.timm_backbone])
def test_every_backbone_of_the_table_fits_its_variant(variant: str) -> None:
    config = VARIANTS[variant]
    with torch.device("meta"):
        theirs = timm.create_model(config.timm_backbone, pretrained=False, num_classes=0).state_dict()
        ours = sf.Segmenter(config).encoder.state_dict()
    assert {key: value.shape for key, value in weights.encoder_state(theirs, config).items()} == {
        key: value.shape for key, value in ours.items()
    }


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_the_position_embedding_is_resized_in_the_configured_mode(mode: str) -> None:
    theirs = randomised("deit_tiny_distilled_patch16_224", depth=1).state_dict()
    config = VARIANTS["seg_t_deit_mask_16"].replace(image_size=(320, 512), pos_embed_mode=mode)
    after = weights.encoder_state(theirs, config)["pos_embed"]
    assert torch.equal(after[:, :2], theirs["pos_embed"][:, :2])
    grid = theirs["pos_embed"][:, 2:].reshape(1, 14, 14, 192).permute(0, 3, 1, 2)
    wanted = F.interpolate(grid, size=(20, 32), mode=mode, align_corners=False).permute(0, 2, 3, 1)
    torch.testing.assert_close(after[:, 2:], wanted.reshape(1, 640, 192))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, nn.Module]:
    """What timm makes from now on: random models where it would download."""
    models: dict[str, nn.Module] = {}
    create = timm.create_model

    def create_random(name: str, *, pretrained: bool, num_classes: int) -> nn.Module:
        assert pretrained
        models[name] = create(name, pretrained=False, num_classes=num_classes)
        return models[name]

    monkeypatch.setattr(timm, "create_model", create_random)
    return models


def test_create_model_starts_the_encoder_from_timm(made: dict[str, nn.Module]) -> None:
    model = create_model("seg_t_deit_mask_16", pretrained="timm", num_classes=4, image_size=224, head_classes=6)
    theirs = made["deit_tiny_distilled_patch16_224.fb_in1k"].state_dict()
    ours = {key: value for key, value in model.encoder.state_dict().items() if not key.startswith("head")}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert model.config.encoder_norm_eps == 1e-5


@pytest.mark.usefixtures("made")
def test_another_backbone_can_be_named_and_must_fit() -> None:
    with pytest.raises(CheckpointError, match=r"timm's vit_tiny_patch16_224 does not fit.*\n +missing .*dist_token"):
        create_model("seg_t_deit_mask_16", pretrained="timm", timm_backbone="vit_tiny_patch16_224", image_size=224)


def test_a_variant_without_timm_weights_says_so() -> None:
    with pytest.raises(CheckpointError, match="no timm weights for seg_t_mask_8; pass timm_backbone="):
        create_model("seg_t_mask_8", pretrained="timm")


def test_a_name_that_timm_does_not_know() -> None:
    with pytest.raises(CheckpointError, match="timm cannot make vit_of_nobody"):
        create_model("seg_t_mask_16", pretrained="timm", timm_backbone="vit_of_nobody")


def test_without_network_the_error_is_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> nn.Module:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(CheckpointError, match=r"cannot fetch vit_tiny_patch16_384.*network.*no route to host"):
        create_model("seg_t_mask_16", pretrained="timm")


def test_without_timm_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    weights.import_timm.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"pip install 'segmenter-fast\[train\]'"):
            create_model("seg_t_mask_16", pretrained="timm")
    finally:
        weights.import_timm.cache_clear()
