"""mmsegmentation's names, numerics and class names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import segmenter_fast as sf
from segmenter_fast.weights import mmseg
from segmenter_fast.weights.reading import CheckpointError, read_torch
from support.checkpoints import GOLDEN, same, save_with_history

FILES = {name: GOLDEN / name / "segmenter.pth" for name in ("mmseg_mask", "mmseg_linear")}


@pytest.mark.parametrize("name", FILES)
def test_numerics_and_classes(name: str) -> None:
    config = sf.load(FILES[name]).config
    assert (config.encoder_norm_eps, config.decoder_norm_eps) == (1e-6, 1e-5)
    assert (config.pos_embed_mode, config.upsample_to) == ("bicubic", "image")
    assert not config.upscale_small_images
    assert (config.drop_path_rate, config.decoder_drop_path_rate) == (0.1, 0.1)
    assert (config.num_heads, config.window_size, config.window_stride) == (2, 64, 32)
    assert config.class_names == tuple(f"thing {index}" for index in range(7))
    assert config.palette[1] == (7, 13, 29)


@pytest.mark.parametrize("name", FILES)
def test_every_tensor_arrives(name: str) -> None:
    theirs = read_torch(FILES[name])["state_dict"]
    ours = sf.load(FILES[name]).state_dict()
    assert sum(tensor.numel() for tensor in theirs.values()) == sum(tensor.numel() for tensor in ours.values())


def test_an_unused_convolution_is_dropped_and_a_missing_bias_is_zero() -> None:
    state = read_torch(FILES["mmseg_mask"])["state_dict"]
    state |= {"decode_head.conv_seg.weight": torch.ones(7, 128, 1, 1), "decode_head.conv_seg.bias": torch.ones(7)}
    bias = "backbone.patch_embed.projection.bias"
    del state[bias]
    loaded = sf.load(state).state_dict()
    assert not loaded.pop("encoder.patch_embed.proj.bias").any()
    whole = sf.load(FILES["mmseg_mask"]).state_dict()
    del whole["encoder.patch_embed.proj.bias"]
    assert same(loaded, whole)


def test_a_training_checkpoint_with_objects_of_mmengine_is_read(tmp_path: Path) -> None:
    content = read_torch(FILES["mmseg_mask"])
    save_with_history(tmp_path / "iter_1000.pth", dict(content))
    loaded, plain = sf.load(tmp_path / "iter_1000.pth"), sf.load(FILES["mmseg_mask"])
    assert same(loaded.state_dict(), plain.state_dict())
    assert loaded.config == plain.config


@pytest.mark.parametrize(
    "meta",
    [
        None,
        "text",
        {"CLASSES": None, "PALETTE": None},
        {"CLASSES": ("a", "b"), "PALETTE": [[0, 0, 0]]},
        {"CLASSES": (1,) * 7, "PALETTE": [[0, 0, 300]] * 7},
        {"dataset_meta": {"classes": 7, "palette": [[0, 0]] * 7}},
    ],
)
def test_classes_of_another_form_are_left_out(meta: Any) -> None:
    state = mmseg.to_ours(read_torch(FILES["mmseg_linear"])["state_dict"])
    config = mmseg.config_from_shapes(state, {}, meta)
    assert (config.class_names, config.palette) == ((), ())


def test_an_unknown_key_keeps_its_name_in_the_error() -> None:
    state = read_torch(FILES["mmseg_mask"])["state_dict"]
    del state["decode_head.dec_proj.bias"]
    state["auxiliary_head.conv_seg.weight"] = torch.ones(2)
    wanted = (
        r"Missing key\(s\) in state_dict: \"decoder\.proj_dec\.bias\"\. \n"
        r"\tUnexpected key\(s\) in state_dict: \"auxiliary_head\.conv_seg\.weight\""
    )
    with pytest.raises(CheckpointError, match=wanted):
        sf.load(state)


def test_head_counts_can_be_given() -> None:
    config = sf.load(FILES["mmseg_mask"], num_heads=4).config
    assert (config.num_heads, config.decoder_num_heads) == (4, 4)
