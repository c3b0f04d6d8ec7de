"""What a signal does to a process that listens."""

from __future__ import annotations

import os
import signal
import time

import pytest

from segmenter_fast.train.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest().listening() as request:
        assert request.signal is None
        signal.raise_signal(number)
        assert request.signal is number
    assert signal.getsignal(number) is before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_second_signal_ends_the_process_at_once() -> None:
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        with StopRequest().listening():
            for pause in (0, 0, 1.1):  # the second is an echo of the first
                time.sleep(pause)
                signal.raise_signal(signal.SIGTERM)
                os.write(writes, b".")
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
    assert os.read(reads, 9) == b".."
