"""Colours of label images, and the values that stand for them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ...classes import Color

# "sky,70,130,180" of CamVid's class_dict.csv, "sky:70,130,180::" of CVAT's labelmap.txt.
_LINE = re.compile(r"(.+?)\s*[,;:\t]\s*(\d{1,3})\s*[,;\s]\s*(\d{1,3})\s*[,;\s]\s*(\d{1,3})(?!\d)")
_MANY = 16
"""Unknown colours in one file from which on lossy compression is the likely reason."""


def read_text(path: Path) -> str:
    """Read UTF-8; an error about other bytes, a ValueError, names the file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except ValueError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def read_palette(path: Path) -> dict[str, Color]:
    """Read a name and its red, green and blue, 0 to 255, a line; a heading and lines that start with # are left out.

    Raises:
        ValueError: a line without them, a name that stands twice, or no line; names the file.
        OSError: the file cannot be read.
    """
    found: dict[str, Color] = {}
    lines = [line.strip() for line in read_text(path).splitlines()]
    for number, line in enumerate(lines, 1):
        match = _LINE.match(line)
        if not line or line.startswith("#") or (not match and number == 1):
            continue
        color = tuple(map(int, match.groups()[1:])) if match else (256,)
        if not match or max(color) > 255 or match[1] in found:
            wanted = "must be NAME,R,G,B with numbers of 0 to 255 and a name of its own"
            raise ValueError(f"{path}: line {number} {wanted}, got {line[:80]!r}")
        found[match[1]] = color[0], color[1], color[2]
    if not found:
        raise ValueError(f"{path} must hold a line NAME,R,G,B for each class, got none")
    return found


def named_colors(path: Path, names: Sequence[str]) -> tuple[list[Color], list[Color]]:
    """Return the colours that a palette file has for some names, and those that it has for others.

    Raises:
        ValueError: it has none for one of the names, or as ``read_palette``.
    """
    given = read_palette(path)
    if missing := [name for name in names if name not in given]:
        raise ValueError(f"{path} has no colour for {', '.join(missing[:5])}; it has some for {', '.join(given)}")
    return [given[name] for name in names], [color for name, color in given.items() if name not in names]


class UnknownColorError(ValueError):
    """A label image has a colour that stands for no class."""


class ColorTable:
    """The value of each colour that label images may have.

    Args:
        values: by the colour, 0 to 255.
        names: of the colours, for messages; those that do not count have none.
    """

    def __init__(self, values: Mapping[Color, int], names: Mapping[Color, str]) -> None:
        self.colors, self.names = sorted(values), names
        self._codes = _codes(np.asarray(self.colors, np.uint8))
        self._values = np.asarray([values[color] for color in self.colors], np.uint8)

    @property
    def ignored(self) -> list[Color]:
        """Return the colours of pixels that do not count."""
        return [color for color in self.colors if color not in self.names]

    def read(self, pixels: np.ndarray, path: Path) -> np.ndarray:
        """``(H, W, 3)`` uint8 colours of a label file -> ``(H, W)`` uint8 values.

        Raises:
            UnknownColorError: a colour that is not in the table; names it, its pixels, the file and the nearest.
        """
        codes = _codes(pixels)
        places = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)
        known = self._codes[places] == codes
        if known.all():
            return self._values[places]
        unknown, counts = np.unique(codes[~known], return_counts=True)
        most = int(counts.argmax())
        found = tuple(int(unknown[most]) >> shift & 255 for shift in (16, 8, 0))
        nearest = self.colors[int(np.square(np.subtract(self.colors, found)).sum(1).argmin())]
        also = f", and {len(unknown) - 1} more unknown colours" if len(unknown) > 1 else ""
        hint = "; lossy compression, such as JPEG, changes colours" if len(unknown) > _MANY else ""
        raise UnknownColorError(
            f"labels {path} hold {counts[most]} pixels of colour {found}{also}; the nearest that is "
            f"known is {self.names.get(nearest, '(ignored)')} {nearest}{hint}"
        )


def _codes(colors: np.ndarray) -> np.ndarray:
    """``(..., 3)`` uint8 -> ``(...)`` int32, rising with red, green and blue in this order."""
    wide = colors.astype(np.int32)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
