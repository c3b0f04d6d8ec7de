"""Panels with titles above and a legend of colours below, as one picture."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .classes import Color

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
RANDOM = "RANDOM WEIGHTS: these labels mean nothing"
_INK, _PAPER, _ALARM = (32, 32, 38), (250, 250, 248), (190, 20, 20)
# Fonts of many scripts: of Linux distributions, Windows and macOS.
_FONTS = (
    *("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "NanumGothic.ttf"),
    *("msyh.ttc", "YuGothM.ttc", "malgun.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc"),
    "Arial Unicode.ttf",
)
_GAP, _LEAST_WIDTH, _MOST_ENTRIES = 6, 256, 24


def legend_of(
    counts: np.ndarray, palette: Sequence[Color], names: Sequence[str], shares: bool = True, drawn: bool = True
) -> list[tuple[Color | None, str]]:
    """Return colour and text, name and share of the pixels if wanted, of the classes that occur, the largest first.

    Args:
        counts: ``(K,)`` pixels of each class.
        drawn: by a font that may lack letters: then the numbers of classes stand for their names.

    Returns:
        24 entries at most; then one without a colour that counts the others, and one that says that names are missing.
    """
    order = [int(place) for place in np.argsort(-counts, kind="stable") if counts[place]]
    text = "".join(names[place] for place in order[:_MOST_ENTRIES])
    lost = set(text) - _drawn(_font(14, text), text) if drawn and not text.isascii() else set[str]()
    names = [f"class {place}" if lost & set(name) else name for place, name in enumerate(names)]
    shown: list[tuple[Color | None, str]] = [
        (palette[place], f"{names[place]}, {percent(counts[place] / counts.sum())}" if shares else names[place])
        for place in order[:_MOST_ENTRIES]
    ]
    left = len(order) - len(shown)
    shown += [(None, f"and {left} more")] if left else []
    return [*shown, (None, "no installed font has the letters of the other names")] if lost else shown


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.005 else "<1 %"


def captioned(
    rows: Sequence[Sequence[Image.Image]],
    titles: Sequence[str] = (),
    legend: Sequence[tuple[Color | None, str]] = (),
    note: str = "",
) -> Image.Image:
    """Draw rows of panels of one size, one title above each column, a note and a legend below all.

    Without titles the first panel begins at the top left corner. Text grows with the width.

    Args:
        legend: colour and text of each entry; without a colour the text stands alone.
        note: a line in red.
    """
    width, height = rows[0][0].size
    span = len(rows[0]) * (width + _GAP) - _GAP
    size = min(max(span // 64, 14), 40)
    font, line = _font(size, "".join((*titles, *(text for _, text in legend)))), size + size // 2
    lengths = [round(font.getlength(text)) + (size + size // 3) * (color is not None) for color, text in legend]
    full = max(span, _LEAST_WIDTH, round(font.getlength(note)) + 2 * _GAP, *(length + 2 * _GAP for length in lengths))
    top = line if titles else 0
    x, y = _GAP, top + len(rows) * (height + _GAP) + line * bool(note)
    places = []
    for length in lengths:
        if x + length + _GAP > full:
            x, y = _GAP, y + line
        places.append((x, y))
        x += length + size
    picture = Image.new("RGB", (full, y + line * bool(legend)), _PAPER)
    draw = ImageDraw.Draw(picture)
    for column, title in enumerate(titles):
        draw.text((column * (width + _GAP) + width / 2, top / 2), _cut(title, width, font), _INK, font, anchor="mm")
    for row, panels in enumerate(rows):
        for column, panel in enumerate(panels):
            picture.paste(panel, (column * (width + _GAP), top + row * (height + _GAP)))
    if note:
        draw.text((_GAP, top + len(rows) * (height + _GAP) + line / 2), note, _ALARM, font, anchor="lm")
    for (color, text), (x, y) in zip(legend, places, strict=True):
        if color is not None:
            edge = (y + (line - size) // 2, y + (line + size) // 2)
            draw.rectangle((x, edge[0], x + size, edge[1]), color, _INK)
            x += size + size // 3
        draw.text((x, y + line / 2), text, _INK, font, anchor="lm")
    return picture


def _font(size: int, text: str) -> Font:
    """Return Pillow's font, or for other than ASCII text the installed one of ``_FONTS`` that has most of its letters.

    DejaVu Sans is taken from matplotlib where the system has none.
    """
    fonts = [] if text.isascii() else [ImageFont.truetype(path, size) for path in _installed()]
    return max(fonts, key=lambda font: len(_drawn(font, text)), default=ImageFont.load_default(size))


@functools.cache
def _installed() -> tuple[str, ...]:
    """Return the paths of the fonts that are there."""
    spec = importlib.util.find_spec("matplotlib")
    folder = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" if spec and spec.origin else Path()
    found = list[str]()
    for name in (*_FONTS, str(folder / _FONTS[0])):
        with contextlib.suppress(OSError):
            found.append(str(ImageFont.truetype(name).path))
    return tuple(found)


def _drawn(font: Font, text: str) -> set[str]:
    """Return the letters that a font has; for others it draws what it draws for a code point without a letter."""
    missing = bytes(font.getmask("\U0010ffff"))
    return {letter for letter in text if letter.isspace() or bytes(font.getmask(letter)) != missing}


def _cut(text: str, width: int, font: Font) -> str:
    """Return the text, or as much of it as fits."""
    if font.getlength(text) <= width:
        return text
    shorter = (f"{text[:end]}..." for end in range(len(text), 0, -1))
    return next((part for part in shorter if font.getlength(part) <= width), "")
