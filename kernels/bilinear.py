"""Geometry of a bilinear resize along one axis, in exact integers.

Output index ``y`` lies at input coordinate ``(y * step + offset) / denominator``:

    align_corners False:  (y + 1/2) * h / H - 1/2   =  ((2 y + 1) h - H) / (2 H)
    align_corners True:   y * (h - 1) / (H - 1)

Cell ``c`` lies between the input centres ``c`` and ``c + 1``: all its outputs mix the same two inputs, ``clamp(c)`` and
``clamp(c + 1)``. Cells run from -1 (before the first centre) to h - 1 (after the last one). The plain formulations and
the Triton kernels use the same integers, divided by their greatest common divisor so that whole ratios stay small. An
axis whose outputs all lie at input 0 (one input, or one output with align_corners) has step 0 and a denominator of at
least the outputs, so that cell 0 holds all.
Source: ``area_pixel_compute_source_index`` in PyTorch's UpSample.h, without its float32 rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .registry import widest


def shape_on_grid(masks: Tensor, index: Tensor | None) -> Sequence[int]:
    """``(B, K, h, w)`` of masks, or of masks ``(B, K, groups)`` and the ``(B, h, w)`` groups of the patches."""
    return masks.shape if index is None else (*masks.shape[:2], *index.shape[1:])


class Axis(NamedTuple):
    """One axis of a resize from ``size_in`` inputs to ``size_out`` outputs, of which the first ``kept`` matter.

    A tuple, because Triton kernels take its fields as arguments and build it again.
    """

    size_in: int
    size_out: int
    kept: int
    step: int
    offset: int
    denominator: int

    @classmethod
    @lru_cache(maxsize=256)
    def make(cls, size_in: int, size_out: int, kept: int | None = None, align_corners: bool = False) -> Axis:
        kept = size_out if kept is None else kept
        step, offset, denominator = 2 * size_in, size_in - size_out, 2 * size_out
        if align_corners:
            step, offset, denominator = (size_in - 1, 0, size_out - 1) if size_out > 1 else (0, 0, 1)
        if step == 0:
            return cls(size_in, size_out, kept, 0, 0, size_out)
        divisor = math.gcd(step, offset, denominator)
        return cls(size_in, size_out, kept, step // divisor, offset // divisor, denominator // divisor)

    @property
    @lru_cache(maxsize=256)  # noqa: B019  (an axis is a few integers)
    def cells(self) -> int:
        """Number of cells up to that of the last kept output; the first one is cell -1, which may be empty."""
        return ((self.kept - 1) * self.step + self.offset) // self.denominator + 2

    @property
    @lru_cache(maxsize=256)  # noqa: B019
    def longest_cell(self) -> int:
        """Upper bound of the outputs of one cell."""
        return self.size_out if self.step == 0 else -(-self.denominator // self.step)

    @property
    @lru_cache(maxsize=256)  # noqa: B019
    def cell_starts(self) -> tuple[int, ...]:
        """First kept output of each cell from -1 on, and at the end ``kept``."""
        step = max(self.step, 1)
        starts = ((max(cell * self.denominator - self.offset, 0) + step - 1) // step for cell in range(-1, self.cells))
        return tuple(min(start, self.kept) for start in starts)

    def taps(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """``(kept,)`` lower index, upper index (int64) and weight of the upper one (float64, see ``widest``).

        As in PyTorch, outputs before the first centre belong to cell 0 and have weight 0. Where the size does not
        change, the upper input is the lower one, so that an infinity does not reach its neighbour.
        """
        numerator = (torch.arange(self.kept) * self.step + self.offset).clamp(min=0)
        cell = numerator.div(self.denominator, rounding_mode="floor")
        weight = (numerator - cell * self.denominator).double() / self.denominator
        last = self.size_in - 1
        upper = cell if self.size_in == self.size_out else cell + 1
        return cell.clamp(max=last).to(device), upper.clamp(max=last).to(device), weight.to(device, widest(device))
