"""The configuration in a checkpoint of mmsegmentation is read, never executed, and gives the labels of its model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import segmenter_fast as sf
from segmenter_fast.weights.mmseg_config import _UNREAD, parse, read_stated
from segmenter_fast.weights.reading import CheckpointError, read_torch
from support.checkpoints import GOLDEN
from support.mmseg_lookalike import MmEncoderDecoder

GOLDEN_FILE = GOLDEN / "mmseg_mask" / "segmenter.pth"

# As mmengine writes it.
CONFIG = """
crop_size = (
    64,
    64,
)
data_preprocessor = dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], type='SegDataPreProcessor')
env_cfg = dict(cudnn_benchmark=True, dist_cfg=dict(backend='nccl'))
model = dict(
    backbone=dict(
        drop_path_rate=0.2, embed_dims=128, final_norm=True, img_size=(64, 64),
        interpolate_mode='bilinear', norm_cfg=dict(eps=0.001, requires_grad=True, type='LN'),
        num_heads=2, num_layers=2, patch_size=16, type='VisionTransformer', with_cls_token=True),
    data_preprocessor=dict(
        bgr_to_rgb=True, mean=[123.675, 116.28, 103.53], pad_val=0, std=[58.395, 57.12, 57.375],
        type='SegDataPreProcessor'),
    decode_head=dict(
        dropout_ratio=0.0, embed_dims=128, in_channels=128, num_classes=7, num_heads=2, num_layers=1,
        loss_decode=dict(loss_weight=1.0, type='CrossEntropyLoss', use_sigmoid=False),
        type='SegmenterMaskTransformerHead'),
    test_cfg=dict(crop_size=(64, 64), mode='slide', stride=(40, 40)),
    type='EncoderDecoder')
param_scheduler = [dict(begin=0, by_epoch=False, type='PolyLR')]
test_cfg = dict(type='TestLoop')
"""


def checkpoint(config: str | None, path: Path, key: str = "cfg") -> Path:
    content = read_torch(GOLDEN_FILE)
    torch.save({**content, "meta": {**content["meta"], key: config}}, path)
    return path


def load_silently(path: Path) -> sf.Segmenter:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return sf.load(path)


def test_every_value_reaches_the_model(tmp_path: Path) -> None:
    config = load_silently(checkpoint(CONFIG, tmp_path / "a.pth")).config
    assert config.mean == pytest.approx((0.485, 0.456, 0.406))
    assert config.std == pytest.approx((0.229, 0.224, 0.225))
    assert (config.window_size, config.window_stride) == (64, 40)
    assert (config.encoder_norm_eps, config.decoder_norm_eps) == (1e-3, 1e-5)
    assert (config.pos_embed_mode, config.image_size) == ("bilinear", (64, 64))
    assert (config.num_heads, config.decoder_num_heads) == (2, 2)
    assert (config.drop_path_rate, config.decoder_drop_path_rate, config.dropout) == (0.2, 0.1, 0.0)
    assert config.class_names[0] == "thing 0"
    assert (config.upsample_to, config.upscale_small_images) == ("image", False)


def predict_as_mmsegmentation(image: np.ndarray, mean: Any, std: Any, rgb: bool, encoder_eps: float) -> torch.Tensor:
    """Labels of the golden's model for an RGB image, by mmsegmentation's steps: its images are read as BGR."""
    model = MmEncoderDecoder().eval()
    model.load_state_dict(read_torch(GOLDEN_FILE)["state_dict"])
    for module in model.backbone.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = encoder_eps
    pixels = torch.from_numpy(image[:, :, ::-1].copy()).permute(2, 0, 1)
    pixels = pixels[[2, 1, 0]] if rgb else pixels
    pixels = (pixels.float() - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        return model(pixels[None]).argmax(1)[0]


@pytest.mark.parametrize("rgb", [True, False])
def test_labels_are_those_of_mmsegmentation(rgb: bool, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    smooth = F.interpolate(torch.rand(1, 3, 8, 8, generator=generator), (64, 64), mode="bilinear")[0]
    image = (smooth * 255).byte().permute(1, 2, 0).numpy()
    config = CONFIG if rgb else CONFIG.replace("bgr_to_rgb=True, mean=[123", "mean=[123")
    wanted = predict_as_mmsegmentation(image, [123.675, 116.28, 103.53], [58.395, 57.12, 57.375], rgb, 1e-3)
    labels = torch.as_tensor(sf.predict(load_silently(checkpoint(config, tmp_path / "a.pth")), image).labels)
    assert (labels == wanted).float().mean() > 0.999
    with pytest.warns(UserWarning, match="without a configuration"):
        assumed = sf.load(GOLDEN_FILE)
    assert (torch.as_tensor(sf.predict(assumed, image).labels) != wanted).float().mean() > 0.3


def test_the_older_format_has_img_norm_cfg(tmp_path: Path) -> None:
    older = "img_norm_cfg = dict(mean=[1, 2, 3], std=[10, 20, 30], to_rgb=True)\n" + CONFIG.replace(
        "data_preprocessor=dict", "other=dict"
    ).replace("data_preprocessor = dict", "other = dict")
    config = load_silently(checkpoint(older, tmp_path / "a.pth", "config")).config
    assert config.mean == pytest.approx((1 / 255, 2 / 255, 3 / 255))
    assert config.std == pytest.approx((10 / 255, 20 / 255, 30 / 255))


def test_absent_entries_have_the_defaults_of_mmsegmentation(tmp_path: Path) -> None:
    short = "model = dict(backbone=dict(type='VisionTransformer', num_heads=2), decode_head=dict(num_heads=2), "
    short += "data_preprocessor=dict(type='SegDataPreProcessor', bgr_to_rgb=True))"
    config = load_silently(checkpoint(short, tmp_path / "a.pth")).config
    assert (config.mean, config.std) == ((0, 0, 0), (1 / 255,) * 3)  # without a mean it normalises nothing
    assert (config.encoder_norm_eps, config.drop_path_rate) == (1e-5, 0.0)
    assert (config.window_size, config.window_stride) == (4096, 4096)  # the whole image


@pytest.mark.parametrize(
    ("before", "after", "note"),
    [
        ("stride=(40, 40)", "stride=(40, 20)", "test_cfg {"),
        ("interpolate_mode='bilinear'", "interpolate_mode='nearest'", "backbone.interpolate_mode 'nearest'"),
        ("with_cls_token=True", "with_cls_token=False", "backbone.with_cls_token False"),
        ("dropout_ratio=0.0", "align_corners=True", "decode_head.align_corners True"),
        (
            "std=[58.395, 57.12, 57.375]",
            "std=[58.395, 57.12]",
            "mean, std ([123.675, ",
        ),
        ("eps=0.001", "eps=tiny", "backbone.norm_cfg.eps that is no literal"),
        ("type='VisionTransformer'", "type='OurTransformer'", "backbone.type 'OurTransformer'"),
        ("drop_path_rate=0.2", "drop_path_rate='high'", "backbone.drop_path_rate 'high'"),
    ],
)
def test_what_cannot_be_followed_is_told(before: str, after: str, note: str, tmp_path: Path) -> None:
    assert before in CONFIG
    with pytest.warns(UserWarning, match="labels will differ") as caught:
        sf.load(checkpoint(CONFIG.replace(before, after), tmp_path / "a.pth"))
    (warning,) = caught
    assert f"labels will differ from mmsegmentation's, because its configuration has {note}" in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.parametrize("config", [None, "", "model = 3", "model = dict(", "x" * (1 << 20) + "= 1", "\0", 5])
def test_a_configuration_that_cannot_be_read_is_told(config: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"without a configuration that can be read: mean \(0\.5, .* override"):
        sf.load(checkpoint(config, tmp_path / "a.pth"))


@pytest.mark.parametrize("entry", ["num_heads=0", "num_heads=True", "num_heads=3"])
def test_a_value_out_of_range_names_the_field(entry: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a\.pth: num_heads must be"):
        sf.load(checkpoint(CONFIG.replace("num_heads=2", entry, 1), tmp_path / "a.pth"))


def test_only_literals_are_read() -> None:
    text = "import os\na = [1, -2.5, 'x', None, (True,)]\nb = dict(c=a, d={'e': 1, f(): 2}, **a)\ng = a\n"
    text += "h = os.system('touch x')\nif True:\n    i = 1\na.j = 1\nk = dict(c=[open('x')])\nl = 2 ** 9 ** 9\n"
    assert parse(text) == {
        "a": [1, -2.5, "x", None, [True]],
        "b": {"c": [1, -2.5, "x", None, [True]], "d": {"e": 1}},
        "g": [1, -2.5, "x", None, [True]],
        "h": _UNREAD,
        "k": {"c": [_UNREAD]},
        "l": _UNREAD,
    }


@pytest.mark.parametrize("text", ["a = " + "[" * 5000, "a = " + "-" * 100_000 + "1", "a = 1" + "+ 1" * 50_000, "a = ("])
def test_hostile_texts_are_left(text: str) -> None:
    assert parse(text).get("a", _UNREAD) is _UNREAD
    assert read_stated({"cfg": text}, True) is None
