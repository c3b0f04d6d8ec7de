"""A bilinear resize that is remembered, and what can be computed of it without the resized tensor.

Nothing here knows of tensor subclasses. A method returns None for a call that needs the resized tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..kernels.bilinear import Axis


@dataclass(frozen=True)
class Upsampling:
    """The top-left ``crop`` of ``interpolate(scores, size, mode="bilinear", align_corners=...)``."""

    scores: Tensor
    """``(B, K, h, w)``"""
    size: tuple[int, int]
    crop: tuple[int, int]
    align_corners: bool
    batched: bool = True
    """False after an index took one image: the result is ``(K, H, W)``, and ``scores`` has a batch of 1."""

    @classmethod
    def of(
        cls,
        scores: Tensor,
        size: Any = None,
        scale_factor: Any = None,
        mode: str = "nearest",
        align_corners: bool | None = None,
        recompute_scale_factor: bool | None = None,
        antialias: bool = False,
    ) -> Upsampling | None:
        """The resize that ``torch.nn.functional.interpolate`` would do; None if it is not one that is remembered.

        A scale factor that gives no whole number of pixels is not: PyTorch samples by the factor, not by the sizes.
        """
        if mode != "bilinear" or antialias or scores.ndim != 4 or (size is None) == (scale_factor is None):
            return None
        if recompute_scale_factor and scale_factor is None:
            return None
        grid = (scores.shape[2], scores.shape[3])
        if size is None:
            factors = scale_factor if isinstance(scale_factor, (tuple, list)) else (scale_factor, scale_factor)
            size = [side * float(factor) for side, factor in zip(grid, factors, strict=False)]
            whole = all(side == int(side) for side in size)
            if len(factors) != 2 or not (whole or align_corners or recompute_scale_factor):
                return None
        sides = tuple(int(side) for side in (size if isinstance(size, (tuple, list)) else (size, size)))
        if len(sides) != 2 or min(*sides, *scores.shape[1:]) < 1:
            return None
        return cls(scores, sides, sides, bool(align_corners))

    # Views. Each returns the upsampling of the view.

    def detach(self) -> Upsampling:
        return replace(self, scores=self.scores.detach())

    def squeeze(self, dim: Any = None) -> Upsampling | None:
        if not self.batched or len(self.scores) != 1:
            return None
        alone = dim is None and min(self.scores.shape[1], *self.crop) > 1
        return replace(self, batched=False) if alone or dim in (0, -4) else None

    def unsqueeze(self, dim: int) -> Upsampling | None:
        return None if self.batched or dim not in (0, -4) else replace(self, batched=True)

    def getitem(self, index: Any) -> Upsampling | None:
        """A batch index and crops that start at 0; a new axis in front of a single image."""
        items = list(index) if isinstance(index, tuple) else [index]
        kinds = (int, slice, type(...), type(None))
        if not all(isinstance(item, kinds) and not isinstance(item, bool) for item in items) or items.count(...) > 1:
            return None
        if not self.batched and items[:1] == [None]:
            return replace(self, batched=True).getitem((slice(None), *items[1:]))
        if None in items:
            return None
        sizes = [*self.scores.shape[:2], *self.crop][0 if self.batched else 1 :]
        missing = [slice(None)] * (len(sizes) - len(items) + items.count(...))
        at = items.index(...) if ... in items else len(items)
        items = items[:at] + missing + items[at + 1 :]
        if len(items) != len(sizes) or not all(isinstance(item, slice) for item in items[-3:]):
            return None
        starts, stops, steps = zip(*(i.indices(n) for i, n in zip(items[-3:], sizes[-3:], strict=True)), strict=True)
        if any(starts) or steps != (1, 1, 1) or min(stops) < 1 or stops[0] != self.scores.shape[1]:
            return None
        scores, batched = self.scores, self.batched
        if batched:
            first = items[0]
            batched = isinstance(first, slice)
            scores = scores[first] if batched else scores[first].unsqueeze(0)
        return replace(self, scores=scores, crop=stops[1:], batched=batched)

    # Results.

    def _is_class_dim(self, dim: Any) -> bool:
        return type(dim) is int and dim in ((1, -3) if self.batched else (0, -3))

    def _shaped(self, labels: Tensor, keepdim: bool) -> Tensor:
        """``(B, H, W)`` as the reduction over the classes would be shaped."""
        labels = labels.unsqueeze(1) if keepdim else labels
        return labels if self.batched else labels.squeeze(0)

    def _labels(self) -> Tensor:
        return kernels.upsample_argmax(self.scores, self.size, self.crop, self.align_corners).long()

    def argmax(self, dim: Any = None, keepdim: bool = False) -> Tensor | None:
        return self._shaped(self._labels(), keepdim) if self._is_class_dim(dim) else None

    def max(self, dim: Any = None, keepdim: bool = False) -> Any:
        if not self._is_class_dim(dim):
            return None
        labels = self._labels()
        return torch.return_types.max((self._shaped(self._values(labels), keepdim), self._shaped(labels, keepdim)))

    def topk(self, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
        if k != 1 or not largest or not self._is_class_dim(dim):
            return None
        return torch.return_types.topk(tuple(self.max(dim, keepdim=True)))

    def _values(self, labels: Tensor) -> Tensor:
        """``(B, H, W)`` resized scores of one class per pixel: four reads per pixel, whatever the number of classes."""
        scores = self.scores.float() if self.scores.itemsize < 4 else self.scores
        height, width = scores.shape[2:]
        axes = (
            Axis.make(*axis, self.align_corners).taps(scores.device)
            for axis in zip((height, width), self.size, self.crop, strict=True)
        )
        (*rows, v), (*columns, u) = axes
        v, u = v.to(scores.dtype)[:, None], u.to(scores.dtype)
        images = torch.arange(len(scores), device=scores.device)[:, None, None] * scores.shape[1]
        first = (images + labels) * (height * width)

        def along_x(row: Tensor) -> Tensor:
            left, right = (scores.take(first + (row[:, None] * width + column)) for column in columns)
            return left * (1 - u) + right * u

        return (along_x(rows[0]) * (1 - v) + along_x(rows[1]) * v).to(self.scores.dtype)

    def softmax(self, dim: Any = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor | None:
        if not self._is_class_dim(dim):
            return None
        dtype = dtype or _dtype_of(self.scores, lambda x: x.softmax(0))
        if not dtype.is_floating_point:
            return None
        with torch.autocast(self.scores.device.type, enabled=False):
            scores = self.scores.to(dtype)
            out = kernels.upsample_softmax(scores, self.size, self.crop, self.align_corners)
        return out if self.batched else out.squeeze(0)

    def cross_entropy(
        self,
        target: Any,
        weight: Tensor | None = None,
        size_average: Any = None,
        ignore_index: int = -100,
        reduce: Any = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor | None:
        """The loss for class indices; calls that PyTorch refuses, or serves with probabilities, are left to it."""
        scores = self.scores
        plain = (
            self.batched
            and size_average is None
            and reduce is None
            and reduction in ("mean", "sum", "none")
            and 0.0 <= label_smoothing <= 1.0
            and type(target) is Tensor
            and target.dtype == torch.int64
            and target.device == scores.device
            and target.shape == (len(scores), *self.crop)
        )
        dtype = _dtype_of(scores, lambda x: F.cross_entropy(x, torch.zeros((), dtype=torch.int64, device=x.device)))
        if weight is not None:
            fits = weight.device == scores.device and weight.shape == scores.shape[1:2] and not weight.requires_grad
            plain = plain and fits and (weight.dtype == scores.dtype or dtype != scores.dtype)
        if not plain:
            return None
        loss = kernels.upsample_cross_entropy(
            scores, target, self.size, ignore_index, weight, label_smoothing, reduction, self.align_corners
        )
        return loss.to(dtype)


def _dtype_of(scores: Tensor, function: Callable[[Tensor], Tensor]) -> torch.dtype:
    """The dtype that PyTorch's ``function`` returns: autocast changes it, differently on each device."""
    device = scores.device.type
    if not torch.is_autocast_enabled(device):
        return scores.dtype
    return function(torch.zeros(1, dtype=scores.dtype, device=scores.device)).dtype
