"""The official evaluation: every image resized, segmented by sliding windows, and compared at its labels' own size.

Source: the official program's evaluation, and mmsegmentation's multi-scale test: each scale is resized from the image
itself, and the probabilities of all scales, plain and mirrored, are averaged.

The scores follow mmsegmentation: counts are summed over all pixels of all images before anything is divided. The mean
IoU (torchmetrics' macro Jaccard index, too) is over the classes that occur in the labels or in the predictions, the
mean accuracy over those that occur in the labels. Pixels labelled ``ignore_index`` do not count at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..config import Pair
from ..inference import batches, slide
from ..inference.batches import BURST, Model, evaluation_mode, in_batches, segment_images, works_in_bursts
from ..inference.settings import Settings, fits_one_window
from ..io.images import normalise
from ..processes import World
from ..visualize import displayed, side_by_side
from .datasets.base import SegmentationDataset

MULTISCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""The paper's scales, which it takes plain and mirrored."""
BURST_PIXELS = 1 << 24
"""Pixels of the images that are read at once: about 50 MB, and 16 MB of labels."""
# The ``images`` and ``flips`` of ``slide``.
_Views = tuple[list[Tensor], list[bool]]


@torch.inference_mode()
def evaluate(
    model: Model,
    dataset: SegmentationDataset,
    resize: int,
    settings: Settings,
    world: World | None = None,
    progress: Callable[[int, int], None] | None = None,
    read_ahead: int = 2,
) -> Scores:
    """Score a model, in evaluation mode, on a whole data set; the result is the same on every rank.

    Every rank takes each ``world.size``-th image, and the counts are summed once, so ranks need no equal shares. The
    model must be whole on each rank: one whose parameters are sharded would wait for ranks that have nothing left.

    Args:
        resize: pixels that the image's smaller side is resized to; scales are factors of it.
        settings: windows, scales, mirroring.
        progress: called with the number of images of this rank that are done, and of all of them.
        read_ahead: images that are read in the background while the model runs. On a CPU ``BURST`` times as many are
            read before it runs, unless they have more than ``BURST_PIXELS``.

    Raises:
        ValueError: a model and a data set of different class counts, an empty data set, labels out of range (naming
            the sample), no labelled pixel at all, or a scale that leaves no pixel.
        OSError: a sample that cannot be read; names its file.
    """
    check_classes(model, dataset)
    length = len(dataset)
    if not length:
        raise ValueError("the data set has no images to evaluate on")
    matrix = ConfusionMatrix(model.config.num_classes, next(model.parameters()).device, dataset.ignore_index)
    share = range(length) if world is None else range(world.rank, length, world.size)
    done = 0

    def size_of(sample: tuple[int, np.ndarray, _Views]) -> Pair | None:
        size = sample[1].shape[0], sample[1].shape[1]
        return size if _in_one_window(model, sample[2], size, settings) else None

    with evaluation_mode(model):
        samples = (
            (index, target, _views(model, image, resize, settings))
            for index, image, target in _samples(dataset, share, read_ahead, works_in_bursts(model))
        )
        for batch in in_batches(samples, size_of, settings.batch_size):
            height, width = batch[0][1].shape
            found = _segment(model, [views for _, _, views in batch], (height, width), settings)
            for (index, target, _), labels in zip(batch, found, strict=True):
                try:
                    matrix.update(labels, torch.from_numpy(target))
                except ValueError as error:
                    raise ValueError(f"{dataset.name(index)}: {error}") from error
                done += 1
                if progress is not None:
                    progress(done, len(share))
    matrix.all_reduce()
    return matrix.scores(getattr(dataset, "absent", ()))


def segment(model: Model, image: np.ndarray, size: Pair, resize: int, settings: Settings) -> Tensor:
    """``(H, W, C)`` pixels -> labels of ``size`` on the model's device; see ``evaluate``.

    Raises:
        ValueError: a scale leaves no pixel of the resized smaller side.
    """
    return _segment(model, [_views(model, image, resize, settings)], size, settings)[0]


def _views(model: Model, image: np.ndarray, resize: int, settings: Settings) -> _Views:
    """Every scale of an image, plain and with ``flip`` mirrored, on the model's device."""
    if min(settings.scales) * resize < 1:
        given = ", ".join(map(str, settings.scales))
        raise ValueError(f"scales must leave at least one pixel of the resized smaller side, got {given} of {resize}")
    config = model.config
    whole = normalise(image, config.mean, config.std, next(model.parameters()).device)
    images, flips = list[Tensor](), list[bool]()
    for scale in settings.scales:
        factor = int(resize * scale) / min(whole.shape[2:])
        scaled_size = [int(side * factor + 0.5) for side in whole.shape[2:]]  # to the nearest pixel, as mmcv rounds
        scaled = whole
        if scaled_size != list(whole.shape[2:]):
            scaled = F.interpolate(whole, size=scaled_size, mode="bilinear", align_corners=False)
        images += [scaled, scaled.flip(3)] if settings.flip else [scaled]
        flips += [False, True] if settings.flip else [False]
    return images, flips


def _in_one_window(model: Model, views: _Views, size: Pair, settings: Settings) -> bool:
    images, _ = views
    return len(images) == 1 and images[0].shape[2:] == size and fits_one_window(model, size, settings.window)


def _segment(model: Model, batch: Sequence[_Views], size: Pair, settings: Settings) -> Sequence[Tensor]:
    """Return the labels of images whose labels are of one size; several of them are each ``_in_one_window``."""
    if _in_one_window(model, batch[0], size, settings):
        return [*segment_images(model, [images[0] for images, _ in batch])]
    options = settings.window, settings.stride, settings.batch_size
    return [slide(model, images, flips, size, *options) for images, flips in batch]


@torch.inference_mode()
def sample_pictures(
    model: Model, dataset: SegmentationDataset, indices: Iterable[int], resize: int, settings: Settings
) -> dict[str, Image.Image]:
    """Draw image, labels and prediction side by side for some samples of a data set, by the samples' names.

    Raises:
        ValueError: a model and a data set of different class counts.
        OSError: a sample that cannot be read; names its file.
    """
    check_classes(model, dataset)
    pictures = {}
    with evaluation_mode(model):
        for index, image, target in _samples(dataset, indices, read_ahead=1):
            labels = segment(model, image, (target.shape[0], target.shape[1]), resize, settings).cpu().numpy()
            image = np.asarray(Image.fromarray(displayed(image)).resize(labels.shape[::-1]))
            named = dataset.palette, dataset.class_names
            pictures[dataset.name(index)] = side_by_side(image, target, labels, *named, dataset.ignore_index)
    return pictures


def check_classes(model: Model, dataset: SegmentationDataset) -> None:
    """Require as many classes of the model as of the data set.

    Raises:
        ValueError: the numbers differ.
    """
    own, needed = model.config.num_classes, len(dataset.class_names)
    if own != needed:
        raise ValueError(
            f"the model has {own} classes and the data set {needed}; evaluate it on the data that it was trained for, "
            "or check the list of classes"
        )


def _samples(
    dataset: SegmentationDataset, indices: Iterable[int], read_ahead: int, bursts: bool = False
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield index, image and labels, read by threads up to ``read_ahead`` before their turn; see ``evaluate``."""
    largest = 0  # pixels of one image

    def read(index: int) -> tuple[np.ndarray, np.ndarray]:
        nonlocal largest
        image, labels = dataset.read(index)
        largest = max(largest, labels.size)
        return image, labels

    def room(waiting: int) -> bool:
        small = bursts and (waiting + 1) * largest <= BURST_PIXELS
        return waiting < (BURST * read_ahead if small else read_ahead)

    for index, sample in batches.read_ahead(indices, read, read_ahead, room, bursts):
        yield index, *sample.result()


@dataclass(frozen=True)
class Scores:
    """Scores of a model on a data set; all but ``pixels`` are within 0 to 1."""

    miou: float
    """Mean intersection over union, over the classes that occur in labels or predictions."""
    macc: float
    """Mean accuracy, over the classes that occur in the labels."""
    aacc: float
    """Share of all labelled pixels that is right."""
    iou: tuple[float | None, ...]
    """IoU of each class; None where it occurs neither in labels nor in predictions, or no class of the data is it."""
    accuracy: tuple[float | None, ...]
    """Share of each class's labelled pixels that is right; None where it does not occur in the labels."""
    pixels: int
    """Number of labelled pixels."""


class ConfusionMatrix:
    """``counts[t, p]``: pixels of class ``t`` that were given class ``p``, ``(K, K)`` int64 on the device."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu", ignore_index: int = 255) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count ``(B, H, W)`` or ``(H, W)`` predicted classes against labels of the same shape, integers of any dtype.

        Raises:
            ValueError: shapes that differ, or classes outside 0 to K - 1 (a label may be ``ignore_index``, too).
            TypeError: values that are no integers.
        """
        if prediction.shape != target.shape:
            wanted_shape = f"prediction must have the target's shape, {tuple(target.shape)}"
            raise ValueError(f"{wanted_shape}, got {tuple(prediction.shape)}")
        for name, tensor in (("prediction", prediction), ("target", target)):
            if tensor.is_floating_point() or tensor.dtype == torch.bool:
                raise TypeError(f"{name} must hold integers, got {tensor.dtype}")
        found, wanted = (x.to(self.counts.device, torch.int64).flatten() for x in (prediction, target))
        classes, counted = self.num_classes, wanted != self.ignore_index
        for name, values in (("target", wanted), ("prediction", found)):
            outside = ((values < 0) | (values >= classes)) & counted
            if outside.any():
                given = values[outside]
                allowed = f"within 0 to {classes - 1}, or {self.ignore_index} in labels that do not count"
                raise ValueError(f"{name} must lie {allowed}; got {int(given.min())} to {int(given.max())} as well")
        # ignored pixels go to a bin of their own: a selection would copy both maps once more
        bins = torch.where(counted, wanted * classes + found, classes**2)
        self.counts += torch.bincount(bins, minlength=classes**2 + 1)[:-1].view(classes, classes)

    def all_reduce(self) -> None:
        """Sum over all ranks, in place and on every rank; call it once. Does nothing without a process group."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.counts)

    def scores(self, absent: Collection[int] = ()) -> Scores:
        """Return the scores of all that was counted; no IoU of the classes ``absent``, which the data cannot have.

        A pixel that is given an absent class is wrong all the same.

        Raises:
            ValueError: not a single labelled pixel was counted.
        """
        counts = self.counts.cpu().double()
        pixels = int(self.counts.sum())
        if not pixels:
            raise ValueError(f"scores need at least one labelled pixel; all were {self.ignore_index}, or there is none")
        right, labelled = counts.diagonal(), counts.sum(1)
        union = labelled + counts.sum(0) - right
        iou, accuracy = (
            [None if math.isnan(value) or index in absent else value for index, value in enumerate(values.tolist())]
            for values in (right / union, right / labelled)
        )
        known = ([value for value in values if value is not None] for values in (iou, accuracy))
        miou, macc = (sum(values) / len(values) for values in known)
        return Scores(miou, macc, float(right.sum()) / pixels, tuple(iou), tuple(accuracy), pixels)
