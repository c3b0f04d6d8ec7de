"""The classes of a folder of yours: ``classes.txt`` or ``classes.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...classes import ClassList
from ...visualize import default_palette
from .base import IGNORE

FILES = ("classes.json", "classes.txt")


def read_classes(root: Path) -> ClassList:
    """Names in the order of the labels: one a line, or in JSON a list or ``{"classes": [...], "palette": [...]}``.

    The palette has an ``[r, g, b]`` for each class, 0 to 255. Without one the colours are ``default_palette``'s.

    Raises:
        ValueError: no such file, both, or one that says something else; names the file.
    """
    paths = [root / name for name in FILES if (root / name).is_file()]
    if not paths:
        raise ValueError(f"{root} has no class list: write the names, one a line, into {root / 'classes.txt'}")
    if len(paths) > 1:
        raise ValueError(f"{root} has two class lists, {' and '.join(FILES)}: keep the one that holds")
    (path,) = paths
    try:
        text = path.read_text(encoding="utf-8-sig")
    except ValueError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    palette: Any = None
    if path.suffix == ".txt":
        names: Any = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        names, palette = _from_json(path, text)
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{path} must hold a list of class names")
    if not 1 <= len(names) <= IGNORE:
        raise ValueError(f"{path} must hold 1 to {IGNORE} classes ({IGNORE} is the ignored label), got {len(names)}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path} names {', '.join(twice)} more than once")
    if palette is None:
        return ClassList(tuple(names), default_palette(len(names)))
    if not (isinstance(palette, list) and len(palette) == len(names) and all(map(_is_color, palette))):
        raise ValueError(f"{path}: palette must be a list of {len(names)} colours [r, g, b], each 0 to 255")
    return ClassList(tuple(names), tuple((red, green, blue) for red, green, blue in palette))


def write_classes(root: Path, classes: ClassList) -> None:
    """``classes.json`` with names and palette."""
    content = {"classes": list(classes.class_names), "palette": [list(color) for color in classes.palette]}
    (root / FILES[0]).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def _from_json(path: Path, text: str) -> tuple[Any, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if isinstance(content, dict):
        return content.get("classes"), content.get("palette")
    return content, None


def _is_color(color: Any) -> bool:
    channels = color if isinstance(color, list) else []
    return len(channels) == 3 and all(type(channel) is int and 0 <= channel <= 255 for channel in channels)
