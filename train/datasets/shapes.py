"""A procedural data set: textured objects on photographic and procedural backgrounds, with exact labels.

Every scene is a function of (seed, index) alone; its objects come in any size and turn, partly hidden by others. Discs
are reddish, squares bluish and triangles greenish, each plain or striped with white, but colour and texture do not
settle a class. A plain disc is a *disc* wherever it stands, but a *button* where it lies wholly on a square or a
triangle: only its surroundings tell. Thin crosses in the colours and textures of all others are clutter, and belong
to the background: only their shape tells.

A pixel's label is the topmost object that contains the pixel's centre. Its colour is mixed by the share of the pixel
that the object covers, so edges are smooth and the label is that of the larger share.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from ...io.atomic import atomic_path
from ...visualize import label_image
from . import drawing
from .base import IGNORE

BACKGROUND, BUTTON = 0, 7
SHAPES = ("disc", "square", "triangle")
TEXTURES = ("plain", "striped")
# Training seeds are smaller; the seed of validation is the training seed plus this.
HELD_OUT = 2**31
# Enough scenes that a short training never sees one twice.
LENGTHS = {"train": 100_000, "val": 500}

_NAMES = tuple(f"{texture} {shape}".removeprefix("plain ") for shape in SHAPES for texture in TEXTURES)
_COLORS = (*((230, 60, 60), (250, 165, 70)), *((50, 110, 230), (110, 205, 240)), *((40, 140, 70), (165, 215, 90)))


@dataclass(frozen=True)
class Thing:
    """An object of a scene; lengths are shares of the scene's side."""

    shape: str
    texture: str
    x: float
    y: float
    radius: float
    turn: float
    """Approximate share of a full turn; see ``drawing.turned``."""
    period: float
    phase: float
    color: tuple[float, float, float]
    """RGB within [0, 1]; stripes are white."""
    label: int


@dataclass(frozen=True)
class Shapes:
    """Scenes of ``size`` x ``size`` pixels with labels 0 to 7; see ``SegmentationDataset``.

    Args:
        size: side of the scenes.
        length: number of scenes.
        seed: of all scenes; scene ``index`` does not depend on ``length``.

    Raises:
        ValueError: a size outside 32 to 4096, a length below 1, or a seed that is negative or beyond 64 bits.
    """

    size: int = 96
    length: int = LENGTHS["train"]
    seed: int = 0

    # The same for every instance, so no fields.
    class_names = ("background", *_NAMES, "button")
    palette = ((40, 40, 48), *_COLORS, (215, 80, 215))
    ignore_index = IGNORE

    def __post_init__(self) -> None:
        for name, low, high in (("size", 32, 4096), ("length", 1, 2**63 - 1), ("seed", 0, 2**64 - 1)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must be within {low} to {high}, got {value}")

    @classmethod
    def of_split(cls, split: str, seed: int = 0, size: int = 96) -> Shapes:
        """Return the scenes to train on, "train", or those held out, "val"; their seeds never overlap.

        Raises:
            ValueError: another split, or a seed outside 0 to 2**31 - 1.
        """
        if split not in LENGTHS:
            raise ValueError(f"split must be train or val, got {split!r}")
        if not 0 <= seed < HELD_OUT:
            raise ValueError(f"seed must be within 0 to {HELD_OUT - 1}: larger ones are held out; got {seed}")
        return cls(size, LENGTHS[split], seed + (HELD_OUT if split == "val" else 0))

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        """Return seed and index, such as "shapes-0-000012"."""
        return f"shapes-{self.seed}-{index:06}"

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw a scene: ``(size, size, 3)`` uint8 RGB and ``(size, size)`` uint8 labels.

        Raises:
            IndexError: an index outside 0 to ``length - 1``.
        """
        generator = self._generator(index)
        things, light = scene(generator), generator.random()
        planes, labels = _background(generator, self.size), np.zeros((self.size, self.size), np.uint8)
        for thing in things:
            _paint(planes, labels, thing, light)
        grain = generator.random((self.size, self.size), np.float32) - 0.5
        planes += (0.12 * generator.random()) * grain
        pixels = (np.clip(planes, 0, 1) * 255 + 0.5).astype(np.uint8)
        return np.ascontiguousarray(pixels.transpose(1, 2, 0)), labels

    def things(self, index: int) -> list[Thing]:
        """Return the objects of a scene, the topmost last."""
        return scene(self._generator(index))

    def _generator(self, index: int) -> np.random.Generator:
        if not 0 <= index < self.length:
            raise IndexError(f"index must be within 0 to {self.length - 1}, got {index}")
        return np.random.Generator(np.random.PCG64((self.seed, index)))


def scene(generator: np.random.Generator) -> list[Thing]:
    """Draw the objects of a scene, lowest first; those on the ground leave most of each other visible."""
    ground: list[Thing] = []
    for _ in range(2 + int(2 * generator.random())):
        for _ in range(8):
            thing = _thing(generator)
            if all(_apart(thing, other) for other in ground):
                ground.append(thing)
                break
    things = []
    for thing in ground:
        things.append(thing)
        if thing.shape in ("square", "triangle") and thing.radius > 0.26 and generator.random() < 0.5:
            things.append(_button(generator, thing))
    return things


def _thing(generator: np.random.Generator) -> Thing:
    draws = generator.random(11).tolist()
    kind = int(6.6 * draws[0])  # the seventh is clutter
    shape = SHAPES[kind // 2] if kind < 6 else "cross"
    texture = TEXTURES[kind % 2] if kind < 6 else TEXTURES[int(2 * draws[1])]
    small = shape == "disc" and texture == "plain" and draws[2] < 0.5
    return Thing(
        shape,
        texture,
        x=0.08 + 0.84 * draws[3],
        y=0.08 + 0.84 * draws[4],
        radius=0.14 + 0.08 * draws[5] if small else 0.24 + 0.16 * draws[5],
        turn=draws[6],
        period=0.09 + 0.05 * draws[7],
        phase=draws[2],
        color=_color(kind // 2 if kind < 6 else int(6 * draws[1]) % 3, draws[8:11]),
        label=kind + 1 if kind < 6 else BACKGROUND,
    )


def _button(generator: np.random.Generator, host: Thing) -> Thing:
    """Draw a plain disc that lies wholly on its host."""
    draws = generator.random(6).tolist()
    radius = min(0.14 + 0.08 * draws[0], 0.55 * host.radius)
    room = 0.68 * host.radius - radius
    return replace(
        host,
        shape="disc",
        texture="plain",
        x=host.x + room * (draws[1] - 0.5),
        y=host.y + room * (draws[2] - 0.5),
        radius=radius,
        color=_color(0, draws[3:]),
        label=BUTTON,
    )


def _apart(first: Thing, second: Thing) -> bool:
    across, along = first.x - second.x, first.y - second.y
    return across * across + along * along > (0.8 * (first.radius + second.radius)) ** 2


def _color(family: int, draws: list[float]) -> tuple[float, float, float]:
    """Return a reddish, greenish or bluish colour: one channel is at least twice as high as the others."""
    strong = 0.6 + 0.4 * draws[0]
    weak, middle = 0.2 * strong * draws[1], 0.5 * strong * draws[2]
    return ((strong, middle, weak), (weak, middle, strong), (middle, strong, weak))[family]


def _background(generator: np.random.Generator, side: int) -> np.ndarray:
    """``(3, side, side)`` float32: crops of a photograph, or procedural, half of each."""
    draws = generator.random(14).tolist()
    if draws[0] < 0.5:
        return drawing.photographic(draws[2:], side)
    cells = 2 + int(7 * draws[1])
    return drawing.procedural(draws[2:], generator.random((cells, cells, 3)), side)


def _paint(planes: np.ndarray, labels: np.ndarray, thing: Thing, light: float) -> None:
    """Draw one object and its shadow over the scene."""
    side = len(labels)
    x, y, radius, shadow = thing.x * side, thing.y * side, thing.radius * side, 0.04 * side
    reach = drawing.REACH[thing.shape] * radius + shadow
    top, left = (max(0, int(centre - reach)) for centre in (y, x))
    bottom, right = (min(side, int(centre + reach) + 2) for centre in (y, x))
    across, down = drawing.grid(top, left, bottom, right)
    u, v = drawing.turned(across - x, down - y, thing.turn)
    distance = drawing.outline(thing.shape, u, v, radius)
    stripes = drawing.texture(thing.texture, u, v, thing.period * side, thing.phase)
    color = np.asarray(thing.color, np.float32)[:, None, None]
    painted = color + 0.85 * stripes * (1 - color)
    painted *= 1 + (0.2 / radius) * drawing.turned(across - x, down - y, light)[0]
    box = planes[:, top:bottom, left:right]
    box *= 1 - 0.35 * np.clip(1 - distance / shadow, 0, 1)
    box += np.clip(0.5 - distance, 0, 1) * (painted - box)
    labels[top:bottom, left:right][distance < 0] = thing.label


def make_folder(folder: Path, images: int, size: int = 128, seed: int = 0) -> dict[str, int]:
    """Write the first scenes as ``images/`` and ``labels/``, with ``classes.json``, in ``folder``.

    A fifth of ``images``, at least one, are for validation. The folder appears when it is complete.

    Returns:
        The number of images of each split.

    Raises:
        ValueError: fewer than 2 images, or a size or a seed outside the range of ``Shapes``.
        FileExistsError: the folder exists and is not empty.
        OSError: it cannot be written.
    """
    if images < 2:
        raise ValueError(f"at least 2 images are needed, one to train on and one to validate with, got {images}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; name a new folder")
    counts = {"train": images - max(1, images // 5), "val": max(1, images // 5)}
    scenes = {split: replace(Shapes.of_split(split, seed, size), length=count) for split, count in counts.items()}
    with atomic_path(folder) as temporary:
        for split, count in counts.items():
            for kind in ("images", "labels"):
                (temporary / kind / split).mkdir(parents=True)
            for index in range(count):
                pixels, labels = scenes[split].read(index)
                name = f"{scenes[split].name(index)}.png"
                Image.fromarray(pixels).save(temporary / "images" / split / name)
                label_image(labels, Shapes.palette).save(temporary / "labels" / split / name)
        content = {"classes": list(Shapes.class_names), "palette": [list(color) for color in Shapes.palette]}
        (temporary / "classes.json").write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    return counts
