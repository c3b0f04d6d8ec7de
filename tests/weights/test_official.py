"""Official checkpoints: read with variant.yml or without, and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import segmenter_fast as sf
from segmenter_fast import VARIANTS
from segmenter_fast.classes import DATASET_CLASSES
from segmenter_fast.config import IMAGENET_MEAN, IMAGENET_STD
from segmenter_fast.weights.official import (
    config_from_shapes,
    config_from_variant,
    recognises,
    variant_from_config,
    write_folder,
)
from segmenter_fast.weights.reading import CheckpointError, read_mapping, read_torch
from support.checkpoints import GOLDEN, official_folder, same, small_model
from support.official_lookalike import OfficialSegmenter


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
    variant = read_mapping(GOLDEN / "official_mask" / "variant.yml")
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


@pytest.mark.parametrize("name", ["official_mask", "official_deit_linear"])
def test_official_to_ours_to_official_keeps_every_bit(name: str, tmp_path: Path) -> None:
    sf.load(GOLDEN / name).save_pretrained(tmp_path / "ours")
    ours = sf.load(tmp_path / "ours")
    assert write_folder(tmp_path / "official", ours.config, ours.state_dict()) == []
    assert {path.name for path in (tmp_path / "official").iterdir()} == {"checkpoint.pth", "variant.yml"}
    assert same(
        read_torch(tmp_path / "official" / "checkpoint.pth")["model"],
        read_torch(GOLDEN / name / "checkpoint.pth")["model"],
    )
    again = sf.load(tmp_path / "official")
    assert again.config == sf.load(GOLDEN / name).config
    assert same(again.state_dict(), ours.state_dict())


def test_the_official_program_reads_both_files(tmp_path: Path) -> None:
    model = sf.load(GOLDEN / "official_mask")
    write_folder(tmp_path, model.config, model.state_dict())
    net = yaml.load((tmp_path / "variant.yml").read_text(), yaml.FullLoader)["net_kwargs"]  # as the program reads it
    before = yaml.load((GOLDEN / "official_mask" / "variant.yml").read_text(), yaml.FullLoader)["net_kwargs"]
    assert net["image_size"] == (64, 64)
    assert {**net, "backbone": None} == {**before, "backbone": None}
    program = OfficialSegmenter().eval()
    program.load_state_dict(torch.load(tmp_path / "checkpoint.pth")["model"], strict=True)
    cases = load_file(GOLDEN / "official_mask" / "cases.safetensors")
    with torch.no_grad():
        logits = program(cases["forward/70x90/image"])
    torch.testing.assert_close(logits, cases["forward/70x90/logits"], rtol=0, atol=1e-4)


def test_missing_classification_heads_are_added_as_zeros(tmp_path: Path) -> None:
    model = small_model(distillation_token=True, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    write_folder(tmp_path, model.config, model.state_dict())
    state = read_torch(tmp_path / "checkpoint.pth")["model"]
    added = set(state) - set(model.state_dict())
    assert added == {f"encoder.{head}.{kind}" for head in ("head", "head_dist") for kind in ("weight", "bias")}
    assert all(len(state[key]) == 1000 and not state[key].any() for key in added)
    assert sf.load(tmp_path).config == model.config.replace(head_classes=1000, variant="custom")


def test_other_numerics_are_reported(tmp_path: Path) -> None:
    model = sf.load(GOLDEN / "mmseg_mask" / "segmenter.pth")
    notices = write_folder(tmp_path, model.config, model.state_dict())
    for told in (
        "encoder_norm_eps 1e-05, not 1e-06",
        "pos_embed_mode bilinear, not bicubic",
        "no place for class names",
    ):
        assert any(told in notice for notice in notices), told
    loaded = sf.load(tmp_path)
    assert loaded.config.pos_embed_mode == "bilinear"
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_token_merging_that_is_left_out_is_reported(tmp_path: Path) -> None:
    model = small_model(merging="fast")
    notices = write_folder(tmp_path, model.config, model.state_dict())
    assert any("token merging is left out" in notice for notice in notices)
    assert sf.load(tmp_path).config.merging is None


def test_classes_of_a_known_data_set_come_back(tmp_path: Path) -> None:
    names = DATASET_CLASSES["cityscapes"]
    model = small_model(num_classes=19, class_names=names.class_names, palette=names.palette)
    assert write_folder(tmp_path, model.config, model.state_dict()) == []
    assert read_mapping(tmp_path / "variant.yml")["dataset_kwargs"]["dataset"] == "cityscapes"
    assert sf.load(tmp_path).config.palette == names.palette


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_register_tokens": 2, "layer_scale": True}, r"it has no num_register_tokens=2, layer_scale=True"),
        ({"mlp_ratio": 2.0}, r"no mlp_ratio=2\.0"),
        ({"num_heads": 2, "decoder_num_heads": 2}, "no decoder_num_heads=2"),
        ({"mean": (0.1, 0.2, 0.3)}, r"no normalization of mean \(0\.1, 0\.2, 0\.3\)"),
    ],
)
def test_a_model_that_the_program_cannot_run_is_refused(fields: dict[str, Any], reason: str, tmp_path: Path) -> None:
    model = small_model(**fields)
    with pytest.raises(ValueError, match=reason):
        write_folder(tmp_path / "out", model.config, model.state_dict())
    assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = small_model()
    write_folder(tmp_path, before.config, before.state_dict())

    def fails(*_: Any, **__: Any) -> str:
        raise OSError("no space")

    monkeypatch.setattr(yaml, "dump", fails)
    after = small_model(num_classes=5)
    with pytest.raises(OSError, match="no space"):
        write_folder(tmp_path, after.config, after.state_dict())
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pth", "variant.yml"}
    assert sf.load(tmp_path).config.num_classes == 3


@pytest.mark.parametrize(
    ("variant", "backbone"),
    [
        ("seg_l_mask_16", "vit_large_patch16_384"),
        ("seg_b_deit_mask_16", "deit_base_distilled_patch16_384"),
        ("seg_b_linear_8", "vit_base_patch8_384"),
        ("seg_t_mask_8", "vit_custom_patch8_512"),
    ],
)
def test_backbones_have_the_programs_names(variant: str, backbone: str) -> None:
    assert variant_from_config(VARIANTS[variant])["net_kwargs"]["backbone"] == backbone
