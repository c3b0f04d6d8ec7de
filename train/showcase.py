"""What the small trained model that the package carries makes of scenes that it never saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from segmenter_fast import Segmenter, load
from segmenter_fast.io.images import normalise
from segmenter_fast.visualize import colorize

from .datasets.base import SegmentationDataset
from .datasets.shapes import Shapes
from .metrics import ConfusionMatrix, Scores

MODEL = Path(str(files("segmenter_fast"))) / "assets" / "shapes"
SCENES = 32
HEADINGS = ("scene", "truth", "prediction")
_PANEL, _MARGIN, _LINE = 288, 16, 26
_INK, _PAPER = (32, 32, 38), (250, 250, 248)


@dataclass(frozen=True, eq=False)
class Showcase:
    """Scenes, truth and prediction as one picture, and how well the two agree."""

    picture: Image.Image
    scores: Scores
    """Over all scenes that were segmented, also those that are not in the picture."""


def held_out(model: Segmenter) -> Shapes:
    """Scenes of the size that a model was trained on, whose seed no training takes."""
    return Shapes.of_split("val", size=model.config.image_size[0])


@torch.inference_mode()
def showcase(model: Segmenter, dataset: SegmentationDataset, scenes: int = SCENES, rows: int = 3) -> Showcase:
    """Segment the first ``scenes`` of a data set and draw ``rows`` of them, with a legend of all classes.

    Raises:
        ValueError: classes of the model that are not the data set's, or a data set with fewer scenes.
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
            drawn.append((pixels, *(colorize(part, dataset.palette) for part in (target, labels.cpu().numpy()))))
    return Showcase(_picture(drawn, dataset), matrix.scores())


def trained_model() -> Segmenter:
    """The trained model that the package carries, float32, in evaluation mode."""
    return load(MODEL).float().eval()


def _picture(rows: Sequence[Sequence[np.ndarray]], dataset: SegmentationDataset) -> Image.Image:
    """Rows of panels under their headings; the legend beside them."""
    font, legend = ImageFont.load_default(18), 190
    width = len(HEADINGS) * (_PANEL + _MARGIN) + _MARGIN + legend
    height = _LINE + _MARGIN + len(rows) * (_PANEL + _MARGIN)
    picture = Image.new("RGB", (width, max(height, (len(dataset.class_names) + 2) * _LINE)), _PAPER)
    draw = ImageDraw.Draw(picture)
    for column, heading in enumerate(HEADINGS):
        left = _MARGIN + column * (_PANEL + _MARGIN)
        draw.text((left + _PANEL / 2, 0.8 * _LINE), heading, _INK, font, anchor="mm")
        for row, panels in enumerate(rows):
            smooth = Image.Resampling.LANCZOS if column == 0 else Image.Resampling.NEAREST
            panel = Image.fromarray(panels[column]).resize((_PANEL, _PANEL), smooth)
            picture.paste(panel, (left, _LINE + _MARGIN + row * (_PANEL + _MARGIN)))
    left = width - legend
    for line, (name, color) in enumerate(zip(dataset.class_names, dataset.palette, strict=True)):
        top = _LINE + _MARGIN + line * _LINE
        draw.rounded_rectangle((left, top, left + 18, top + 18), 4, color)
        draw.text((left + 28, top + 9), name, _INK, font, anchor="lm")
    return picture
