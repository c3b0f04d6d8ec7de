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

from segmenter_fast.io.label_tiff import check_label_tiff, georeference, write_label_tiff
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


def test_labels_lie_where_a_geotiff_of_gdal_lies(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio", reason="needs rasterio to write and read by GDAL")
    source, written = tmp_path / "x.tif", tmp_path / "y.tif"
    place = rasterio.transform.from_origin(5e5, 5e6, 10, 20)
    size = {"width": 40, "height": 30, "count": 4, "dtype": "uint16"}
    with rasterio.open(source, "w", driver="GTiff", crs="EPSG:32633", transform=place, nodata=0, **size) as file:
        file.write(np.ones((4, 30, 40), np.uint16))
        file.update_tags(SENSOR="a & <b>")
        file.update_tags(1, STATISTICS_MAXIMUM="9")
    write_label_tiff(written, bands(labels(30, 40, 5), 7), (30, 40), default_palette(5), NAMES, source=source)
    with rasterio.open(written) as file:
        assert (file.crs.to_epsg(), file.transform, file.nodata) == (32633, place, None)
        assert (file.tags()["SENSOR"], file.tags(1)) == ("a & <b>", {})
        assert np.array_equal(file.read(1), labels(30, 40, 5))


def test_what_says_no_place_gives_no_tags(tmp_path: Path) -> None:
    scale = (33550, 12, 3, (1.0, 1.0, 0.0), True)
    for name, tags, found in (("a", [scale], [scale]), ("b", [scale, (274, 3, 1, 6, True)], []), ("c", [], [])):
        tifffile.imwrite(tmp_path / f"{name}.tif", labels(9, 9, 5), extratags=tags)
        assert georeference(tmp_path / f"{name}.tif") == found
    Image.new("L", (3, 3)).save(tmp_path / "x.png")
    assert georeference(tmp_path / "x.png") == georeference(tmp_path / "absent.tif") == []
