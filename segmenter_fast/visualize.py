"""Label maps as images: palettes, palette images, overlays, figures for notebooks."""

from __future__ import annotations

import base64
import colorsys
import html
import io
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from .captions import captioned, legend_of
from .classes import Color

if TYPE_CHECKING:
    from .io import Raster

_SMALL, _LARGE = 192, 512
# Steps of an additive recurrence that fills the unit cube evenly: powers of 1/g, g**4 = g + 1.
_STEPS = (0.8191725134, 0.6710436067, 0.5497004779)


@cache
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


def displayed(pixels: np.ndarray) -> np.ndarray:
    """``(H, W, C)`` uint8, or floats from 0 to 1 -> ``(H, W, 3)`` uint8: three channels, or the first as grey."""
    shown = pixels if pixels.shape[2] == 3 else pixels[..., [0, 1, 2] if pixels.shape[2] > 3 else [0, 0, 0]]
    return shown if shown.dtype == np.uint8 else (shown.clip(0, 1) * 255).round().astype(np.uint8)


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


def reduced_overlay(
    raster: Raster, read_labels: Callable[[int, int], np.ndarray], palette: Sequence[Color], side: int
) -> Image.Image:
    """Return the overlay reduced by a whole factor: mean of the pixels, and label in the middle, of each block.

    Args:
        read_labels: returns the labels ``(bottom - top, width)`` of the rows from ``top`` to ``bottom``.
        side: longest side of the result, in pixels.
    """
    height, width = raster.height, raster.width
    factor = -(-max(height, width) // side)
    step = factor * max(512 // factor, 1)
    columns = np.minimum(np.arange(-(-width // factor)) * factor + factor // 2, width - 1)
    parts = []
    for top in range(0, height, step):
        bottom = min(top + step, height)
        pixels = np.asarray(Image.fromarray(displayed(raster.read(top, bottom))).reduce(factor))
        middles = np.minimum(np.arange(len(pixels)) * factor + factor // 2, bottom - top - 1)
        labels = read_labels(top, bottom)[middles[:, None], columns]
        parts.append(np.asarray(overlay(pixels, labels, palette)))
    return Image.fromarray(np.concatenate(parts))


def side_by_side(
    image: np.ndarray,
    target: np.ndarray,
    prediction: np.ndarray,
    palette: Sequence[Color],
    names: Sequence[str],
    ignore_index: int = 255,
    titles: tuple[str, str, str] = ("image", "labels", "prediction"),
) -> Image.Image:
    """Draw an image, and it under its labels and under a prediction, with titles and the classes of both.

    Ignored pixels show the image. Panels are reduced to 512 pixels, and enlarged by whole factors from below 192.

    Args:
        image: ``(H, W, 3)`` uint8.
        target, prediction: ``(H, W)`` classes; labels may be ``ignore_index``.
        palette, names: of the classes.

    Raises:
        ValueError: sizes that differ, or classes beyond the palette.
    """
    if not image.shape == (*target.shape, 3) == (*prediction.shape, 3):
        given = f"{image.shape}, {target.shape} and {prediction.shape}"
        raise ValueError(f"image, target and prediction must be (H, W, 3), (H, W) and (H, W), got {given}")
    panels = [Image.fromarray(image)]
    for labels, shown in ((target, target != ignore_index), (prediction, np.ones_like(prediction, bool))):
        colors = colorize(np.where(shown, labels, 0), palette)
        panels.append(Image.blend(panels[0], Image.fromarray(np.where(shown[..., None], colors, image)), 0.6))
    factor = max(_SMALL // max(image.shape[:2]), 1)
    panels = [panel.resize((panel.width * factor, panel.height * factor), 0) for panel in panels]
    for panel in panels:
        panel.thumbnail((_LARGE, _LARGE))
    seen = np.concatenate([target[target != ignore_index], prediction.ravel()])
    legend = legend_of(np.bincount(seen, minlength=len(palette)), palette, names, shares=False)
    return captioned([panels], titles, legend)


def draw_groups(image: np.ndarray, index: np.ndarray, patch_size: int) -> Image.Image:
    """``(H, W, 3)`` uint8 pixels in the mean colours of groups of patches, with dark lines between groups.

    Args:
        index: ``(h, w)`` group of each patch.
        patch_size: pixels of a patch's side.

    Raises:
        ValueError: patches that do not just cover the image.
    """
    height, width = image.shape[:2]
    if image.shape[2:] != (3,) or index.shape != (-(-height // patch_size), -(-width // patch_size)):
        given = f"{image.shape} and {index.shape}"
        raise ValueError(f"image and index must be (H, W, 3) and (H / {patch_size}, W / {patch_size}), got {given}")
    groups = index.repeat(patch_size, 0).repeat(patch_size, 1)[:height, :width]
    counts = np.bincount(groups.ravel()).clip(1)
    sums = [np.bincount(groups.ravel(), image[..., channel].ravel()) for channel in range(3)]
    drawn = np.stack([total / counts for total in sums], 1)[groups].astype(np.uint8)
    drawn[1:][groups[1:] != groups[:-1]] //= 3
    drawn[:, 1:][groups[:, 1:] != groups[:, :-1]] //= 3
    return Image.fromarray(drawn)


def html_figure(image: Image.Image, title: str, legend: Sequence[tuple[Color, str]]) -> str:
    """An HTML figure: the image as inline JPEG, a title, and a swatch of colour beside each text of the legend."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    source = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    swatch = "display:inline-block;width:1em;height:1em;margin-right:.4em;vertical-align:middle;background:rgb"
    entries = "".join(
        f'<span style="display:inline-block;margin-right:1.2em"><span style="{swatch}{color}"></span>'
        f"{html.escape(text)}</span>"
        for color, text in legend
    )
    picture = f'<img src="{source}" width="{image.width}" height="{image.height}">'
    caption = f"<figcaption>{html.escape(title)}<br>{entries}</figcaption>"
    return f'<figure style="margin:0;max-width:{max(image.width, 480)}px">{picture}{caption}</figure>'


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


def stored_labels(
    labels: np.ndarray, palette: Sequence[Color], names: Sequence[str], values: Sequence[int] = ()
) -> tuple[np.ndarray, tuple[Color, ...], tuple[str, ...]]:
    """Return labels as they stand in files, with colours and names in the order of the values there.

    Args:
        values: of each class; empty where classes stand for themselves. Other values are black and without a name.
    """
    if not values:
        return labels, tuple(palette), tuple(names)
    places = {value: place for place, value in enumerate(values)}
    filled = [places.get(value) for value in range(max(values) + 1)]
    return (
        np.asarray(values, np.uint8)[labels],
        tuple((0, 0, 0) if place is None else palette[place] for place in filled),
        tuple("" if place is None else names[place] for place in filled),
    )


def _check_labels(labels: np.ndarray, palette: Sequence[Color]) -> None:
    if labels.ndim != 2 or not labels.size:
        raise ValueError(f"labels must be (H, W) with at least one pixel, got {labels.shape}")
    low, high = labels.min(), labels.max()
    if low < 0 or high >= len(palette):
        raise ValueError(f"labels must lie within the palette's {len(palette)} classes, got {low} to {high}")
