"""A bilinear resize and its transpose in plain PyTorch, by strips of output rows: no tensor has the full size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..bilinear import Axis, shape_on_grid
from .groups import used_groups

_STRIP_ELEMENTS = 1 << 21  # logits of a strip: 8 MB of float32


class Resize:
    """Resize of ``(B, K, h, w)`` masks to ``size``, computed in ``dtype`` for the top-left ``kept``.

    With an ``index`` ``(B, h, w)`` the masks are those ``(B, K, groups)`` of groups.
    """

    def __init__(
        self,
        masks: Tensor,
        size: Sequence[int],
        kept: Sequence[int],
        align_corners: bool,
        dtype: torch.dtype,
        index: Tensor | None = None,
    ) -> None:
        self.masks, self.index, self.dtype = masks, index, dtype
        classes, *grid = shape_on_grid(masks, index)[-3:]
        if index is not None:
            used_groups(index, masks.shape[2])
        vertical, horizontal = (Axis.make(*axis, align_corners) for axis in zip(grid, size, kept, strict=True))
        self.taps, self.columns = self._taps(vertical, 2), self._taps(horizontal, 0)
        self.width, step = grid[1], max(_STRIP_ELEMENTS // (classes * kept[1]), 1)
        self.strips = [slice(start, min(start + step, kept[0])) for start in range(0, kept[0], step)]

    def _taps(self, axis: Axis, dims: int) -> list[tuple[Tensor, Tensor]]:
        """Inputs and their weights, lower ones and upper ones, with ``dims`` dimensions behind the weights."""
        lower, upper, weight = axis.taps(self.masks.device)
        weight = weight[(..., *[None] * dims)]
        return [(lower, (1 - weight).to(self.dtype)), (upper, weight.to(self.dtype))]

    def _inputs(self, strip: slice) -> slice:
        """Input rows that a strip mixes."""
        (lower, _), (upper, _) = self.taps
        return slice(int(lower[strip.start]), int(upper[strip.stop - 1]) + 1)

    def rows(self, image: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield each strip and its ``(rows, K, W')`` logits, which the caller may overwrite."""
        for strip in self.strips:
            inputs = self._inputs(strip)
            points = self.masks[image][:, inputs if self.index is None else self.index[image, inputs]]
            points = points.transpose(0, 1).to(self.dtype)
            (left, left_weight), (right, right_weight) = self.columns
            wide = (points[..., left] * left_weight).addcmul_(points[..., right], right_weight)
            (lower, lower_weight), (upper, upper_weight) = self.taps
            logits = wide.index_select(0, lower[strip] - inputs.start).mul_(lower_weight[strip])
            yield strip, logits.addcmul_(wide.index_select(0, upper[strip] - inputs.start), upper_weight[strip])

    def add_gradient(self, image: int, strip: slice, grad: Tensor, out: Tensor) -> None:
        """Add the transpose of a strip's ``(rows, K, W')`` gradient to that of all masks."""
        inputs = self._inputs(strip)
        wide = grad.new_zeros((inputs.stop - inputs.start, *grad.shape[1:]))
        for index, weight in self.taps:  # a matrix product would carry a NaN to rows that do not use it, times zero
            wide.index_add_(0, index[strip] - inputs.start, grad * weight[strip])
        wide = wide.movedim(2, 0).contiguous()  # (W', rows, K)
        narrow = wide.new_zeros((self.width, *wide.shape[1:]))
        for index, weight in self.columns:
            narrow.index_add_(0, index, wide * weight[:, None, None])
        found = narrow.permute(2, 1, 0)  # (K, rows, w)
        if self.index is None:
            out[image][:, inputs] += found
        else:
            out[image].index_add_(1, self.index[image, inputs].flatten(), found.flatten(1))
