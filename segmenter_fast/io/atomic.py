"""Image files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image


def write_png(image: Image.Image, path: Path) -> None:
    """Writes beside ``path`` and renames, so that ``path`` is never half a file; makes the folders above."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        image.save(part, format="PNG")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
