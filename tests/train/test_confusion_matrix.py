"""The confusion matrix against torchmetrics, by hand, and over two processes."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segmenter_fast.train.evaluation import ConfusionMatrix


def maps(seed: int, classes: int, drawn_from: int) -> tuple[Tensor, Tensor]:
    """Predictions and labels of two images; some classes may be missing, some pixels are ignored."""
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randint(drawn_from, (2, 9, 11), generator=generator)
    target = torch.randint(classes, (2, 9, 11), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    return prediction, target


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 40), st.integers(1, 40))
def test_agrees_with_torchmetrics(seed: int, classes: int, drawn_from: int) -> None:
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    batches = [maps(seed + index, classes, min(drawn_from, classes)) for index in range(2)]
    matrix = ConfusionMatrix(classes)
    options = {"num_classes": classes, "ignore_index": 255}
    peers = {
        "miou": MulticlassJaccardIndex(average="macro", **options),
        "iou": MulticlassJaccardIndex(average="none", **options),
        "aacc": MulticlassAccuracy(average="micro", **options),
        "accuracy": MulticlassAccuracy(average="none", **options),
    }
    for prediction, target in batches:
        matrix.update(prediction.to(torch.uint8), target)
        for peer in peers.values():
            peer.update(prediction, target)
    scores = matrix.scores()
    assert scores.miou == pytest.approx(peers["miou"].compute().item(), abs=1e-6)
    assert scores.aacc == pytest.approx(peers["aacc"].compute().item(), abs=1e-6)
    for name in ("iou", "accuracy"):
        own = [0.0 if value is None else value for value in getattr(scores, name)]
        assert own == pytest.approx(peers[name].compute().tolist(), abs=1e-6)
    occurring = torch.cat([target for _, target in batches]).unique().tolist()
    means = [peers["accuracy"].compute()[index].item() for index in occurring if index != 255]
    assert scores.macc == pytest.approx(np.mean(means), abs=1e-6)
    assert scores.pixels == sum(int((target != 255).sum()) for _, target in batches)


def test_values_by_hand() -> None:
    matrix = ConfusionMatrix(4)
    #                     right   1 for 0  ignored  right   2 for 1
    matrix.update(torch.tensor([[0, 1, 3, 1, 2]]), torch.tensor([[0, 0, 255, 1, 1]]))
    scores = matrix.scores()
    assert scores.iou == (1 / 2, 1 / 3, 0.0, None)  # class 3 was predicted on an ignored pixel only
    assert scores.accuracy == (1 / 2, 1 / 2, None, None)
    assert (scores.miou, scores.macc, scores.aacc) == (pytest.approx(5 / 18), 0.5, 0.5)
    assert scores.iou[3] is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_label_dtypes(dtype: torch.dtype) -> None:
    prediction, target = maps(3, 6, 6)
    narrow, wide = ConfusionMatrix(6), ConfusionMatrix(6)
    narrow.update(prediction.to(dtype), target.to(dtype))
    wide.update(prediction, target)
    assert torch.equal(narrow.counts, wide.counts)
    assert narrow.counts.dtype == torch.int64


def test_another_ignore_index_and_negative_ones() -> None:
    matrix = ConfusionMatrix(3, ignore_index=-1)
    matrix.update(torch.tensor([[0, 2]]), torch.tensor([[0, -1]]))
    assert matrix.counts.sum() == 1


@pytest.mark.parametrize(
    ("prediction", "target", "error", "message"),
    [
        ([[0, 1]], [[0, 150]], ValueError, "target must lie within 0 to 3.*got 150 to 150"),
        ([[0, 1]], [[-2, 0]], ValueError, "target must lie .*got -2 to -2"),
        ([[4, 9]], [[0, 0]], ValueError, "prediction must lie .*got 4 to 9"),
        ([[0, 1]], [[0]], ValueError, r"shape, \(1, 1\), got \(1, 2\)"),
        ([[0.0, 1.0]], [[0, 1]], TypeError, "prediction must hold integers, got torch.float32"),
    ],
)
def test_bad_values(prediction: list, target: list, error: type[Exception], message: str) -> None:
    matrix = ConfusionMatrix(4)
    with pytest.raises(error, match=message):
        matrix.update(torch.tensor(prediction), torch.tensor(target))
    assert not matrix.counts.any()


def test_nothing_labelled() -> None:
    matrix = ConfusionMatrix(2)
    matrix.update(torch.zeros(1, 2, 2, dtype=torch.uint8), torch.full((1, 2, 2), 255))
    with pytest.raises(ValueError, match="at least one labelled pixel"):
        matrix.scores()


def reduce_rank(rank: int, rendezvous: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    matrix = ConfusionMatrix(5)
    matrix.update(*maps(rank, 5, 5))
    matrix.all_reduce()
    torch.save(matrix.counts, f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_sums_over_ranks(tmp_path: Path) -> None:
    matrix = ConfusionMatrix(5)
    for rank in range(2):
        matrix.update(*maps(rank, 5, 5))
    alone = matrix.counts.clone()
    matrix.all_reduce()  # a single process: nothing to do
    assert torch.equal(matrix.counts, alone)
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=reduce_rank, args=(i, str(tmp_path / "meet"), str(tmp_path))) for i in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), alone)
