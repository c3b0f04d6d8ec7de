"""Inference on a GPU: CUDA graphs of all kinds of images, evaluation, a device that is not the current one, export."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import cpp_extension

import segmenter_fast as sf
from segmenter_fast.export import export
from segmenter_fast.graphs import MOST_GRAPHS
from segmenter_fast.inference.settings import Settings
from segmenter_fast.inference_segmenter import InferenceSegmenter
from segmenter_fast.train.evaluation import ConfusionMatrix, evaluate
from support.models import normalised, pixels, windowed
from support.threads import in_threads
from support.training import Squares

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images of noise: normalised ones, or uint8 ones."""
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=dtype, device=DEVICE)
    return torch.randn(shape, device=DEVICE).to(dtype)


def models(dtype: torch.dtype = torch.float32) -> tuple[InferenceSegmenter, InferenceSegmenter]:
    """One inference form with graphs and one without."""
    model = windowed(depth=2).to(DEVICE)
    return tuple(model.optimize(dtype, compile=False, cuda_graph=graph) for graph in (True, False))


def agree(found: Tensor, wanted: Tensor) -> None:
    """Labels but for ties: a captured product may run another algorithm."""
    assert len(wanted.unique()) > 1
    assert (found == wanted).float().mean() > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_predict_and_segment_take_turns(dtype: torch.dtype) -> None:
    fast, plain = models(dtype)
    image, images = pixels(45, 70), draw(2, 3, 32, 32)
    for _ in range(2):
        assert (sf.predict(fast, image).labels == sf.predict(plain, image).labels).mean() > 0.999
        agree(fast.segment(images), plain.segment(images))
    with torch.inference_mode():
        agree(fast.segment(images), plain.segment(images))


def test_graphs_of_every_kind_of_image() -> None:
    for dtype in FLOATS[:3]:
        fast, plain = models(dtype)
        for kind in (*FLOATS, torch.uint8):
            for _ in range(2):
                images = draw(2, 3, 40, 56, dtype=kind)
                agree(fast.segment(images), plain.segment(images))
                torch.testing.assert_close(fast(images), plain(images), rtol=0.02, atol=0.02)
        assert len(fast._graphs) == MOST_GRAPHS


def test_graphs_outlive_what_they_were_made_with() -> None:
    """More grids than a model keeps embeddings for; the graph of the first stays in use all the time."""
    fast, plain = models()
    images = draw(1, 3, 48, 48)
    wanted = plain.masks(images)
    for columns in range(1, 71):
        other = draw(1, 3, 16, 16 * columns)
        torch.testing.assert_close(fast.masks(other), plain.masks(other), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(fast.masks(images), wanted, rtol=1e-3, atol=1e-3)
    assert len(fast._graphs) == MOST_GRAPHS


def test_evicted_graphs_give_their_memory_back() -> None:
    fast, _ = models()
    reserved = []
    for _ in range(3):
        for side in range(64, 64 + 32 * (MOST_GRAPHS + 2), 32):
            fast.segment(draw(4, 3, side, side))
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved(DEVICE))
    assert reserved[2] <= 1.1 * reserved[1], reserved


def test_threads_get_their_own_labels() -> None:
    fast, _ = models()
    images = [draw(1, 3, 64, 64) for _ in range(4)]
    wanted = [fast.segment(one) for one in images]
    assert not any(torch.equal(wanted[0], other) for other in wanted[1:])
    torch.cuda.synchronize()

    def work(thread: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
            wrong = sum((fast.segment(images[thread]) != wanted[thread]).sum() for _ in range(100))
            assert wrong == 0

    in_threads(work)


def test_autocast_around_graphs() -> None:
    fast, plain = models()
    images = draw(1, 3, 64, 64)
    exact = plain.masks(images)
    for _ in range(2):
        torch.testing.assert_close(fast.masks(images), exact, rtol=1e-4, atol=1e-4)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            low = fast.masks(images)
            torch.testing.assert_close(low, plain.masks(images), rtol=1e-2, atol=1e-2)
        assert not torch.allclose(low.float(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [Settings(32, 24), Settings(32, 32, scales=(0.5, 1.0), flip=True)])
def test_evaluation_gives_the_scores_of_the_cpu(settings: Settings) -> None:
    model, data = windowed(num_classes=2), Squares(6)
    wanted = evaluate(model, data, 64, settings)
    found = evaluate(model.to(DEVICE), data, 64, settings)
    assert found.pixels == wanted.pixels
    assert found.aacc == pytest.approx(wanted.aacc, abs=0.01)
    assert found.iou == pytest.approx(wanted.iou, abs=0.01)


def test_the_confusion_matrix_counts_as_on_the_cpu() -> None:
    prediction, target = torch.randint(0, 7, (2, 2, 50, 60))
    target[:, :5] = 255
    matrices = [ConfusionMatrix(7, device) for device in ("cpu", DEVICE)]
    for matrix in matrices:
        matrix.update(prediction.to(matrix.counts.device), target)
    assert torch.equal(matrices[0].counts, matrices[1].counts.cpu())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one() -> None:
    """Operators, their gradients, graphs, compiled or not, and evaluation, on the last GPU."""
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    model, images, target = windowed(num_classes=2), torch.randn(2, 3, 40, 56), torch.randint(0, 2, (2, 40, 56))
    losses, norms, labels = [], [], []
    for device in (torch.device("cpu"), last):
        model.to(device).zero_grad()
        loss = model.loss(images.to(device), target.to(device))
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.get_total_norm([one.grad for one in model.parameters()]).item())
        labels.append(model.segment(images.to(device)).cpu())
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)
    for compile in (False, True):
        fast = model.optimize(torch.float32, compile=compile)
        labels += [fast.segment(images.to(last)).cpu() for _ in range(2)]
    for found in labels[1:]:
        assert (found == labels[0]).float().mean() > 0.99
    assert torch.cuda.current_device() != last.index


@pytest.mark.skipif(
    not cpp_extension.CUDA_HOME or not shutil.which("g++"), reason="needs a toolkit of CUDA (CUDA_HOME) and g++"
)
def test_an_exported_package_gives_the_labels(tmp_path: Path) -> None:
    model, path = windowed().to(DEVICE), tmp_path / "model.pt2"
    found = export(model, path, size=(40, 56), batch_size=None, uint8=True)
    assert found.pixels == 3 * 40 * 56
    package = torch._inductor.aoti_load_package(str(path))
    images = draw(4, 3, 40, 56, dtype=torch.uint8)
    labels = package(images)
    assert labels.device == DEVICE
    agree(labels, model.segment(normalised(model.cpu(), images.cpu()).to(DEVICE)))
