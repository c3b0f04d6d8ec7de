"""Label maps as images: palettes, palette images and overlays."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image

Color = tuple[int, int, int]

# Steps of an additive recurrence that fills the unit cube evenly: powers of 1/g, g**4 = g + 1.
_STEPS = (0.8191725134, 0.6710436067, 0.5497004779)


def default_palette(num_classes: int) -> tuple[Color, ...]:
    """Distinct RGB colours, 0 to 255, neither dark nor pale; a smaller palette is a prefix of a larger one.

    Raises:
        ValueError: a class count outside 1 to 65536.
    """
    if not 1 <= num_classes <= 65536:
        raise ValueError(f"num_classes must be within 1 to 65536, got {num_classes}")
    colors: dict[Color, None] = {}
    index = 0
    while len(colors) < num_classes:
        hue, saturation, value = (index * step % 1 for step in _STEPS)
        rgb = colorsys.hsv_to_rgb(hue, 0.45 + 0.55 * saturation, 0.55 + 0.45 * value)
        colors[round(rgb[0] * 255), round(rgb[1] * 255), round(rgb[2] * 255)] = None
        index += 1
    return tuple(colors)


def colorize(labels: np.ndarray, palette: Sequence[Color]) -> np.ndarray:
    """``(H, W)`` class indices -> ``(H, W, 3)`` uint8 colours.

    Raises:
        ValueError: labels of a wrong rank or beyond the palette.
    """
    _check_labels(labels, palette)
    return np.asarray(palette, np.uint8)[labels]


def overlay(image: np.ndarray, labels: np.ndarray, palette: Sequence[Color], alpha: float = 0.5) -> Image.Image:
    """``(H, W, 3)`` uint8 pixels under the labels' colours; ``alpha`` 0 shows the image only, 1 the colours only.

    Raises:
        ValueError: sizes that differ, labels beyond the palette, or an alpha outside [0, 1].
    """
    if image.shape != (*labels.shape, 3):
        raise ValueError(f"image must be (H, W, 3) for labels {labels.shape}, got {image.shape}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be within 0 to 1, got {alpha}")
    return Image.blend(Image.fromarray(image), Image.fromarray(colorize(labels, palette)), alpha)


def label_image(labels: np.ndarray, palette: Sequence[Color]) -> Image.Image:
    """``(H, W)`` class indices as an image with those pixel values.

    Mode P with the palette up to 256 classes, 16-bit grey (I;16) above, which has no palette.

    Raises:
        ValueError: labels beyond the palette, or more than 65536 classes.
    """
    if len(palette) > 65536:
        raise ValueError(f"palette must have at most 65536 classes to be written as an image, got {len(palette)}")
    _check_labels(labels, palette)
    if len(palette) > 256:
        return Image.fromarray(labels.astype(np.uint16))
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette([channel for color in palette for channel in color])
    return image


def _check_labels(labels: np.ndarray, palette: Sequence[Color]) -> None:
    if labels.ndim != 2 or not labels.size:
        raise ValueError(f"labels must be (H, W) with at least one pixel, got {labels.shape}")
    low, high = labels.min(), labels.max()
    if low < 0 or high >= len(palette):
        raise ValueError(f"labels must lie within the palette's {len(palette)} classes, got {low} to {high}")
