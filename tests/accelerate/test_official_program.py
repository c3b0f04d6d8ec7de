"""The official program's own training and evaluation, unchanged, before and after one line; programs built on it too.

The program is no package: its checkout is to be on PYTHONPATH (https://github.com/rstrudel/segmenter, or those of ALGM
and G2TM, with their folders ``algm`` and ``g2tm``), and einops and requests installed.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn

import segmenter_fast as sf
from segmenter_fast.accelerate import lazy_functions

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip(
        "segm.model.decoder",
        reason="the official program, einops or requests is not on PYTHONPATH",
        exc_type=ImportError,
    )

pytestmark = pytest.mark.filterwarnings("ignore:.* made the logits", "ignore::FutureWarning")
CLASSES, WINDOW = 5, 64
NET = {"image_size": (WINDOW, WINDOW), "patch_size": 16, "d_model": 128, "n_heads": 2, "n_layers": 4}
NET |= {"normalization": "vit", "distilled": False, "backbone": "vit_tiny_patch16_384", "dropout": 0.0}
NET |= {"drop_path_rate": 0.1, "n_cls": CLASSES}
MERGING: list[tuple[str, str, dict[str, Any]]] = [
    ("algm", "algm_segmenter_patch", {"selected_layers": [1, 3], "trace_source": True}),
    ("g2tm", "graph_segmenter_patch", {"selected_layer": 2, "threshold": 0.9, "prop_attn": True}),
]
DECODERS = {
    "mask": {"name": "mask_transformer", "n_layers": 2, "drop_path_rate": 0.0, "dropout": 0.1},
    "linear": {"name": "linear"},
}


def counted_iou(results: list[Any], gt_seg_maps: list[Any], num_classes: int, ignore_index: int) -> dict[str, Any]:
    """mmsegmentation 0.x's metric, which is no longer in it."""
    table = np.zeros((num_classes, num_classes))
    for found, labels in zip(results, gt_seg_maps, strict=True):
        valid = labels != ignore_index
        np.add.at(table, (labels[valid], found[valid]), 1)
    right, rows, columns = table.diagonal(), table.sum(1), table.sum(0)
    return {"aAcc": right.sum() / table.sum(), "Acc": right / rows, "IoU": right / (rows + columns - right)}


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The module ``segm.engine`` on a CPU, one process, with what newer packages no longer have."""
    monkeypatch.setattr(lazy_functions, "FASTER_FROM", {})
    for name, stand_in in (
        ("mmseg.core", MagicMock(mean_iou=counted_iou)),
        ("segm.data.base", MagicMock(BaseMMSeg=object)),
    ):
        monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.setattr(np, "float", float, raising=False)
    for name in ("synchronize", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    monkeypatch.setattr(Tensor, "cuda", Tensor.to)
    monkeypatch.setenv("DATASET", str(tmp_path))
    engine = importlib.import_module("segm.engine")
    monkeypatch.setattr(importlib.import_module("segm.utils.torch"), "device", torch.device("cpu"))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield engine
    dist.destroy_process_group()


def build(decoder: str, patched: bool = False) -> nn.Module:
    """A model of random weights, far from uniform; with the token merging of ALGM or G2TM if ``patched``."""
    from segm.model.factory import create_decoder
    from segm.model.segmenter import Segmenter
    from segm.model.vit import VisionTransformer

    torch.manual_seed(0)
    options = {key: value for key, value in NET.items() if key not in ("normalization", "backbone", "n_cls")}
    encoder = VisionTransformer(**options, d_ff=4 * NET["d_model"], n_cls=10)
    model = Segmenter(encoder, create_decoder(encoder, {**DECODERS[decoder], "n_cls": CLASSES}), CLASSES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    if patched:
        merging()(model)
    return model


def merging() -> Any:
    """ALGM's or G2TM's change of a model."""
    for package, function, options in MERGING:
        with contextlib.suppress(ImportError):
            return partial(getattr(importlib.import_module(f"{package}.patch"), function), **options)
    return pytest.skip("neither ALGM's folder algm nor G2TM's folder g2tm is on PYTHONPATH")


class Batches(list[dict[str, Any]]):
    """Batches as the program's loader gives them."""

    n_cls = CLASSES

    @property
    def unwrapped(self) -> Batches:
        return self

    def set_epoch(self, epoch: int) -> None:
        pass


def trained(program: Any, model: nn.Module) -> dict[str, Tensor]:
    """The weights after an epoch of three steps."""
    generator = torch.Generator().manual_seed(0)
    batches = Batches()
    for _ in range(3):
        labels = torch.randint(CLASSES, (2, WINDOW, WINDOW), generator=generator)
        labels[:, :9] = 255
        batches.append({"im": torch.randn(2, 3, WINDOW, WINDOW, generator=generator), "segmentation": labels})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    torch.manual_seed(1)
    writer = {"writer": MagicMock()} if "writer" in inspect.signature(program.train_one_epoch).parameters else {}
    program.train_one_epoch(model, batches, optimizer, MagicMock(), 0, contextlib.nullcontext, None, **writer)
    return model.state_dict()


@pytest.mark.parametrize("decoder", DECODERS)
def test_training(program: Any, decoder: str) -> None:
    model = build(decoder)
    fast = sf.accelerate(copy.deepcopy(model))
    before = copy.deepcopy(model.state_dict())
    expected, found = trained(program, model), trained(program, fast)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()), msg=key)
    assert any(not torch.equal(value, before[key]) for key, value in expected.items())
    assert not sf.made_full_size(fast)


@pytest.mark.parametrize("decoder", DECODERS)
def test_evaluation(program: Any, decoder: str) -> None:
    """Windows, flips and scales of ``inference``, labels and the mean IoU of two photographs."""
    model = build(decoder).eval()
    fast = sf.accelerate(copy.deepcopy(model))
    generator, photographs, truth = torch.Generator().manual_seed(0), Batches(), {}
    for name, shape in (("a", (70, 91)), ("b", (64, 64))):
        images = [torch.randn(1, 3, *shape, generator=generator), torch.randn(1, 3, 50, 70, generator=generator)]
        metas = [{"flip": flip, "ori_shape": torch.tensor(shape), "ori_filename": [name]} for flip in (False, True)]
        photographs.append({"im": images, "im_metas": metas})
        truth[name] = torch.randint(CLASSES, shape, generator=generator).numpy()
    scores = []
    for m in (model, fast):
        log = program.evaluate(m, photographs, truth, WINDOW, 48, contextlib.nullcontext)
        scores.append({name: meter.value for name, meter in log.meters.items()})
    assert scores[0] == pytest.approx(scores[1], abs=0.05)
    assert scores[0]["mean_iou"] > 0


@pytest.mark.parametrize("training", [False, True])
def test_models_with_merged_tokens(program: Any, training: bool) -> None:
    model = build("mask", patched=True).train(training)  # G2TM's own linear decoder fails
    fast = sf.accelerate(copy.deepcopy(model))
    images, labels = torch.randn(1, 3, WINDOW, WINDOW), torch.randint(CLASSES, (1, WINDOW, WINDOW))
    results = []
    for m in (model, fast):
        torch.manual_seed(1)
        logits = m(images)
        nn.functional.cross_entropy(logits, labels).backward()
        results.append((logits.argmax(1), {name: p.grad for name, p in m.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(*[grads for _, grads in results], rtol=1e-3, atol=1e-5)
    assert torch.equal(*[labels for labels, _ in results])


@pytest.mark.parametrize("decoder", DECODERS)
def test_checkpoints_load(decoder: str, tmp_path: Path) -> None:
    """The program's ``checkpoint.pth`` and ``variant.yml``; merging has no weights of its own."""
    model = build(decoder).eval()
    torch.save({"model": model.state_dict(), "n_cls": CLASSES, "epoch": 3}, tmp_path / "checkpoint.pth")
    data = {"dataset": "ade20k", "image_size": WINDOW, "crop_size": WINDOW, "normalization": "vit"}
    variant = {"net_kwargs": {**NET, "decoder": {**DECODERS[decoder], "n_cls": CLASSES}}, "dataset_kwargs": data}
    variant |= {"inference_kwargs": {"im_size": WINDOW, "window_size": WINDOW, "window_stride": WINDOW}}
    (tmp_path / "variant.yml").write_text(yaml.dump(variant))
    loaded, images = sf.load(tmp_path).eval(), torch.randn(2, 3, 50, 71)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images), rtol=1e-4, atol=1e-4)
