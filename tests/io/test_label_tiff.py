"""Label maps as TIFF: any reader gets the indices back, with colours and names."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from segmenter_fast.io.label_tiff import check_label_tiff, write_label_tiff
from segmenter_fast.visualize import default_palette

NAMES = ("sky", "tree", "straße", "person", "car")


def labels(height: int, width: int, classes: int) -> np.ndarray:
    dtype = np.uint8 if classes <= 256 else np.uint16
    return np.random.default_rng(height).integers(0, classes, (height, width)).astype(dtype)


def bands(values: np.ndarray, *heights: int) -> Iterator[np.ndarray]:
    top = index = 0
    while top < len(values):
        yield values[top : top + heights[index % len(heights)]]
        top, index = top + heights[index % len(heights)], index + 1


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 1100),
    width=st.integers(1, 40),
    wide=st.booleans(),
    heights=st.lists(st.integers(1, 700), min_size=1, max_size=3),
)
def test_any_size_in_any_bands(
    height: int, width: int, wide: bool, heights: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    values = labels(height, width, 5)
    values = values.T if wide else values
    path = tmp_path_factory.mktemp("labels") / "x.tif"
    write_label_tiff(path, bands(values, *heights), values.shape, default_palette(5), NAMES)
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        assert page.is_tiled
        assert max(page.tile) <= 512
        assert np.array_equal(page.asarray(), values)
    assert os.listdir(path.parent) == ["x.tif"]


def test_colours_and_names_go_along(tmp_path: Path) -> None:
    values, palette = labels(600, 530, 5), default_palette(5)
    write_label_tiff(tmp_path / "new/x.tif", bands(values, 100), values.shape, palette, NAMES)
    with Image.open(tmp_path / "new/x.tif") as image:
        assert image.mode == "P"
        assert np.array_equal(np.asarray(image), values)
        assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(palette, np.uint8)[values])
    with tifffile.TiffFile(tmp_path / "new/x.tif") as file:
        assert file.pages[0].tags["ImageDescription"].value == "\n".join(NAMES)
        assert file.pages[0].compression == 8  # Deflate
    assert (tmp_path / "new/x.tif").stat().st_size < values.size


def test_more_than_256_classes_are_sixteen_bit_grey(tmp_path: Path) -> None:
    values = labels(40, 50, 300)
    write_label_tiff(tmp_path / "x.tif", bands(values, 7), values.shape, default_palette(300), ("c",) * 300)
    with Image.open(tmp_path / "x.tif") as image:
        assert image.mode == "I;16"
        assert np.array_equal(np.asarray(image), values)


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, palette = tmp_path / "x.tif", default_palette(5)

    def cut_short() -> Iterator[np.ndarray]:
        yield labels(10, 9, 5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_label_tiff(path, cut_short(), (40, 9), palette, NAMES)
    with pytest.raises(ValueError, match="bands must add up to 40 rows, got 10"):
        write_label_tiff(path, [labels(10, 9, 5)], (40, 9), palette, NAMES)
    with pytest.raises(ValueError, match=r"bands must be \(h, 8\), got \(10, 9\)"):
        write_label_tiff(path, [labels(10, 9, 5)], (40, 8), palette, NAMES)
    with pytest.raises(ValueError, match=r"at most 65536 classes.*got 65537"):
        check_label_tiff(65537)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ValueError, match=r"tifffile: pip install 'segmenter-fast\[large\]'"):
        write_label_tiff(path, [labels(10, 9, 5)], (10, 9), palette, NAMES)
    assert not os.listdir(tmp_path)
