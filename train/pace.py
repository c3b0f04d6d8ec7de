"""How fast a run goes, and its mean loss, between two lines of its log."""

from __future__ import annotations

import math
import time

from .stepping import Outcome


class Pace:
    """Mean loss and seconds for a step since the last report."""

    def __init__(self) -> None:
        self._start, self._losses = time.perf_counter(), list[float]()

    def add(self, outcome: Outcome) -> None:
        self._losses.append(outcome.loss)

    def skip(self, seconds: float) -> None:
        """Time that is no training."""
        self._start += seconds

    def seconds_per_step(self) -> float:
        return (time.perf_counter() - self._start) / len(self._losses)

    def mean_loss(self) -> float:
        """Of the losses that are finite since it was last asked for, which ends the interval; NaN without one."""
        finite = [loss for loss in self._losses if math.isfinite(loss)]
        self._start, self._losses = time.perf_counter(), []
        return sum(finite) / len(finite) if finite else math.nan
