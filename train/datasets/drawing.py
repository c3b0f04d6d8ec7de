"""Pixels of procedural scenes: signed distances of outlines, textures within them, backgrounds.

Arrays are float32. Everything is computed element by element with additions, products, divisions, square roots and
comparisons, which IEEE 754 rounds alike on every machine, and with Pillow's fixed-point resampling. Lengths are in
pixels, colours are planes ``(3, H, W)``.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import numpy as np
from PIL import Image

Array = np.ndarray
# Half of the square root of 3, for the sides of an equilateral triangle.
_HALF_ROOT_3 = 0.8660254037844386
# The farthest point of each shape, in radii.
REACH = {"disc": 1.0, "square": 1.22, "triangle": 1.37, "cross": 1.07}


def outline(shape: str, u: Array, v: Array, radius: float) -> Array:
    """Return the signed distance of points to the edge of a shape round the origin, negative inside.

    All shapes but the thin cross have about equal area.

    Args:
        shape: "disc", "square", "triangle" (with distances to the lines of its sides) or "cross".
        u, v: coordinates along the shape's own axes.
        radius: of the disc.
    """
    if shape == "disc":
        return np.sqrt(u * u + v * v) - radius
    if shape == "square":
        return _box(u, v, 0.86 * radius, 0.86 * radius)
    if shape == "triangle":
        slope = _HALF_ROOT_3 * np.abs(u) - 0.5 * v
        return np.maximum(slope, v) - 0.68 * radius
    if shape == "cross":
        long, short = 1.05 * radius, 0.2 * radius
        return np.minimum(_box(u, v, long, short), _box(u, v, short, long))
    raise ValueError(f"shape must be disc, square, triangle or cross, got {shape!r}")


def _box(u: Array, v: Array, half_width: float, half_height: float) -> Array:
    across, along = np.abs(u) - half_width, np.abs(v) - half_height
    outside = np.maximum(across, 0) ** 2 + np.maximum(along, 0) ** 2
    return np.sqrt(outside) + np.minimum(np.maximum(across, along), 0)


def texture(kind: str, u: Array, v: Array, period: float, phase: float) -> Array:
    """Return the weight of the second colour at points, 0 to 1, with edges one pixel wide.

    Args:
        kind: "plain", "striped" (along v) or "checked".
        u, v: coordinates along the shape's own axes.
        period: of stripes, and of checks in both directions.
        phase: shift of the pattern, in periods.
    """
    if kind == "plain":
        return np.zeros_like(u)
    if kind == "striped":
        return np.clip(0.5 + _wave(u, period, phase), 0, 1)
    if kind == "checked":
        across, along = (np.clip(_wave(w, period, phase), -0.5, 0.5) for w in (u, v))
        return 0.5 + 2 * across * along
    raise ValueError(f"texture must be plain, striped or checked, got {kind!r}")


def _wave(u: Array, period: float, phase: float) -> Array:
    """Return the signed distance to the nearest edge of stripes of half a period, positive in every second one."""
    place = u / period + phase
    return (np.abs(place - np.floor(place) - 0.5) - 0.25) * period


@cache
def photograph() -> Image.Image:
    """Read the photograph that the package carries."""
    with Image.open(str(files("segmenter_fast") / "assets" / "coffee.jpg")) as opened:
        return opened.convert("RGB")


def photographic(draws: list[float], side: int) -> Array:
    """Crop, mirror, turn and recolour the photograph: ``(3, side, side)``, mostly within [0, 1].

    ``draws`` are 12 numbers in [0, 1).
    """
    source = photograph()
    crop = (0.2 + 0.8 * draws[0]) * min(source.size)
    left, top = draws[1] * (source.width - crop), draws[2] * (source.height - crop)
    box = (left, top, left + crop, top + crop)
    pixels = np.asarray(source.resize((side, side), Image.Resampling.BILINEAR, box))
    pixels = np.rot90(pixels[:, :: 1 if draws[3] < 0.5 else -1], int(4 * draws[4]))
    planes = pixels.transpose(2, 0, 1)[np.argsort(draws[5:8])].astype(np.float32)
    gains = np.asarray([(0.6 + 0.6 * draw) / 255 for draw in draws[8:11]], np.float32)
    return _muted(planes * gains[:, None, None] + 0.25 * (draws[11] - 0.3))


def procedural(draws: list[float], clouds: Array, side: int) -> Array:
    """Draw soft clouds of colour, half of them with the textures of objects: ``(3, side, side)``, mostly within [0, 1].

    ``draws`` are 6 numbers in [0, 1), ``clouds`` ``(n, n, 3)`` of them.
    """
    coarse = Image.fromarray((clouds * 255).astype(np.uint8))
    pixels = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
    contrast = 0.3 + 0.5 * draws[0]
    planes = pixels.transpose(2, 0, 1).astype(np.float32, "C") * (contrast / 255) + (0.5 - 0.5 * contrast)
    if draws[1] < 0.5:
        u, v = turned(*grid(0, 0, side, side), draws[2])
        kind = "striped" if draws[3] < 0.5 else "checked"
        planes *= 0.75 + 0.4 * texture(kind, u, v, side * (0.1 + 0.2 * draws[4]), draws[5])
    return _muted(planes)


def _muted(planes: Array) -> Array:
    """Remove two thirds of the planes' saturation."""
    grey = (planes[0] + planes[1] + planes[2]) / 3
    return grey + (planes - grey) / 3


def grid(top: int, left: int, bottom: int, right: int) -> tuple[Array, Array]:
    """Return x ``(1, right - left)`` and y ``(bottom - top, 1)`` of the pixel centres of a box."""
    return np.arange(left + 0.5, right, dtype=np.float32)[None], np.arange(top + 0.5, bottom, dtype=np.float32)[:, None]


def turned(x: Array, y: Array, turn: float) -> tuple[Array, Array]:
    """Return coordinates along axes turned by about ``turn`` of a full turn: a rational point on the circle."""
    quarter = int(4 * turn)
    t = 4 * turn - quarter
    cosine, sine = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    for _ in range(quarter):
        cosine, sine = -sine, cosine
    return cosine * x + sine * y, cosine * y - sine * x
