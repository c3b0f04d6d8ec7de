"""Puts the best model of a run on ``shapes`` where the package carries it, with the record of how it came to be.

``python -m segmenter_fast.train.ship RUN``, after the ``segmenter-fast train`` that README.md beside the model shows.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import torch

from segmenter_fast import load
from segmenter_fast.inference.settings import Settings
from segmenter_fast.io.atomic import atomic_files
from segmenter_fast.weights.hub import CONFIG, WEIGHTS
from segmenter_fast.weights.reading import read_json

from .evaluation import evaluate
from .logs import read_log
from .run_folder import BEST, RUN
from .showcase import MODEL, held_out

RECORD = "record.json"
LIMIT = 6_000_000


def ship(run: Path, out: Path = MODEL) -> dict[str, object]:
    """Copies config.json and model.safetensors, evaluates them on the held-out seed, and writes record.json.

    Returns:
        The record: recipe, steps done, seconds from the first to the last line of the log, this machine, and mIoU.

    Raises:
        FileNotFoundError: the run has no best model.
        ValueError: its weights are larger than 6 MB, or its classes are not those of the shapes.
    """
    size = (run / BEST / WEIGHTS).stat().st_size
    if size > LIMIT:
        raise ValueError(f"{run / BEST / WEIGHTS} must be at most {LIMIT:,} bytes to be carried, got {size:,}")
    model = load(run / BEST).float().eval()
    dataset = held_out(model)
    side = dataset.size
    scores = evaluate(model, dataset, side, Settings(side, side))
    log = read_log(run)
    times = [line["time"] for line in log]
    record = {
        "recipe": read_json(run / RUN)["recipe"],
        "steps": max((line["step"] for line in log), default=None),
        "seconds": round(max(times) - min(times)) if times else None,
        "machine": f"{os.cpu_count()} CPUs, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "held_out": {"seed": dataset.seed, "scenes": len(dataset), "miou": round(scores.miou, 4)},
        "iou": {
            name: None if iou is None else round(iou, 4)
            for name, iou in zip(dataset.class_names, scores.iou, strict=True)
        },
    }
    with atomic_files(out) as temporary:
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(run / BEST / name, temporary / name)
        (temporary / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


if __name__ == "__main__":
    print(json.dumps(ship(Path(sys.argv[1])), indent=2))
