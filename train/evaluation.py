"""The official evaluation: every image resized, segmented by sliding windows, and compared at its labels' own size.

Source: the official program's evaluation, and mmsegmentation's multi-scale test: each scale is resized from the image
itself, and the probabilities of all scales, plain and mirrored, are averaged.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from segmenter_fast import Segmenter
from segmenter_fast.inference.settings import Settings, fits_one_window
from segmenter_fast.inference.slide import slide
from segmenter_fast.io.images import normalise

from .datasets.base import SegmentationDataset
from .metrics import ConfusionMatrix, Scores
from .pictures import side_by_side

MULTISCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""The paper's scales, which it takes plain and mirrored."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Inference:
    """How one image is segmented.

    Images of the data set are uint8 RGB; their pixels are normalised as the model's configuration says.

    Args:
        resize: pixels that the image's smaller side is resized to.
        window: side of the square windows, pixels.
        stride: pixels from one window to the next.
        scales: factors of ``resize`` whose probabilities are averaged.
        flip: whether every scale is segmented mirrored, too.
        batch_size: windows that go through the model at once.

    Raises:
        ValueError: a number out of its range, naming it.
    """

    resize: int
    window: int
    stride: int
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    batch_size: int = 2

    def __post_init__(self) -> None:
        Settings(self.window, self.stride, batch_size=self.batch_size)
        if not self.scales or not all(0 < scale < float("inf") and self.resize * scale >= 1 for scale in self.scales):
            raise ValueError(
                "scales must be positive, finite and leave at least one pixel of the resized smaller side, "
                f"got {', '.join(map(str, self.scales)) or 'none'} of {self.resize} pixels"
            )

    def segment(self, model: Segmenter, image: np.ndarray, size: tuple[int, int]) -> Tensor:
        """``(H, W, 3)`` uint8 RGB -> labels ``size`` on the model's device."""
        config = model.config
        whole = normalise(image, config.mean, config.std, next(model.parameters()).device)
        images, flips = [], []
        for scale in self.scales:
            scaled = _resized(whole, int(self.resize * scale))
            images += [scaled, scaled.flip(3)] if self.flip else [scaled]
            flips += [False, True] if self.flip else [False]
        if len(images) == 1 and tuple(images[0].shape[2:]) == size and fits_one_window(model, size, self.window):
            return model.segment(images[0])[0]
        return slide(model, images, flips, size, self.window, self.stride, self.batch_size)


def _resized(images: Tensor, smaller_side: int) -> Tensor:
    """``(1, 3, H, W)``, bilinear to this smaller side; the other is rounded to the nearest pixel, as mmcv does."""
    factor = smaller_side / min(images.shape[2:])
    size = tuple(int(side * factor + 0.5) for side in images.shape[2:])
    if size == images.shape[2:]:
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


@torch.inference_mode()
def evaluate(
    model: Segmenter,
    dataset: SegmentationDataset,
    resize: int,
    window: int,
    stride: int,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress | None = None,
    batch_size: int = 2,
    read_ahead: int = 2,
) -> Scores:
    """The scores of a model, in evaluation mode, on a whole data set; the same on every rank.

    Every rank takes each ``world_size``-th image, and the counts are summed once, so ranks need no equal shares. The
    model must be whole on each rank: one whose parameters are sharded would wait for ranks that have nothing left.

    Args:
        resize, window, stride, scales, flip, batch_size: see ``Inference``.
        progress: told how many images of this rank's share are done, and how many it has.
        read_ahead: images that are read in the background while the model runs.

    Raises:
        ValueError: a model and a data set of different class counts, an empty data set, labels out of range (naming
            the sample), no labelled pixel at all, or a setting out of range.
        OSError: a sample that cannot be read, naming its file.
    """
    inference = Inference(resize, window, stride, tuple(scales), flip, batch_size)
    check_classes(model, dataset)
    if not len(dataset):
        raise ValueError("the data set has no images to evaluate on")
    matrix = ConfusionMatrix(model.config.num_classes, next(model.parameters()).device, dataset.ignore_index)
    share = range(rank, len(dataset), world_size)
    for done, (index, image, target) in enumerate(_evaluated(model, dataset, share, read_ahead), 1):
        labels = inference.segment(model, image, (target.shape[0], target.shape[1]))
        try:
            matrix.update(labels, torch.from_numpy(target))
        except ValueError as error:
            raise ValueError(f"{dataset.name(index)}: {error}") from error
        if progress is not None:
            progress(done, len(share))
    matrix.all_reduce()
    return matrix.scores()


@torch.inference_mode()
def sample_pictures(
    model: Segmenter, dataset: SegmentationDataset, indices: Iterable[int], inference: Inference
) -> dict[str, Image.Image]:
    """Image, labels and prediction side by side for some samples of a data set, by the samples' names.

    Raises:
        ValueError: a model and a data set of different class counts.
        OSError: a sample that cannot be read, naming its file.
    """
    check_classes(model, dataset)
    pictures = {}
    for index, image, target in _evaluated(model, dataset, indices, read_ahead=0):
        labels = inference.segment(model, image, (target.shape[0], target.shape[1])).cpu().numpy()
        if image.shape[:2] != labels.shape:
            image = np.asarray(Image.fromarray(image).resize(labels.shape[::-1]))
        pictures[dataset.name(index)] = side_by_side(image, target, labels, dataset.palette, dataset.ignore_index)
    return pictures


def check_classes(model: Segmenter, dataset: SegmentationDataset) -> None:
    """Whether the model and the data set have as many classes.

    Raises:
        ValueError: they have not.
    """
    own, needed = model.config.num_classes, len(dataset.class_names)
    if own != needed:
        raise ValueError(
            f"the model has {own} classes and the data set {needed}; evaluate it on the data that it was trained for, "
            "or check the list of classes"
        )


def _evaluated(
    model: Segmenter, dataset: SegmentationDataset, indices: Iterable[int], read_ahead: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Index, image and labels of the samples, while the model is in evaluation mode."""
    training = model.training
    model.eval()
    try:
        yield from _read(dataset, indices, read_ahead)
    finally:
        model.train(training)


def _read(
    dataset: SegmentationDataset, indices: Iterable[int], read_ahead: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The samples in order, read by threads up to ``read_ahead`` before their turn."""
    if not read_ahead:
        yield from ((index, *dataset.read(index)) for index in indices)
        return
    left = iter(indices)
    with ThreadPoolExecutor(read_ahead) as pool:
        waiting: deque[tuple[int, Future[tuple[np.ndarray, np.ndarray]]]] = deque()
        try:
            for index in itertools.islice(left, read_ahead):
                waiting.append((index, pool.submit(dataset.read, index)))
            while waiting:
                index, sample = waiting.popleft()
                image, target = sample.result()
                for following in itertools.islice(left, 1):
                    waiting.append((following, pool.submit(dataset.read, following)))
                yield index, image, target
        finally:
            pool.shutdown(cancel_futures=True)
