"""Samples of a data set as pictures: the image, its labels and the prediction side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from segmenter_fast.visualize import Color, colorize

_GAP = 4


def side_by_side(
    image: np.ndarray,
    target: np.ndarray,
    prediction: np.ndarray,
    palette: Sequence[Color],
    ignore_index: int = 255,
    alpha: float = 0.6,
    largest_side: int = 512,
) -> Image.Image:
    """Image, image under its labels, image under the prediction; ignored pixels show the image.

    Args:
        image: ``(H, W, 3)`` uint8.
        target: ``(H, W)`` labels.
        prediction: ``(H, W)`` classes.
        palette: RGB of each class.
        alpha: weight of the colours, 0 to 1.
        largest_side: pixels that the longer side of a panel is reduced to, where it is longer.

    Raises:
        ValueError: sizes that differ, or classes beyond the palette.
    """
    if not image.shape == (*target.shape, 3) == (*prediction.shape, 3):
        given = f"{image.shape}, {target.shape} and {prediction.shape}"
        raise ValueError(f"image, target and prediction must be (H, W, 3), (H, W) and (H, W), got {given}")
    panels = [Image.fromarray(image)]
    for labels, shown in ((target, target != ignore_index), (prediction, np.ones_like(prediction, bool))):
        colors = colorize(np.where(shown, labels, 0), palette)
        panels.append(Image.blend(panels[0], Image.fromarray(np.where(shown[..., None], colors, image)), alpha))
    for panel in panels:
        panel.thumbnail((largest_side, largest_side))
    width, height = panels[0].size
    picture = Image.new("RGB", (3 * width + 2 * _GAP, height), "white")
    for index, panel in enumerate(panels):
        picture.paste(panel, (index * (width + _GAP), 0))
    return picture
