"""A bilinear resize and its transpose, a few output rows at a time: no full-size tensor, and the work stays in cache.

All rows of a strip lie in one cell, so they mix the same two input rows, each resized along x only once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bilinear import Axis

_STRIP_ELEMENTS = 1 << 20  # 4 MB of float32: two cores' second-level caches


@dataclass(frozen=True)
class Strip:
    """Output rows ``[start, stop)``, which mix input rows ``lower`` and ``upper`` with ``weights`` ``(2, rows)``."""

    start: int
    stop: int
    lower: int
    upper: int
    weights: Tensor


class Resize:
    """Resize of ``(K, h, w)`` masks to ``size``, of which the top-left ``kept`` is computed, in ``dtype``."""

    def __init__(
        self, masks: Tensor, size: Sequence[int], kept: Sequence[int], align_corners: bool, dtype: torch.dtype
    ) -> None:
        self.classes, *grid = masks.shape[-3:]
        self.vertical, self.horizontal = (
            Axis.make(*axis, align_corners) for axis in zip(grid, size, kept, strict=True)
        )
        self.left, self.right, weight = self.horizontal.taps(masks.device)
        self.left_weight, self.right_weight = (1 - weight).to(dtype), weight.to(dtype)
        self.dtype = dtype
        self.strips = list(self._strips())
        longest = max(strip.stop - strip.start for strip in self.strips)
        self.buffer = weight.new_empty((longest, self.classes, kept[1]), dtype=dtype)

    def _strips(self) -> Iterator[Strip]:
        lower, upper, weight = self.vertical.taps()
        weights = torch.stack((1 - weight, weight)).to(device=self.left.device, dtype=self.dtype)
        most = max(_STRIP_ELEMENTS // (self.classes * self.horizontal.kept), 1)
        for cell in range(-1, self.vertical.cells - 1):
            first, last = self.vertical.start(cell), self.vertical.start(cell + 1)
            pieces = -(-(last - first) // most)
            for piece in range(pieces):  # of equal length, rather than full ones and a rest
                start, stop = (first + (last - first) * i // pieces for i in (piece, piece + 1))
                rows = weights[:, start:stop].contiguous()
                yield Strip(start, stop, int(lower[start]), int(upper[start]), rows)

    def rows(self, masks: Tensor) -> Iterator[tuple[Strip, Tensor]]:
        """Every strip with its ``(rows, K, W')`` logits, in one buffer that the caller may overwrite."""
        wide: dict[int, Tensor] = {}
        for strip in self.strips:
            pair = {row: wide[row] if row in wide else self._widen(masks[:, row]) for row in (strip.lower, strip.upper)}
            wide = pair
            logits = self.buffer[: strip.stop - strip.start]
            lower_weight, upper_weight = strip.weights[:, :, None, None]
            torch.mul(wide[strip.lower], lower_weight, out=logits)
            yield strip, logits.addcmul_(wide[strip.upper], upper_weight)

    def _widen(self, row: Tensor) -> Tensor:
        """``(K, w)`` -> ``(K, W')``."""
        row = row.to(self.dtype)
        return (row[:, self.left] * self.left_weight).addcmul_(row[:, self.right], self.right_weight)


class Transpose:
    """The transpose of ``Resize.rows``: gathers the gradients of all strips, in order, into ``(K, h, w)`` ``out``.

    ``out`` must be zero: rows that no output uses are not written.
    """

    def __init__(self, resize: Resize, out: Tensor) -> None:
        self.resize, self.out = resize, out
        self.pair = resize.buffer.new_empty((2, *resize.buffer.shape[1:]))
        self.wide: dict[int, Tensor] = {}

    def add(self, strip: Strip, grad: Tensor) -> None:
        """Add a strip's ``(rows, K, W')`` gradient."""
        torch.mm(strip.weights, grad.flatten(1), out=self.pair.flatten(1))
        self._flush([row for row in self.wide if row < strip.lower])
        for row, part in zip((strip.lower, strip.upper), self.pair, strict=True):
            if row in self.wide:
                self.wide[row] += part
            else:
                self.wide[row] = part.clone()

    def finish(self) -> None:
        """Write what is still held back."""
        self._flush(list(self.wide))

    def _flush(self, rows: list[int]) -> None:
        resize = self.resize
        for row in rows:
            grad = self.wide.pop(row)  # (K, W')
            narrow = grad.new_zeros((resize.classes, resize.horizontal.size_in))
            narrow.index_add_(1, resize.left, grad * resize.left_weight)
            narrow.index_add_(1, resize.right, grad * resize.right_weight)
            self.out[:, row] = narrow
