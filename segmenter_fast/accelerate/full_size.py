"""The calls that made full-size logits of scores per patch."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CALLS = "_full_size_calls"  # key in a head's __dict__, so that deepcopy and pickle keep it
_INSIDE = tuple(str(Path(file).parent) for file in (torch.__file__ or "", __file__))


class FullSizeCalls:
    """Counts of the calls, by name and line, that made full-size logits of one head's scores."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.warned = False
        self.named: str | None = None
        """Name of the head, if the user gave it."""

    def check(self, output: Any) -> None:
        """Check the output of a head that the user named.

        Raises:
            ValueError: it is no scores per patch.
        """
        if self.named is not None and not (isinstance(output, Tensor) and output.ndim in (3, 4)):
            found = str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"accelerate(heads=) must name modules that return scores (B, K, h, w) or (B, N, K), {self.named!r} "
                f"returns {found}: segmenter_fast.restore(model), and name the last layer before the resize"
            )

    def add(self, function: Any, shape: torch.Size) -> None:
        """Count a call; the first one gives a warning, unless it is the model's own second resize."""
        if function is None:
            return
        name = getattr(function, "__name__", str(function))
        if name in ("__get__", "__set__"):
            name = function.__self__.__name__
        frame = sys._getframe()
        while frame.f_back and frame.f_code.co_filename.startswith(_INSIDE):
            frame = frame.f_back
        call = f"{name} at {frame.f_code.co_filename}:{frame.f_lineno}"
        self.counts[call] = self.counts.get(call, 0) + 1
        if not self.warned and function is not F.interpolate:
            self.warned = True
            message = (
                f"{name} made the logits {tuple(shape)} in full; argmax, max, softmax and cross_entropy over the "
                "classes do not need them (segmenter_fast.made_full_size lists such calls)"
            )
            warnings.warn_explicit(message, UserWarning, frame.f_code.co_filename, frame.f_lineno)
