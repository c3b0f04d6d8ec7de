"""A bilinear resize and its transpose, strip by strip: no tensor has the full size, and a strip fits the caches.

A strip is a few output rows: a piece of a cell, whose rows mix the same two input rows, or several small cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..bilinear import Axis, shape_on_grid
from .groups import used_groups

_STRIP_ELEMENTS = 1 << 20  # logits of a strip: 4 MB of float32, two cores' second-level caches


@dataclass(frozen=True)
class Strip:
    """Some output rows, each a mix of a lower and an upper input row."""

    rows: slice
    inputs: slice  # input rows that they mix
    lower: Tensor  # (rows,) counted from the first of the inputs
    upper: Tensor  # (rows,)
    weights: Tensor  # (2, rows) of lower and upper
    one_cell: bool  # all rows mix the first and the last input, which may be the same


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
        self.masks, self.index = masks, index
        self.classes, *grid = shape_on_grid(masks, index)[-3:]
        if index is not None:
            used_groups(index, masks.shape[2])
        self.vertical, self.horizontal = (
            Axis.make(*axis, align_corners) for axis in zip(grid, size, kept, strict=True)
        )
        self.left, self.right, weight = self.horizontal.taps(masks.device)
        self.left_weight, self.right_weight = (1 - weight).to(dtype), weight.to(dtype)
        self.dtype = dtype
        self.strips = list(self._strips())
        longest = max(len(strip.lower) for strip in self.strips)
        self.buffer = weight.new_empty((longest, self.classes, kept[1]), dtype=dtype)

    def _strips(self) -> Iterator[Strip]:
        most = max(_STRIP_ELEMENTS // (self.classes * self.horizontal.kept), 1)
        starts = self.vertical.cell_starts
        taps = self.vertical.taps(self.left.device)
        begin = 0  # of the cells that form the next strip
        for cell_start, cell_stop in pairwise(starts):
            if cell_stop - begin <= most // 2:  # the input rows of each output row take as much again
                continue
            if begin < cell_start:
                yield self._strip(begin, cell_start, *taps)
            begin = cell_start
            pieces = -(-(cell_stop - cell_start) // most)
            if pieces > 1:  # of nearly equal length
                ends = [cell_start + (cell_stop - cell_start) * i // pieces for i in range(pieces + 1)]
                for start, stop in pairwise(ends):
                    yield self._strip(start, stop, *taps)
                begin = cell_stop
        if begin < starts[-1]:
            yield self._strip(begin, starts[-1], *taps)

    def _strip(self, start: int, stop: int, lower: Tensor, upper: Tensor, weight: Tensor) -> Strip:
        lower, upper, weight = (tap[start:stop] for tap in (lower, upper, weight))
        first, last = int(lower[0]), int(upper[-1])
        lower, upper = lower - first, upper - first
        weights = torch.stack((1 - weight, weight)).to(self.dtype)
        return Strip(slice(start, stop), slice(first, last + 1), lower, upper, weights, int(lower[-1]) == 0)

    def rows(self, image: int) -> Iterator[tuple[Strip, Tensor]]:
        """Yield each strip and its ``(rows, K, W')`` logits, in one buffer that the caller may overwrite."""
        masks, inputs = self.masks[image], None
        for strip in self.strips:
            if inputs != (inputs := strip.inputs):
                wide = self._widen(masks[:, inputs if self.index is None else self.index[image, inputs]])
            if strip.one_cell:
                lower, upper = wide[:1], wide[-1:]
            else:
                lower, upper = wide.index_select(0, strip.lower), wide.index_select(0, strip.upper)
            logits = self.buffer[: len(strip.lower)]
            lower_weight, upper_weight = strip.weights[:, :, None, None]
            torch.mul(lower, lower_weight, out=logits)
            yield strip, logits.addcmul_(upper, upper_weight)

    def _widen(self, rows: Tensor) -> Tensor:
        """Resize rows along x: ``(K, n, w)`` -> ``(n, K, W')``."""
        rows = rows.transpose(0, 1).to(self.dtype)
        return (rows[..., self.left] * self.left_weight).addcmul_(rows[..., self.right], self.right_weight)


class Transpose:
    """Transpose of ``Resize.rows(image)``: adds the gradients of all strips, in order, to those of all masks."""

    def __init__(self, resize: Resize, image: int, grad: Tensor) -> None:
        self.resize, self.out = resize, grad[image]
        self.index = None if resize.index is None else resize.index[image]
        longest = max(strip.inputs.stop - strip.inputs.start for strip in resize.strips)
        self.wide = resize.buffer.new_empty((longest, *resize.buffer.shape[1:]))
        self.inputs: slice | None = None  # input rows whose gradient is in ``wide``

    def add(self, strip: Strip, grad: Tensor) -> None:
        """Add a strip's ``(rows, K, W')`` gradient."""
        wide = self.wide[: strip.inputs.stop - strip.inputs.start]
        if strip.inputs != self.inputs:
            self.finish()
            self.inputs = strip.inputs
            wide.zero_()
        if strip.one_cell:
            weights = strip.weights if len(wide) == 2 else strip.weights.sum(0, keepdim=True)
            wide.flatten(1).addmm_(weights, grad.flatten(1))
        else:
            # A matrix product would carry a NaN to rows that do not use it, times zero.
            for index, weights in zip((strip.lower, strip.upper), strip.weights, strict=True):
                wide.index_add_(0, index, grad * weights[:, None, None])

    def finish(self) -> None:
        """Add the input rows that are still in the buffer to ``out``."""
        if self.inputs is not None:
            resize = self.resize
            wide = self.wide[: self.inputs.stop - self.inputs.start].flatten(0, 1).T.contiguous()  # (W', n K)
            narrow = wide.new_zeros((resize.horizontal.size_in, wide.shape[1]))
            narrow.index_add_(0, resize.left, wide * resize.left_weight[:, None])
            narrow.index_add_(0, resize.right, wide * resize.right_weight[:, None])
            found = narrow.T.unflatten(0, (-1, resize.classes)).transpose(0, 1)  # (K, n, w)
            if self.index is None:
                self.out[:, self.inputs] += found
            else:
                self.out.index_add_(1, self.index[self.inputs].flatten(), found.flatten(1))
            self.inputs = None
