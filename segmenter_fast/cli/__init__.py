"""The command line. Commands parse and print here; what they do stands in modules of their own."""

from . import bench, checkpoints, dataset, demo, evaluate, export, predict, train
from .app import app

__all__ = ["app", "bench", "checkpoints", "dataset", "demo", "evaluate", "export", "main", "predict", "train"]


def main() -> None:
    """Entry point of ``segmenter-fast``."""
    app(prog_name="segmenter-fast")
