"""SIGTERM and SIGINT ask a run to stop after its step; another one, a second later or more, stops it at once.

Launchers and terminals may deliver one request twice, hence the second.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ECHO = 1.0  # seconds


class StopRequest:
    """Whether the process was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._since = 0.0

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Inside the block the signals are noted instead of ending the process. Only the main thread can do that."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), time.monotonic()
        if time.monotonic() - self._since < _ECHO:
            return
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def deaf(worker: int = 0) -> None:
    """Lets a process that reads data leave both signals to the process that started it and will end it.

    A signal to the whole group, as a terminal or a batch system sends it, would end it before the step is done.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
