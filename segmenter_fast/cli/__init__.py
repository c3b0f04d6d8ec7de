"""The command line. Commands parse and print here; what they do stands in modules of their own."""

import os
import signal
import sys
from types import FrameType

try:
    from . import bench, check, checkpoints, dataset, demo, evaluate, export, predict, train
    from .app import Terminated, app
except KeyboardInterrupt:  # afterwards the application answers it
    sys.stderr.write("interrupted\n")
    raise SystemExit(130) from None

__all__ = ["app", "bench", "check", "checkpoints", "dataset", "demo", "evaluate", "export", "main", "predict", "train"]


def main() -> None:
    """Entry point of ``segmenter-fast``."""
    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is default:
            signal.signal(number, _interrupt)
    app(prog_name="segmenter-fast")


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End the process where PyTorch is being imported, which cannot be broken off; else raise, to clean up first."""
    torch = sys.modules.get("torch")
    ready = torch is not None and not getattr(torch.__spec__, "_initializing", False)
    while frame is not None and not ready:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            sys.stderr.write("interrupted\n")
            sys.stderr.flush()
            os._exit(128 + number)
        frame = frame.f_back
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
