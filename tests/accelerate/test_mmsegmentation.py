"""mmsegmentation's own models: ``loss``, ``predict``, slide inference and ``accuracy``, before and after one line."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn

import segmenter_fast as sf
from segmenter_fast.accelerate import lazy_functions

for package in ("mmseg", "mmengine", "mmcv"):
    pytest.importorskip(
        package, reason="mmsegmentation, mmengine and mmcv-lite are not installed", exc_type=ImportError
    )
if importlib.util.find_spec("mmcv._ext") is None:  # mmcv-lite: none of these models calls a compiled op
    sys.modules["mmcv._ext"] = MagicMock()

SIDE, CLASSES, IGNORED = 64, 7, 255
WEIGHTS = [0.5, 1, 2, 1, 1, 0.7, 1.5]
LOSSES = {
    "all pixels": {"type": "CrossEntropyLoss"},
    "valid pixels": {"type": "CrossEntropyLoss", "avg_non_ignore": True, "loss_weight": 0.4},
    "weighted": {"type": "CrossEntropyLoss", "class_weight": WEIGHTS},  # refuses ignored labels
}
VIT = {"type": "VisionTransformer", "img_size": (SIDE, SIDE), "embed_dims": 64, "num_heads": 2, "num_layers": 4}
VIT |= {"out_indices": (0, 1, 2, 3), "drop_path_rate": 0.1, "interpolate_mode": "bicubic"}
HEAD = {
    "num_classes": CLASSES,
    "channels": 16,
    "dropout_ratio": 0.0,
    "norm_cfg": {"type": "BN"},
    "align_corners": False,
}
FOUR = {"in_channels": [64] * 4, "in_index": [0, 1, 2, 3]}
MIT = {"type": "MixVisionTransformer", "embed_dims": 16, "num_heads": [1] * 4, "num_layers": [1] * 4}
SEGMENTER = {**HEAD, "type": "SegmenterMaskTransformerHead", "in_channels": 64, "channels": 64, "embed_dims": 64}
SEGMENTER |= {"num_layers": 2, "num_heads": 2, "norm_cfg": {"type": "LN"}}
FCN = {**HEAD, "type": "FCNHead", "in_channels": 64, "num_convs": 1, "in_index": 2, "channels": 16}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]] = {
    "Segmenter": ({**VIT, "out_indices": -1, "final_norm": True}, SEGMENTER, None),
    "Segmenter, linear": ({**VIT, "out_indices": -1}, {**FCN, "num_convs": 0, "channels": 64, "in_index": -1}, None),
    "SegFormer": (MIT, {**HEAD, "type": "SegformerHead", "in_channels": [16] * 4, "in_index": [0, 1, 2, 3]}, None),
    "UPerNet": (VIT, {**HEAD, **FOUR, "type": "UPerHead", "pool_scales": (1, 2)}, FCN),
    "SETR": (VIT, {**HEAD, "type": "SETRUPHead", "in_channels": 64, "in_index": 3, "align_corners": True}, FCN),
}


@pytest.fixture(autouse=True)
def _small_tensors_wait(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from mmengine.registry import DefaultScope

    monkeypatch.setattr(lazy_functions, "FASTER_FROM", {})
    with DefaultScope.overwrite_default_scope("mmseg"):
        yield


def build(name: str, test: dict[str, Any], loss: str = "all pixels") -> nn.Module:
    import mmengine
    import mmseg.models  # noqa: F401  # fills the registry
    from mmseg.registry import MODELS as REGISTRY

    backbone, head, auxiliary = copy.deepcopy(MODELS[name])
    for one in (head, auxiliary):
        if one is not None:
            one["loss_decode"] = LOSSES[loss]
    torch.manual_seed(0)
    preprocessor = {"type": "SegDataPreProcessor", "mean": [127.5] * 3, "std": [127.5] * 3, "size_divisor": 16}
    preprocessor |= {"bgr_to_rgb": True, "pad_val": 0, "seg_pad_val": IGNORED, "test_cfg": {"size_divisor": 16}}
    model = {"type": "EncoderDecoder", "data_preprocessor": preprocessor, "backbone": backbone, "decode_head": head}
    model |= {"auxiliary_head": auxiliary, "train_cfg": {}, "test_cfg": test}
    model = REGISTRY.build(mmengine.ConfigDict(model))
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def data(sizes: list[tuple[int, int]], original: tuple[int, int] | None = None, ignored: bool = True) -> dict[str, Any]:
    """Images and labels as mmsegmentation's loaders give them; the photographs had the ``original`` size."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    generator = torch.Generator().manual_seed(0)
    images, samples = [], []
    for size in sizes:
        images.append(torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator))
        labels = torch.randint(CLASSES, (1, *size), generator=generator)
        labels[:, :9] = IGNORED if ignored else 0
        sample = SegDataSample(metainfo={"img_shape": size, "ori_shape": original or size, "pad_shape": size})
        sample.gt_sem_seg = PixelData(data=labels)
        samples.append(sample)
    return {"inputs": images, "data_samples": samples}


def losses(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """All that a training step reports, and the gradients."""
    torch.manual_seed(1)
    model.zero_grad()
    report = model(**model.data_preprocessor(copy.deepcopy(batch), True), mode="loss")
    total, logged = model.parse_losses(report)
    total.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {**logged, **{name: grad.clone() for name, grad in grads.items()}}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients(name: str, training: bool) -> None:
    for loss in LOSSES:
        model = build(name, {"mode": "whole"}, loss).train(training)
        fast = sf.accelerate(copy.deepcopy(model))
        assert "decode_head" in " ".join(sf.acceleration_report(fast).patch_sized)
        ignored = loss != "weighted"
        batch = data([(SIDE, SIDE), (50, 60) if ignored else (SIDE, SIDE)], ignored=ignored)
        expected, found = losses(model, batch), losses(fast, batch)
        assert found.keys() == expected.keys()
        assert "decode.acc_seg" in found
        largest = max(float(value.abs().max()) for name, value in expected.items() if "." in name)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6 * largest, msg=f"{loss}, {key}")
        assert not sf.made_full_size(fast)


@pytest.mark.parametrize("mode", ["whole", "slide"])
@pytest.mark.parametrize("name", MODELS)
def test_predictions(name: str, mode: str) -> None:
    test = {"mode": mode, "crop_size": (SIDE, SIDE), "stride": (48, 48)} if mode == "slide" else {"mode": mode}
    model = build(name, test).eval()
    fast = sf.accelerate(copy.deepcopy(model))
    size = (SIDE, SIDE) if mode == "whole" else (SIDE, 100)  # SETR takes one size
    for original in (size, (91, 70)):
        expected, found = (m.test_step(copy.deepcopy(data([size], original))) for m in (model, fast))
        for ours, own in zip(found, expected, strict=True):
            assert ours.pred_sem_seg.data.shape == own.pred_sem_seg.data.shape == (1, *original)
            torch.testing.assert_close(ours.seg_logits.data + 0, own.seg_logits.data, rtol=1e-4, atol=1e-5)
            top = own.seg_logits.data.topk(2, 0)[0]
            ties = top[0] - top[1] < 1e-4
            assert torch.equal(ours.pred_sem_seg.data[0][~ties], own.pred_sem_seg.data[0][~ties])


def test_accuracy() -> None:
    """Its ``topk`` of 1 waits, one of several classes takes the logits; both are exact."""
    from mmseg.models.losses import accuracy
    from mmseg.models.utils import resize

    model = build("Segmenter", {"mode": "whole"}).eval()
    fast = sf.accelerate(copy.deepcopy(model))
    images, labels = torch.randn(2, 3, SIDE, SIDE), torch.randint(CLASSES, (2, SIDE, SIDE))
    results = []
    for m in (model, fast):
        logits = resize(m(images), labels.shape[1:], mode="bilinear", align_corners=False)
        single = accuracy(logits, labels, ignore_index=3)
        full = bool(sf.made_full_size(m)) if m is fast else False
        results.append([single, *accuracy(logits, labels, (1, 3)), accuracy(logits, labels, thresh=None)])
        assert not full
    assert results[0] == results[1]
    assert any(call.startswith("topk") for call in sf.made_full_size(fast))
