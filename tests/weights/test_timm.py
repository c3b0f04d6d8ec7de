"""timm's encoders: randomly initialised, no download."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import segmenter_fast as sf
from segmenter_fast import VARIANTS, SegmenterConfig
from segmenter_fast.config import IMAGENET_MEAN, variant_config
from segmenter_fast.reference import ReferenceSegmenter
from segmenter_fast.weights import timm as weights
from segmenter_fast.weights.load import create_model
from segmenter_fast.weights.reading import CheckpointError
from support.checkpoints import same


def randomised(name: str, **options: Any) -> nn.Module:
    """Make a timm model in which no parameter is trivial, so that a wrong key map shows."""
    model = timm.create_model(name, pretrained=False, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


# timm's numerics for the weights of the older variants; the variants of DINOv2 and DINOv3 have them already.
TIMM = {"encoder_norm_eps": 1e-6, "pos_embed_mode": "bicubic_antialias"}


def assert_same_features(name: str, config: SegmenterConfig, sizes: list[tuple[int, int]], **options: Any) -> None:
    """Compare patch features of a randomly initialised timm model, at its own image size and at others."""
    theirs = randomised(name, dynamic_img_size=True, depth=config.depth, **options)
    model = sf.Segmenter(config).eval()
    model.encoder.load_state_dict(weights.encoder_state(theirs.state_dict(), config))
    reference = ReferenceSegmenter(config).eval()
    reference.load_state_dict(model.state_dict())
    for size in sizes:
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            wanted = theirs.forward_features(images)[:, config.num_prefix_tokens :]
            torch.testing.assert_close(model.encoder(images), wanted, rtol=0, atol=1e-5)
            torch.testing.assert_close(reference.encoder(images), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "side"),
    [
        ("seg_t_linear_16", 64),
        ("seg_s_linear_16", 64),
        ("seg_b_linear_16", 64),
        ("seg_s_linear_32", 128),
        ("seg_b_linear_32", 128),
        ("seg_s_linear_8", 32),
        ("seg_b_linear_8", 32),
        ("seg_t_deit_linear_16", 64),
        ("seg_s_dinov2_linear_14", 56),
    ],
)
def test_features_are_timms_own(variant: str, side: int) -> None:
    config = variant_config(variant).replace(depth=2, image_size=side, **TIMM)
    assert config.timm_backbone is not None
    sizes = [(side, side), (2 * side, side), (side // 2, 2 * side), (side // 2, side // 2)]
    assert_same_features(config.timm_backbone, config, sizes, img_size=side)


def test_features_without_registers_are_timms_own() -> None:
    fields = {"num_register_tokens": 0, "pos_embed_prefix": True, "depth": 2, "image_size": 56}
    config = variant_config("seg_s_dinov2_linear_14").replace(**fields)
    assert_same_features("vit_small_patch14_dinov2", config, [(56, 56), (84, 42)], img_size=56)


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        # DeiT III
        ({"layer_scale": True, "pos_embed_prefix": False}, {"init_values": 1e-5, "no_embed_class": True}),
        # registers that have positions, and no class token
        ({"class_token": False, "num_register_tokens": 2}, {"class_token": False, "reg_tokens": 2, "global_pool": ""}),
        ({"class_token": False}, {"class_token": False, "global_pool": ""}),
    ],
)
def test_features_of_any_prefix_are_timms_own(fields: dict[str, Any], options: dict[str, Any]) -> None:
    config = variant_config("seg_t_linear_16").replace(depth=2, image_size=64, **TIMM, **fields)
    assert_same_features("vit_tiny_patch16_224", config, [(64, 64), (96, 48)], img_size=64, **options)


def test_features_of_rotated_queries_are_timms_own() -> None:
    config = variant_config("seg_s_dinov3_linear_16").replace(depth=2)
    assert_same_features("vit_small_patch16_dinov3", config, [(256, 256), (64, 64), (96, 48)])


def test_features_of_gated_layers_and_biased_queries_are_timms_own() -> None:
    config = variant_config("seg_s_dinov3_linear_16").replace(depth=2, mlp="swiglu", qkv_bias=True)
    assert_same_features("vit_small_plus_patch16_dinov3_qkvb", config, [(64, 64), (96, 48)])


@pytest.mark.parametrize(
    ("variant", "size"), [("seg_s_dinov2_linear_14", (518, 518)), ("seg_s_dinov3_linear_16", (256, 320))]
)
def test_features_of_all_layers_are_timms_own(variant: str, size: tuple[int, int]) -> None:
    config = variant_config(variant)
    assert config.timm_backbone is not None
    assert_same_features(config.timm_backbone, config, [size])


def test_the_dino_variants_have_timms_numerics() -> None:
    config = variant_config("seg_b_dinov2_mask_14")
    assert {name: getattr(config, name) for name in TIMM} == TIMM
    config = variant_config("seg_b_dinov3_mask_16")
    assert (config.encoder_norm_eps, config.mean, config.pos_embed_kind) == (1e-5, IMAGENET_MEAN, "rotary")


@pytest.mark.parametrize("registers", [True, False])
def test_metas_dinov2_names_are_understood(registers: bool) -> None:
    fields = {} if registers else {"num_register_tokens": 0, "pos_embed_prefix": True}
    config = variant_config("seg_s_dinov2_linear_14").replace(depth=1, image_size=56, **fields)
    wanted = sf.Segmenter(config).encoder.state_dict()
    theirs = {**wanted, "mask_token": torch.zeros(1, 384)}
    if registers:
        theirs["register_tokens"] = theirs.pop("reg_token")
        theirs["pos_embed"] = torch.cat([torch.randn(1, 1, 384), wanted["pos_embed"]], 1)
        theirs["cls_token"] = wanted["cls_token"] - theirs["pos_embed"][:, :1]
    ours = weights.encoder_state(theirs, config)
    torch.testing.assert_close(ours, dict(wanted), rtol=0, atol=1e-6)


def test_metas_dinov3_names_are_understood() -> None:
    config = variant_config("seg_s_dinov3_linear_16").replace(depth=1, mlp="swiglu")
    wanted = sf.Segmenter(config).encoder.state_dict()
    renamed = {"reg_token": "storage_tokens", "fc1_g": "w1", "fc1_x": "w2", "fc2": "w3"}
    theirs = {}
    for key, tensor in wanted.items():
        for before, after in renamed.items():
            key = key.replace(before, after)
        theirs[key] = tensor
    theirs |= {"mask_token": torch.zeros(1, 384), "rope_embed.periods": torch.ones(16)}
    bias = torch.cat([torch.zeros(384), torch.randn(384), torch.zeros(384)])  # of keys: masked, without effect
    masked = theirs | {"blocks.0.attn.qkv.bias": bias, "blocks.0.attn.qkv.bias_mask": torch.ones(1152)}
    for state in (theirs, masked):
        assert same(weights.encoder_state(state, config), dict(wanted))
    assert "blocks.0.attn.qkv.bias" in weights.encoder_state(masked, config.replace(qkv_bias=True))
    assert "blocks.0.attn.qkv.bias" in weights.encoder_state(masked | {"blocks.0.attn.qkv.bias": bias + 1}, config)


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
    """Let timm make random models instead of downloads; returns them by name."""
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


def test_create_model_takes_any_name_of_timm(made: dict[str, nn.Module]) -> None:
    name = "vit_tiny_patch16_224.augreg_in21k"
    model = create_model("seg_t_mask_16", pretrained=name, num_classes=4, image_size=224)
    assert same(model.encoder.state_dict(), dict(made[name].state_dict()))
    assert (model.config.timm_backbone, model.config.mean) == (name, (0.5, 0.5, 0.5))


@pytest.mark.usefixtures("made")
def test_weights_bring_their_mean_and_std_unless_given() -> None:
    name = "deit_tiny_patch16_224.fb_in1k"
    fields: dict[str, Any] = {"num_classes": 4, "image_size": 224}
    assert create_model("seg_t_mask_16", pretrained=name, **fields).config.mean == IMAGENET_MEAN
    given = create_model("seg_t_mask_16", pretrained=name, mean=(0.1, 0.2, 0.3), **fields)
    assert given.config.mean == (0.1, 0.2, 0.3)
    assert create_model("seg_s_linear_8", pretrained="timm", **fields).config.mean == IMAGENET_MEAN


def test_create_model_starts_from_dino_and_freezes_it(made: dict[str, nn.Module]) -> None:
    model = create_model("seg_s_dinov3_linear_16", pretrained=True, num_classes=4, freeze_encoder=True)
    theirs = made["vit_small_patch16_dinov3.lvd1689m"].state_dict()
    assert torch.equal(model.encoder.state_dict()["blocks.3.ls2.gamma"], theirs["blocks.3.gamma_2"])
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())
    assert all(parameter.requires_grad for parameter in model.decoder.parameters())


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_small_patch16_dinov3", "has another position embedding than 'learned': RotaryEmbeddingDinoV3"),
        ("vit_tiny_r_s16_p8_224", "does not fit"),
        ("vit_base_patch32_clip_quickgelu_224", "is no Vision Transformer with the activation of mlp='gelu'"),
        ("resnet18", "is no Vision Transformer"),
    ],
)
def test_models_with_other_functions_are_refused(name: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=f"timm's {name} {reason}"):
        create_model("seg_t_mask_16", pretrained=name)


def test_a_name_that_is_neither_file_nor_model_is_called_missing() -> None:
    with pytest.raises(FileNotFoundError, match="vit_of_nobody: no such file"):
        create_model("seg_t_mask_16", pretrained="vit_of_nobody")


@pytest.mark.usefixtures("made")
def test_another_backbone_can_be_named_and_must_fit() -> None:
    with pytest.raises(
        CheckpointError, match=r"timm's vit_tiny_patch16_224 does not fit.*\n\tMissing key.*\"dist_token"
    ):
        create_model("seg_t_deit_mask_16", pretrained="timm", timm_backbone="vit_tiny_patch16_224", image_size=224)


def test_a_variant_without_timm_weights_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no timm weights for seg_t_mask_8; give a timm model's name"):
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
    with pytest.raises(ImportError, match=r"pip install 'segmenter-fast\[train\]'"):
        create_model("seg_t_mask_16", pretrained="timm")
