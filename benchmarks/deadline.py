"""Deadlines on the clock ``time.monotonic``."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator


def deadline_after(budget: float | None) -> float:
    """The end of a budget in seconds; infinity without one."""
    return math.inf if budget is None else time.monotonic() + budget


class OutOfTimeError(BaseException):
    """The deadline of ``time_limit``; no Exception, which a compiler would take for one of its own and go on."""


@contextlib.contextmanager
def time_limit(deadline: float) -> Iterator[None]:
    """Raise an OutOfTimeError in the block at ``deadline``; never where it is infinite."""
    if deadline == math.inf:
        yield
        return

    def stop(*_: object) -> None:
        raise OutOfTimeError("the time was up")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(1e-3, deadline - time.monotonic()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
