"""Pixel accuracy and intersection over union, from a confusion matrix that stays on the device.

Conventions are mmsegmentation's: counts are summed over all pixels of all images before anything is divided. The mean
IoU (torchmetrics' macro Jaccard index, too) is over the classes that occur in the labels or in the predictions, the
mean accuracy over those that occur in the labels. Pixels labelled ``ignore_index`` do not count at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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
    """Intersection over union of each class; None where it occurs neither in labels nor in predictions."""
    accuracy: tuple[float | None, ...]
    """Share of each class's labelled pixels that is right; None where it does not occur in the labels."""
    pixels: int
    """Number of labelled pixels."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields."""
        return {**vars(self), "iou": list(self.iou), "accuracy": list(self.accuracy)}


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

    def scores(self) -> Scores:
        """Return the scores of all that was counted.

        Raises:
            ValueError: not a single labelled pixel was counted.
        """
        counts = self.counts.cpu().double()
        pixels = int(self.counts.sum())
        if not pixels:
            raise ValueError(
                f"scores need at least one labelled pixel; all were {self.ignore_index}, or there were none"
            )
        right, labelled = counts.diagonal(), counts.sum(1)
        union = labelled + counts.sum(0) - right
        iou, accuracy = (
            [None if math.isnan(value) else value for value in values.tolist()]
            for values in (right / union, right / labelled)
        )
        miou, macc = (
            sum(known) / len(known)
            for known in ([value for value in values if value is not None] for values in (iou, accuracy))
        )
        return Scores(miou, macc, float(right.sum()) / pixels, tuple(iou), tuple(accuracy), pixels)
