"""Configuration: the table of variants, overridden fields, and errors that name the field."""

from __future__ import annotations

import json

import pytest

from segmenter_fast.config import PUBLISHED_MIOU, VARIANTS, SegmenterConfig, variant_config


def test_table_holds_every_named_variant() -> None:
    expected = {f"seg_{size}_{decoder}_16" for size in "tsbl" for decoder in ("mask", "linear")}
    expected |= {f"seg_{size}_{decoder}_32" for size in "tsbl" for decoder in ("mask", "linear")}
    expected |= {f"seg_{size}_{decoder}_8" for size in "mtsb" for decoder in ("mask", "linear")}
    expected |= {f"seg_{size}_deit_{decoder}_16" for size in "tsb" for decoder in ("mask", "linear")}
    expected |= {f"seg_{size}_dinov2_{decoder}_14" for size in "sbl" for decoder in ("mask", "linear")}
    expected |= {f"seg_{size}_dinov3_{decoder}_16" for size in "sbl" for decoder in ("mask", "linear")}
    assert set(VARIANTS) == expected
    assert set(PUBLISHED_MIOU) <= expected


def test_heads_are_64_wide_everywhere() -> None:
    for config in VARIANTS.values():
        assert config.embed_dim // config.num_heads == config.embed_dim // config.decoder_num_heads == 64


def test_replace_takes_a_square_size_and_drops_names_of_other_classes() -> None:
    config = variant_config("seg_t_mask_16").replace(num_classes=2, class_names=["a", "b"], palette=[[0, 0, 0]] * 2)
    assert config.class_names == ("a", "b")
    assert config.replace(image_size=64).image_size == (64, 64)
    assert config.replace(num_classes=3).class_names == ()
    assert config.replace(num_classes=3).palette == ()


def test_json_round_trip() -> None:
    config = variant_config("seg_s_deit_linear_16").replace(num_classes=2, class_names=("a", "b"))
    assert SegmenterConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_classes", 0),
        ("patch_size", 0),
        ("num_heads", 5),
        ("decoder", "fpn"),
        ("pos_embed_mode", "nearest"),
        ("pos_embed_kind", "sinusoidal"),
        ("mlp", "relu"),
        ("rope_temperature", 0.0),
        ("upsample_to", "somewhere"),
        ("image_size", (8, 512)),
        ("drop_path_rate", 1.0),
        ("encoder_norm_eps", 0.0),
        ("std", (0.0, 1.0, 1.0)),
        ("class_names", ("only one",)),
        ("window_size", 4),
        ("head_classes", -1),
    ],
)
def test_refusals_name_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        variant_config("seg_t_mask_16").replace(**{field: value})


def test_rotary_heads_are_a_multiple_of_4_wide() -> None:
    with pytest.raises(ValueError, match="num_heads must be such that rotary heads have a multiple of 4 channels"):
        variant_config("seg_s_dinov3_mask_16").replace(embed_dim=36, num_heads=6)


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"unknown variant 'seg_x'.*seg_t_mask_16"):
        variant_config("seg_x")
    with pytest.raises(TypeError, match="patchsize"):
        variant_config("seg_t_mask_16").replace(patchsize=16)
