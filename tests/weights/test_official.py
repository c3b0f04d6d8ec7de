"""variant.yml into a configuration; a state dict alone into one."""

from __future__ import annotations

from pathlib import Path

import pytest

import segmenter_fast as sf
from segmenter_fast.config import IMAGENET_MEAN, IMAGENET_STD
from segmenter_fast.weights.official import config_from_shapes, config_from_variant, recognises
from segmenter_fast.weights.reading import CheckpointError, read_torch, read_yaml
from support.checkpoints import GOLDEN, official_folder


def test_the_configuration_of_a_mask_transformer() -> None:
    config = sf.load(GOLDEN / "official_mask").config
    wanted = {
        "num_classes": 7,
        "image_size": (64, 64),
        "patch_size": 16,
        "embed_dim": 128,
        "depth": 2,
        "num_heads": 2,
        "distillation_token": False,
        "dropout": 0.0,
        "drop_path_rate": 0.1,
        "head_classes": 10,
        "decoder": "mask",
        "decoder_depth": 1,
        "decoder_num_heads": 2,
        "decoder_dropout": 0.1,
        "decoder_drop_path_rate": 0.0,
        "encoder_norm_eps": 1e-5,
        "decoder_norm_eps": 1e-5,
        "pos_embed_mode": "bilinear",
        "upsample_to": "padded",
        "upscale_small_images": True,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "window_size": 64,
        "window_stride": 48,
    }
    assert {name: getattr(config, name) for name in wanted} == wanted


def test_the_configuration_of_a_distilled_linear_model() -> None:
    config = sf.load(GOLDEN / "official_deit_linear").config
    assert (config.decoder, config.distillation_token) == ("linear", True)
    assert (config.mean, config.std) == (IMAGENET_MEAN, IMAGENET_STD)


def test_distilled_and_rates_may_be_absent(tmp_path: Path) -> None:
    edits = {"  distilled: false\n": "", "    drop_path_rate: 0.0\n    dropout: 0.1\n": ""}
    config = sf.load(official_folder(tmp_path, edits=edits)).config
    assert not config.distillation_token
    assert (config.decoder_dropout, config.decoder_drop_path_rate) == (0.0, 0.0)


def test_the_variant_is_named_where_the_dimensions_are_its_own() -> None:
    variant = read_yaml(GOLDEN / "official_mask" / "variant.yml")
    variant["net_kwargs"] |= {"d_model": 192, "n_heads": 3, "n_layers": 12}
    config = config_from_variant(variant, {})
    assert config.variant == "seg_t_mask_16"
    assert config.timm_backbone == "vit_tiny_patch16_384.augreg_in21k_ft_in1k"


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("net_kwargs:", "other:", "net_kwargs must be a mapping"),
        ("  decoder:\n", "  decoder: 1\n  other:\n", "decoder must be a mapping"),
        ("  d_model: 128\n", "", "d_model must be an integer, got None"),
        ("n_layers: 2", "n_layers: two", "n_layers must be an integer, got 'two'"),
        ("  patch_size: 16", "  patch_size: true", "patch_size must be an integer, got True"),
        ("n_heads: 2", "n_heads: 3", "num_heads must be a divisor"),
        ("  dropout: 0.0", "  dropout: high", "dropout must be a number, got 'high'"),
        ("  normalization: vit\n  patch", "  normalization: none\n  patch", "normalization must be one of vit, deit"),
        ("name: mask_transformer", "name: deeplab", "name must be one of mask_transformer, linear"),
        ("  - 64\n  - 64\n", "  - 64\n", "image_size must be"),
        ("window_stride: 48", "window_stride: 0", "window_stride must be"),
    ],
)
def test_a_wrong_variant_is_refused_by_name(before: str, after: str, reason: str, tmp_path: Path) -> None:
    folder = official_folder(tmp_path / "model", edits={before: after})
    with pytest.raises(CheckpointError, match=rf"variant\.yml: .*{reason}"):
        sf.load(folder)


def test_shapes_alone_give_the_same_configuration_but_for_training_and_windows() -> None:
    for name in ("official_mask", "official_deit_linear"):
        state = read_torch(GOLDEN / name / "checkpoint.pth")["model"]
        assert recognises(state)
        told = sf.load(GOLDEN / name).config
        assert config_from_shapes(state, {}) == told.replace(decoder_dropout=0.0, window_stride=64)
