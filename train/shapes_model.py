"""The small model that the package carries, trained on ``shapes``: load it, show it, replace it by another run's.

``python -m segmenter_fast.train.shapes_model RUN`` puts the best model of a run into the package, after the
``segmenter-fast train`` that README.md beside the model shows.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib.resources import files
from pathlib import Path

import torch
from PIL import Image

from ..captions import captioned
from ..inference.settings import Settings
from ..io.atomic import atomic_files
from ..io.images import normalise
from ..segmenter import Segmenter
from ..visualize import colorize
from ..weights.hub import CONFIG, WEIGHTS
from ..weights.load import load
from ..weights.reading import read_mapping
from .datasets.base import SegmentationDataset
from .datasets.shapes import Shapes
from .evaluation import ConfusionMatrix, Scores, evaluate
from .logs import read_log
from .run_folder import BEST, RUN

MODEL = Path(str(files("segmenter_fast"))) / "assets" / "shapes"
RECORD = "record.json"
LIMIT = 6_000_000
SCENES = 32
HEADINGS = ("scene", "truth", "prediction")
_PANEL, _SMOOTH = 288, (Image.Resampling.NEAREST, Image.Resampling.LANCZOS)


def load_shapes_model() -> Segmenter:
    """Load the model that the package carries, float32, in evaluation mode."""
    return load(MODEL).float().eval()


def held_out_scenes(model: Segmenter) -> Shapes:
    """Return scenes of the size that a model was trained on, whose seed no training uses."""
    return Shapes.of_split("val", size=model.config.image_size[0])


@torch.inference_mode()
def compare_scenes(
    model: Segmenter, dataset: SegmentationDataset, scenes: int = SCENES, rows: int = 3
) -> tuple[Image.Image, Scores]:
    """Segment the first ``scenes`` of a data set and draw ``rows`` of them, with a legend of all classes.

    Returns:
        Scenes, truth and prediction side by side as one picture; the scores over all ``scenes``.

    Raises:
        ValueError: the model's classes are not the data set's, or the data set has fewer scenes.
    """
    if model.config.class_names != dataset.class_names:
        raise ValueError(f"the model's classes {model.config.class_names} are not the data's {dataset.class_names}")
    if not 1 <= rows <= scenes <= len(dataset):
        raise ValueError(f"rows and scenes must be within 1 to {len(dataset)}, in this order, got {rows} and {scenes}")
    config, device = model.config, next(model.parameters()).device
    matrix, drawn = ConfusionMatrix(config.num_classes, device, dataset.ignore_index), []
    for index in range(scenes):
        pixels, target = dataset.read(index)
        labels = model.segment(normalise(pixels, config.mean, config.std, device))[0]
        matrix.update(labels, torch.from_numpy(target))
        if index < rows:
            colors = (colorize(part, dataset.palette) for part in (target, labels.cpu().numpy()))
            panels = map(Image.fromarray, (pixels, *colors))
            drawn.append([panel.resize((_PANEL, _PANEL), _SMOOTH[not place]) for place, panel in enumerate(panels)])
    legend = [*zip(dataset.palette, dataset.class_names, strict=True)]
    return captioned(drawn, HEADINGS, legend), matrix.scores()


def replace_shapes_model(run: Path, out: Path = MODEL) -> dict[str, object]:
    """Copy the best model of a run, evaluate it on the held-out seed, and write record.json beside it.

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
    dataset = held_out_scenes(model)
    scores = evaluate(model, dataset, dataset.size, Settings(dataset.size, dataset.size))
    log = read_log(run)
    times = [line["time"] for line in log]
    record = {
        "recipe": read_mapping(run / RUN)["recipe"],
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
    print(json.dumps(replace_shapes_model(Path(sys.argv[1])), indent=2))
