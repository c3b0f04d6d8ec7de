"""``create_model`` with weights of a file or folder; test_timm has timm's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import segmenter_fast as sf
from segmenter_fast.weights.reading import CheckpointError
from support.checkpoints import GOLDEN, SMALL, same, small_model

GOLDEN_FIELDS = {"embed_dim": 128, "depth": 2, "num_heads": 2, "decoder_depth": 1, "decoder_num_heads": 2}


def test_random_weights_are_ready_to_train() -> None:
    model = sf.create_model(SMALL, num_classes=4)
    assert model.training
    assert model.config == SMALL.replace(num_classes=4)


def test_a_segmenter_checkpoint_brings_its_numerics_and_classes() -> None:
    model = sf.create_model("seg_t_mask_16", pretrained=GOLDEN / "mmseg_mask" / "segmenter.pth", **GOLDEN_FIELDS)
    loaded = sf.load(GOLDEN / "mmseg_mask" / "segmenter.pth")
    assert same(model.state_dict(), loaded.state_dict())
    assert model.config == loaded.config
    assert (model.config.num_classes, model.config.pos_embed_mode) == (7, "bicubic")


def test_fields_override_a_checkpoint(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="has 3 classes, not 9"):
        model = sf.create_model(SMALL, pretrained=tmp_path, num_classes=9, image_size=64)
    assert (model.config.num_classes, model.config.image_size) == (9, (64, 64))


def test_a_checkpoint_of_another_architecture_is_refused() -> None:
    wanted = r"official_mask holds another model than seg_t_linear_16: .*depth is 2, not 12.*decoder is mask"
    with pytest.raises(CheckpointError, match=wanted):
        sf.create_model("seg_t_linear_16", pretrained=GOLDEN / "official_mask")


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_file_of_encoder_weights(kind: str, tmp_path: Path) -> None:
    encoder = small_model().encoder.state_dict()
    path = tmp_path / f"encoder.{kind}"
    content = {**encoder, "head.weight": torch.ones(5, 64), "head.bias": torch.ones(5)}
    if kind == "pth":
        torch.save(content, path)
    else:
        save_file(content, path)
    model = sf.create_model(SMALL, pretrained=path, image_size=64)
    after = model.encoder.state_dict()
    assert after.pop("pos_embed").shape == (1, 65, 64)
    del encoder["pos_embed"]
    assert same(after, encoder)
    with pytest.raises(CheckpointError, match=r"encoder\.\w+ does not fit.*\n\tMissing key.*: \"blocks\.2\.norm1"):
        sf.create_model(SMALL, pretrained=path, depth=3)
    with pytest.raises(CheckpointError, match=r"encoder\.\w+ holds an encoder"):
        sf.load(path)


def test_missing_files_and_unknown_variants_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        sf.create_model("seg_t_mask_16", pretrained=tmp_path / "absent.pth")
    with pytest.raises(ValueError, match=r"unknown variant 'any'; known are seg_t_mask_16.* seg_l_dinov3_linear_16$"):
        sf.create_model("any", pretrained="timm")
    with pytest.raises(ValueError, match=r"unknown variant 'seg-b-mask-16'; did you mean seg_b_mask_16\?$"):
        sf.create_model("seg-b-mask-16")


def test_kinds_of_arguments_are_checked() -> None:
    with pytest.raises(TypeError, match="variant must be a name or a SegmenterConfig, got int"):
        sf.create_model(16)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"pretrained must be True, False, None, 'timm', .* or a path, got int"):
        sf.create_model(SMALL, pretrained=1)  # type: ignore[arg-type]
    assert sf.create_model(SMALL, pretrained=False).training
