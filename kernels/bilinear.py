"""Geometry of a bilinear resize along one axis, in exact integers. No Triton here.

Output index ``y`` lies at input coordinate ``(y * step + offset) / denominator``:

    align_corners False:  (y + 1/2) * h / H - 1/2   =  ((2 y + 1) h - H) / (2 H)
    align_corners True:   y * (h - 1) / (H - 1)

Cell ``c`` is the stretch between input centres ``c`` and ``c + 1``: all its outputs mix the same two inputs,
``clamp(c)`` and ``clamp(c + 1)``. Cells run from -1 (before the first centre) to h - 1 (after the last one). The
same numbers drive the plain formulations (through ``taps``) and the Triton kernels (as integer arguments); they are
divided by their greatest common divisor, so that whole ratios stay small. An axis whose outputs all lie at input 0
(one input, or one output with align_corners) has step 0 and a denominator of at least the outputs, so cell 0 takes all.
Source: ``area_pixel_compute_source_index`` in PyTorch's UpSample.h, without its float32 rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """One axis of a resize from ``size_in`` inputs to ``size_out`` outputs, of which the first ``kept`` matter."""

    size_in: int
    size_out: int
    kept: int
    step: int
    offset: int
    denominator: int

    @classmethod
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
    def cells(self) -> int:
        """How many cells reach up to the last kept output; the first one is cell -1, which may be empty."""
        return ((self.kept - 1) * self.step + self.offset) // self.denominator + 2

    @property
    def longest_cell(self) -> int:
        """An upper bound of the outputs that one cell holds."""
        return self.size_out if self.step == 0 else -(-self.denominator // self.step)

    def start(self, cell: int) -> int:
        """The first kept output of ``cell``; ``start(cell + 1)`` is one past its last."""
        step = max(self.step, 1)
        return min((max(cell * self.denominator - self.offset, 0) + step - 1) // step, self.kept)

    def taps(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """``(kept,)`` lower index, upper index (int64) and weight of the upper one (float64).

        As in PyTorch, outputs before the first centre mix input 0 with none of input 1: they belong to cell 0. Where
        the size does not change there is no upper input, which matters to infinities.
        """
        numerator = (torch.arange(self.kept, device=device) * self.step + self.offset).clamp(min=0)
        cell = numerator.div(self.denominator, rounding_mode="floor")
        upper_weight = (numerator - cell * self.denominator).double() / self.denominator
        last = self.size_in - 1
        upper = cell if self.size_in == self.size_out else cell + 1
        return cell.clamp(max=last), upper.clamp(max=last), upper_weight
