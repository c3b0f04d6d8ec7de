"""The class list of a folder: names, colours, and what its label files hold."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...classes import ClassList
from ...config import did_you_mean
from ...visualize import default_palette
from .base import IGNORE
from .colors import ColorTable, named_colors, read_palette, read_text

CLASS_FILES = ("classes.json", "classes.txt")
_KEYS = ("classes", "palette", "values", "ignored", "reduce_zero_label")


@dataclass(frozen=True)
class ReadOptions:
    """Settings for the files of a data set, beyond what its class list says."""

    palette: Path | None = None
    """File of colours, see ``colors.read_palette``: those of the classes; colours of other names do not count."""
    reduce_zero_label: bool = False
    """Value 0 of label files does not count, and k is class k - 1, as in mmsegmentation."""
    page: int | None = None
    """Page, from 0 on, of files that have several; None: the first, with a warning."""


def read_classes(root: Path, options: ReadOptions | None = None) -> ClassList:
    """Read ``classes.txt``, a name a line, or ``classes.json``, a list or ``{"classes": [...], "palette": [...]}``.

    The names are in the order of the labels; ``"values"`` may name the value of each class in label files, such as
    ``[0, 255]`` for binary masks, and ``"reduce_zero_label": true`` makes 0 ignored and k class k - 1. The palette has
    an ``[r, g, b]`` for each class, 0 to 255, by which label images of colours are read, too; ``"ignored"`` lists
    colours that do not count. Without a palette the colours are ``default_palette``'s.

    Args:
        options: whose palette replaces the list's, and is the class list where the folder has none.

    Raises:
        ValueError: no such file, both, or one with other content; names the file.
    """
    options = options or ReadOptions()
    paths = [root / name for name in CLASS_FILES if (root / name).is_file()]
    if not paths and not options.palette:
        raise ValueError(f"{root} has no class list: write the names, one a line, into {root / 'classes.txt'}")
    if len(paths) > 1:
        raise ValueError(f"{root} has two class lists, {' and '.join(CLASS_FILES)}: keep the one that holds")
    path = paths[0] if paths else options.palette
    assert path is not None
    found: dict[str, Any] = _read(path) if paths else {"classes": [*read_palette(path)]}
    names, palette, values, ignored, reduced = (found.get(key) for key in _KEYS)
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{path} must hold a list of class names")
    if reduced not in (None, False, True) or (values and (reduced or options.reduce_zero_label)):
        raise ValueError(f"{path}: reduce_zero_label must be true or false, and false beside values, got {reduced!r}")
    reduced = bool(reduced or options.reduce_zero_label)
    most = IGNORE - reduced
    if not 1 <= len(names) <= most:
        raise ValueError(f"{path} must hold 1 to {most} classes ({IGNORE} is the ignored label), got {len(names)}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path} names {', '.join(twice)} more than once")
    values = [] if values is None else values
    fits = isinstance(values, list) and all(type(value) is int and 0 <= value <= 255 for value in values)
    if values and not (fits and len(set(values)) == len(values) == len(names)):
        raise ValueError(f"{path}: values must be a list of {len(names)} different values, each 0 to 255")
    if palette is not None and not (_are_colors(palette) and len(palette) == len(names)):
        raise ValueError(f"{path}: palette must be a list of {len(names)} colours [r, g, b], each 0 to 255")
    if ignored is not None and not (_are_colors(ignored) and palette is not None):
        raise ValueError(f"{path}: ignored must be a list of colours [r, g, b], each 0 to 255, beside a palette")
    if options.palette:
        palette, ignored = named_colors(options.palette, names)
    if palette is None:
        return ClassList(tuple(names), default_palette(len(names)), tuple(values), reduce_zero_label=reduced)
    colors, others = (tuple((r, g, b) for r, g, b in colors) for colors in (palette, ignored or ()))
    return ClassList(tuple(names), colors, tuple(values), True, others, reduced)


def color_table(classes: ClassList, table: np.ndarray) -> ColorTable | str:
    """Return the values of label images of colours, or the reason why such images cannot be read.

    Args:
        table: the class of each value, or ``IGNORE``.
    """
    if not classes.labels_may_be_colors:
        return "colours need a palette in classes.json, or as --palette"
    if classes.reduce_zero_label:
        return (
            "its labels are colours, for which reduce_zero_label says nothing: list those that do not count as ignored"
        )
    named = list(zip(classes.class_names, classes.palette, strict=True))
    values = {color: int(np.flatnonzero(table == place)[0]) for place, (_, color) in enumerate(named)}
    names = {color: name for name, color in named}
    shared = [(name, names[color], color) for name, color in named if names[color] != name]
    if shared := shared + [(names[color], "one ignored", color) for color in classes.ignored_colors if color in names]:
        return "its colours cannot be told apart: {} and {} have one colour in the palette, {}".format(*shared[0])
    if classes.ignored_colors and not (table == IGNORE).any():
        return "colours that are ignored need a value that no class has"
    values |= {color: int(np.flatnonzero(table == IGNORE)[-1]) for color in classes.ignored_colors}
    return ColorTable(values, names)


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a class file by the keys of ``classes.json``."""
    text = read_text(path)
    if path.suffix != ".json":
        return {"classes": [line.strip() for line in text.splitlines() if line.strip()]}
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    found = found if isinstance(found, dict) else {"classes": found}
    for key in found.keys() - set(_KEYS):
        if hint := did_you_mean(key, _KEYS):
            raise ValueError(f"{path} has the entry {key!r}{hint}")
    return found


def _are_colors(colors: Any) -> bool:
    return isinstance(colors, list) and all(
        isinstance(color, list)
        and len(color) == 3
        and all(type(channel) is int and 0 <= channel <= 255 for channel in color)
        for color in colors
    )
