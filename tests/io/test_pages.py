"""Animations and TIFF of several pages: the page that is asked for, and a warning that names the file where none is."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from segmenter_fast.io import images
from segmenter_fast.io.images import count_pages, open_raster, read_image
from segmenter_fast.io.large_images import TiffRaster

PAGES = [np.full((6, 9, 3), 40 * page, np.uint8) for page in range(3)]


def write(path: Path) -> Path:
    first, *others = map(Image.fromarray, PAGES)
    first.save(path, save_all=True, append_images=others, lossless=True)
    return path


@pytest.mark.parametrize("name", ["x.gif", "x.tif", "x.webp", "x.png"])
@pytest.mark.parametrize("page", [0, 1, 2])
def test_each_page(name: str, page: int, tmp_path: Path) -> None:
    path = write(tmp_path / name)
    assert count_pages(path) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        raster = open_raster(path, page)
    assert np.array_equal(raster.read(0, 6), PAGES[page])
    assert np.array_equal(read_image(path, page), PAGES[page])


def test_ignored_pages_are_told_with_the_file(tmp_path: Path) -> None:
    for name in ("x.gif", "x.tif"):
        path = write(tmp_path / name)
        with pytest.warns(UserWarning, match=rf"{name} has 3 pages; the first is read, --page 1 is the second"):
            assert np.array_equal(open_raster(path).read(0, 6), PAGES[0])


def test_thumbnails_are_no_pages(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "x.tif") as file:
        file.write(PAGES[1], photometric="rgb", metadata=None)
        file.write(PAGES[0][:3, :4], photometric="rgb", metadata=None, subfiletype=1)
    Image.fromarray(PAGES[0]).save(tmp_path / "x.jpg")
    Image.fromarray(PAGES[0]).save(tmp_path / "y.jpg", "MPO", save_all=True, append_images=[Image.fromarray(PAGES[1])])
    (tmp_path / "text.tif").write_text("no image")
    for name in ("x.tif", "x.jpg", "y.jpg", "text.tif"):  # cameras put previews into MPO
        assert count_pages(tmp_path / name) == 1


@pytest.mark.parametrize(("name", "known"), [("x.tif", "the pages 0 to 2"), ("y.png", "one page, 0,")])
def test_a_page_that_is_not_there_is_an_error(name: str, known: str, tmp_path: Path) -> None:
    write(tmp_path / "x.tif")
    Image.fromarray(PAGES[0]).save(tmp_path / "y.png")
    with pytest.raises(OSError, match=rf"{name} cannot be read: it has {known} and no page 3"):
        open_raster(tmp_path / name, 3)


def test_pages_of_large_files_are_read_by_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "LARGE_PIXELS", 50)
    path = write(tmp_path / "x.tif")
    raster = open_raster(path, 2)
    assert isinstance(raster, TiffRaster)
    assert np.array_equal(raster.read(2, 4), PAGES[2][2:4])
    with pytest.raises(OSError, match=r"x\.tif cannot be read: it has the pages 0 to 2 and no page 3"):
        open_raster(path, 3)
