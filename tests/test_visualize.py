"""Palettes with distinct colours, overlays, and label images whose pixels are class indices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segmenter_fast.visualize import colorize, default_palette, label_image, overlay

PALETTE = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
LABELS = np.array([[0, 1], [2, 1]], np.uint8)
IMAGE = np.full((2, 2, 3), 100, np.uint8)


@pytest.mark.parametrize("classes", [1, 2, 19, 150, 256, 3000])
def test_the_default_palette_is_distinct_and_grows_by_appending(classes: int) -> None:
    palette = default_palette(classes)
    assert len(palette) == len(set(palette)) == classes
    assert default_palette(classes + 10)[:classes] == palette
    assert 0 <= np.min(palette) <= np.max(palette) <= 255


def test_the_colours_of_150_classes_lie_apart() -> None:
    colors = np.array(default_palette(150), float)
    distance = np.linalg.norm(colors[:, None] - colors[None], axis=2) + 1000 * np.eye(150)
    assert distance.min() > 8
    assert np.median(distance.min(0)) > 20


@pytest.mark.parametrize("classes", [0, 65537])
def test_palettes_beyond_what_images_hold_are_refused(classes: int) -> None:
    with pytest.raises(ValueError, match="num_classes must be within 1 to 65536"):
        default_palette(classes)


def test_overlay_blends() -> None:
    colors = np.array([[PALETTE[0], PALETTE[1]], [PALETTE[2], PALETTE[1]]], np.uint8)
    assert np.array_equal(colorize(LABELS, PALETTE), colors)
    assert np.array_equal(np.asarray(overlay(IMAGE, LABELS, PALETTE, 1)), colors)
    assert np.array_equal(np.asarray(overlay(IMAGE, LABELS, PALETTE, 0)), IMAGE)
    half = np.asarray(overlay(IMAGE, LABELS, PALETTE, 0.5)).astype(int)
    assert np.abs(half - (colors.astype(int) + IMAGE) / 2).max() <= 0.5


@pytest.mark.parametrize("classes", [2, 16, 17, 256])
def test_palette_images_hold_class_indices(classes: int, tmp_path: Path) -> None:
    labels = np.arange(classes, dtype=np.uint8)[None]
    label_image(labels, default_palette(classes)).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.mode == "P"
        assert np.array_equal(np.asarray(image), labels)
        assert np.array_equal(np.asarray(image.convert("RGB"))[0], default_palette(classes))


@pytest.mark.parametrize("classes", [257, 65536])
def test_many_classes_become_sixteen_bit_grey(classes: int, tmp_path: Path) -> None:
    labels = np.array([[0, 255, 256, classes - 1]], np.int32)
    label_image(labels, ((0, 0, 0),) * classes).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.mode == "I;16"
        assert np.array_equal(np.asarray(image), labels)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"palette's 3 classes, got 0 to 3"):
        colorize(LABELS + (LABELS == 2), PALETTE)
    with pytest.raises(ValueError, match=r"palette's 3 classes, got -1 to 1"):
        label_image(LABELS.astype(int) - 1, PALETTE)
    with pytest.raises(ValueError, match=r"labels must be \(H, W\)"):
        colorize(LABELS[None], PALETTE)
    with pytest.raises(ValueError, match=r"image must be \(H, W, 3\) for labels \(2, 2\), got \(2, 3, 3\)"):
        overlay(np.zeros((2, 3, 3), np.uint8), LABELS, PALETTE)
    with pytest.raises(ValueError, match=r"alpha must be within 0 to 1, got 1\.5"):
        overlay(IMAGE, LABELS, PALETTE, 1.5)
    with pytest.raises(ValueError, match="at most 65536 classes"):
        label_image(LABELS, ((0, 0, 0),) * 65537)
