"""The evaluation against its parts composed by hand: sizes, scales, flips, shares, errors."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import segmenter_fast as sf
from segmenter_fast.inference.settings import Settings
from segmenter_fast.processes import World
from segmenter_fast.train.datasets.base import SampleError
from segmenter_fast.train.evaluation import ConfusionMatrix, evaluate, sample_pictures, segment

CLASSES = 5
PLAIN = Settings(32, 32)
SIZES = ((40, 56), (64, 33), (32, 32))


class Scenes:
    """Random scenes of several sizes, the last of them exactly one window; some pixels are ignored."""

    class_names = tuple("abcde")
    palette = tuple((40 * index, 255 - 40 * index, 0) for index in range(CLASSES))
    ignore_index = 255

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self.images = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
        self.labels = [generator.integers(0, CLASSES, size, dtype=np.uint8) for size in SIZES]
        for labels in self.labels:
            labels[:3] = 255
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        self.reads.append(index)
        return self.images[index], self.labels[index]

    def name(self, index: int) -> str:
        return f"scene/{index}"


@pytest.fixture(scope="module")
def model() -> sf.Segmenter:
    torch.manual_seed(1)
    model = sf.create_model(
        "seg_t_mask_16", num_classes=CLASSES, image_size=32, depth=1, embed_dim=64, num_heads=1, decoder_num_heads=1
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def labels_by_hand(model: sf.Segmenter, image: np.ndarray, scales: tuple[float, ...], flip: bool) -> Tensor:
    """Resized, averaged and resized back by PyTorch's own means, in windows of 32 that do not overlap."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    normalised = (pixels - 0.5) / 0.5
    total = torch.zeros(CLASSES, *image.shape[:2])
    for scale in scales:
        factor = 32 * scale / min(image.shape[:2])
        size = tuple(int(side * factor + 0.5) for side in image.shape[:2])
        for mirrored in (False, True)[: 1 + flip]:
            scaled = F.interpolate(normalised, size=size, mode="bilinear", align_corners=False)
            scaled = scaled.flip(3) if mirrored else scaled
            if min(size) < 32:  # the official program enlarges what is smaller than a window
                height, width = size
                size_ = (32, int(width / height * 32)) if height < width else (int(height / width * 32), 32)
                scaled = F.interpolate(scaled, size=size_, mode="bilinear", align_corners=False)
            logits = F.interpolate(window_mean(model, scaled), size=image.shape[:2], mode="bilinear")[0]
            total += (logits.flip(2) if mirrored else logits).softmax(0)
    return total.argmax(0)


def window_mean(model: sf.Segmenter, image: Tensor, window: int = 32) -> Tensor:
    height, width = image.shape[2:]
    total, count = torch.zeros(1, CLASSES, height, width), torch.zeros(height, width)
    for top in (*range(0, height - window, window), height - window):
        for left in (*range(0, width - window, window), width - window):
            rows, columns = slice(top, top + window), slice(left, left + window)
            total[..., rows, columns] += model(image[..., rows, columns])
            count[rows, columns] += 1
    return total / count


@pytest.mark.parametrize(("scales", "flip"), [((1.0,), False), ((1.0,), True), ((0.5, 1.0, 1.75), True)])
@torch.no_grad()
def test_scores_are_those_of_the_official_composition(
    model: sf.Segmenter, scales: tuple[float, ...], flip: bool
) -> None:
    scenes, expected, told = Scenes(), ConfusionMatrix(CLASSES), []
    for image, target in zip(scenes.images, scenes.labels, strict=True):
        labels = labels_by_hand(model, image, scales, flip)
        found = segment(model, image, target.shape, 32, Settings(32, 32, scales, flip))
        assert found.shape == target.shape
        assert (found != labels).float().mean() < 2e-3  # ties of rounding
        expected.update(labels, torch.from_numpy(target))
    scores = evaluate(model, scenes, 32, Settings(32, 32, scales, flip), progress=lambda *state: told.append(state))
    assert scores.pixels == expected.scores().pixels
    assert scores.iou == pytest.approx(expected.scores().iou, abs=5e-3)
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert scenes.reads == [0, 1, 2]


def test_a_single_window_needs_no_sliding(model: sf.Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segmenter_fast.train.evaluation.slide", None)
    scenes = Scenes()
    with torch.no_grad():
        found = segment(model, scenes.images[2], (32, 32), 32, PLAIN)
    assert found.shape == (32, 32)


@pytest.mark.parametrize("form", ["plain", "inference"])
def test_images_of_one_window_go_in_batches_with_the_same_scores(
    form: str, model: sf.Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes, told, sizes = Scenes(), [], list[int]()
    scenes.images += [image[::-1].copy() for image in scenes.images] + [scenes.images[2].swapaxes(0, 1)]
    scenes.labels += [labels[::-1].copy() for labels in scenes.labels] + [scenes.labels[2]]
    used = model if form == "plain" else model.optimize(torch.float32, compile=False)
    expected, real = evaluate(used, scenes, 32, Settings(32, 32, batch_size=1)), used.segment
    monkeypatch.setattr(used, "segment", lambda images: (sizes.append(len(images)), real(images))[1])
    assert evaluate(used, scenes, 32, PLAIN, progress=lambda done, _: told.append(done)) == expected
    assert sizes == [2, 1]
    assert told == [1, 2, 3, 4, 5, 6, 7]


def test_shares_of_ranks_make_the_whole(model: sf.Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[Tensor] = []
    monkeypatch.setattr(ConfusionMatrix, "all_reduce", lambda matrix: counted.append(matrix.counts))
    scenes = [Scenes() for _ in range(3)]
    whole = evaluate(model, scenes[0], 32, Settings(32, 16))
    for rank in range(2):
        evaluate(model, scenes[1 + rank], 32, Settings(32, 16), World(rank, 2))
    assert [dataset.reads for dataset in scenes] == [[0, 1, 2], [0, 2], [1]]
    assert torch.equal(counted[0], counted[1] + counted[2])
    assert whole.pixels == counted[0].sum()


def test_the_model_is_evaluated_in_evaluation_mode_and_left_as_it_was() -> None:
    torch.manual_seed(0)
    fields = {"depth": 2, "embed_dim": 64, "num_heads": 1, "decoder_num_heads": 1, "dropout": 0.5}
    noisy = sf.create_model("seg_t_mask_16", num_classes=CLASSES, image_size=32, drop_path_rate=0.9, **fields)
    noisy.freeze_encoder().train()
    before = {name: module.training for name, module in noisy.named_modules()}
    assert evaluate(noisy, Scenes(), 32, PLAIN) == evaluate(noisy, Scenes(), 32, PLAIN)
    assert {name: module.training for name, module in noisy.named_modules()} == before
    noisy.train()
    with pytest.raises(SampleError):
        evaluate(noisy, Broken(), 32, PLAIN)
    assert noisy.training


class Broken(Scenes):
    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index == 1:
            raise SampleError("image photo-1.jpg cannot be read: broken")
        return super().read(index)


@pytest.mark.parametrize("read_ahead", [1, 2, 8])
def test_a_broken_image_is_named_and_no_thread_stays(model: sf.Segmenter, read_ahead: int) -> None:
    threads = threading.active_count()
    with pytest.raises(SampleError, match=r"^image photo-1\.jpg cannot be read: broken$"):
        evaluate(model, Broken(), 32, PLAIN, read_ahead=read_ahead)
    assert threading.active_count() == threads


def test_a_label_out_of_range_names_its_sample(model: sf.Segmenter) -> None:
    scenes = Scenes()
    scenes.labels[1][5, 5] = 9
    with pytest.raises(ValueError, match=r"^scene/1: target must lie within 0 to 4.*got 9 to 9"):
        evaluate(model, scenes, 32, PLAIN)


def test_other_classes_and_no_images_are_refused(model: sf.Segmenter) -> None:
    scenes = Scenes()
    scenes.class_names = tuple("abc")
    with pytest.raises(ValueError, match="the model has 5 classes and the data set 3"):
        evaluate(model, scenes, 32, PLAIN)
    with pytest.raises(ValueError, match="the model has 5 classes and the data set 3"):
        sample_pictures(model, scenes, [0], 32, PLAIN)
    empty = Scenes()
    empty.images = []
    with pytest.raises(ValueError, match="no images"):
        evaluate(model, empty, 32, PLAIN)


def test_a_scale_that_leaves_no_pixel_is_refused(model: sf.Segmenter) -> None:
    with pytest.raises(ValueError, match=r"at least one pixel of the resized smaller side, got 1\.0, 0\.01 of 32"):
        evaluate(model, Scenes(), 32, Settings(32, 32, (1.0, 0.01)))


def test_pictures_of_samples(model: sf.Segmenter) -> None:
    scenes = Scenes()
    pictures = sample_pictures(model, scenes, [2, 0], 32, PLAIN)
    assert list(pictures) == ["scene/2", "scene/0"]
    height, width = SIZES[0]
    factor = max(192 // max(height, width), 1)
    image = scenes.images[0].repeat(factor, 0).repeat(factor, 1)
    picture = np.asarray(pictures["scene/0"])
    assert picture.shape[0] > len(image) + 2 * 14  # titles above, the legend below
    assert np.array_equal(picture[21 : 21 + len(image), : image.shape[1]], image)
