"""Our models as the official program takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import segmenter_fast as sf
from segmenter_fast import VARIANTS
from segmenter_fast.classes import DATASETS
from segmenter_fast.weights.official_export import variant_from_config, write_folder
from segmenter_fast.weights.reading import read_torch, read_yaml
from support.checkpoints import GOLDEN, same, small_model
from support.official_lookalike import OfficialSegmenter


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
    model = small_model(distillation_token=True, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    write_folder(tmp_path, model.config, model.state_dict())
    state = read_torch(tmp_path / "checkpoint.pth")["model"]
    added = set(state) - set(model.state_dict())
    assert added == {f"encoder.{head}.{kind}" for head in ("head", "head_dist") for kind in ("weight", "bias")}
    assert all(len(state[key]) == 1000 and not state[key].any() for key in added)
    assert sf.load(tmp_path).config == model.config.replace(head_classes=1000, variant="custom")


def test_other_numerics_are_told(tmp_path: Path) -> None:
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


def test_classes_of_a_known_data_set_come_back(tmp_path: Path) -> None:
    names = DATASETS["cityscapes"]
    model = small_model(num_classes=19, class_names=names.class_names, palette=names.palette)
    assert write_folder(tmp_path, model.config, model.state_dict()) == []
    assert read_yaml(tmp_path / "variant.yml")["dataset_kwargs"]["dataset"] == "cityscapes"
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
