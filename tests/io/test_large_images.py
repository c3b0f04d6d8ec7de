"""Every reader gives the pixels of ``read_image``, whichever band is asked for, or says why it cannot."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from segmenter_fast.io import Pixels, Raster, images, open_raster
from segmenter_fast.io.images import read_image
from segmenter_fast.io.large_images import NotByRowsError, TiffRaster, VipsRaster

RGB = np.random.default_rng(0).integers(0, 256, (70, 53, 3), dtype=np.uint8)
GREY16 = np.random.default_rng(1).integers(0, 65536, (70, 53), dtype=np.uint16)
TILED, STRIPED = {"tile": (16, 32)}, {"rowsperstrip": 7}


def bands(raster: Raster, *sizes: int) -> np.ndarray:
    """The whole image, put together from bands of these heights in turn."""
    top, parts = 0, []
    while top < raster.height:
        bottom = min(top + sizes[len(parts) % len(sizes)], raster.height)
        part = raster.read(top, bottom)
        assert part.shape == (bottom - top, raster.width, 3)
        assert part.dtype == np.uint8
        parts.append(part)
        top = bottom
    return np.concatenate(parts)


@pytest.mark.parametrize("layout", [TILED, STRIPED, {}])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize(
    ("values", "options"),
    [
        (RGB, {"photometric": "rgb"}),
        (RGB[..., 0], {"photometric": "minisblack"}),
        (RGB[..., 0], {"photometric": "miniswhite"}),
        (GREY16, {"photometric": "minisblack"}),
        (RGB[..., 0] > 99, {"photometric": "minisblack"}),
        (RGB[..., 0] % 5, {"photometric": "palette", "colormap": np.arange(768, dtype=np.uint16).reshape(3, 256) * 85}),
        (np.dstack([RGB, RGB[..., 0]]), {"photometric": "rgb", "extrasamples": ["unassalpha"]}),
        (np.dstack([RGB // 2, RGB[..., 0] | 1]), {"photometric": "rgb", "extrasamples": ["assocalpha"]}),
        (np.dstack([RGB, RGB[..., 0]]), {"photometric": "separated"}),
        (np.dstack([RGB[..., 0], RGB[..., 1]]), {"photometric": "minisblack", "extrasamples": ["unassalpha"]}),
    ],
    ids=["rgb", "grey", "white", "grey16", "bits", "palette", "rgba", "premultiplied", "cmyk", "grey-alpha"],
)
def test_tiff_has_the_pixels_of_pillow(
    values: np.ndarray, options: dict[str, object], compression: str | None, layout: dict[str, object], tmp_path: Path
) -> None:
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, values, compression=compression, **options, **layout)
    expected = read_image(path)
    raster = TiffRaster(str(path))
    assert (raster.height, raster.width) == expected.shape[:2]
    assert np.array_equal(bands(raster, 70), expected)
    assert np.array_equal(bands(raster, 1, 20, 17), expected)


@pytest.mark.parametrize("layout", [TILED, STRIPED])
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_planes_big_tiff_and_sixteen_bits(layout: dict[str, object], big: bool, byteorder: str, tmp_path: Path) -> None:
    path, values = tmp_path / "x.tif", GREY16[..., None] - np.arange(3, dtype=np.uint16)
    options = {"photometric": "rgb", "bigtiff": big, "byteorder": byteorder, **layout}
    tifffile.imwrite(path, values, **options)
    assert np.array_equal(bands(TiffRaster(str(path)), 9), values >> 8)
    if not (big and byteorder == ">"):  # Pillow does not read these
        assert np.array_equal(read_image(path), values >> 8)
    planes = np.ascontiguousarray(RGB.transpose(2, 0, 1))
    tifffile.imwrite(path, planes, planarconfig="separate", compression="zlib", **options)
    assert np.array_equal(bands(TiffRaster(str(path)), 9), RGB)


@pytest.mark.parametrize("layout", [TILED, STRIPED, {**TILED, "compression": "zlib"}])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_is_turned_upright(orientation: int, layout: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, RGB, photometric="rgb", extratags=[(274, 3, 1, orientation, True)], **layout)
    expected = read_image(path)
    assert orientation < 5 or expected.shape == (53, 70, 3)
    assert np.array_equal(bands(TiffRaster(str(path)), 1, 20, 17), expected)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_band_of_any_layout(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    height, width = (data.draw(st.integers(1, 90)) for _ in range(2))
    values = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    sides = st.sampled_from([16, 32, 64])
    layout = data.draw(st.one_of(st.builds(lambda a, b: {"tile": (a, b)}, sides, sides), st.just(STRIPED)))
    path = tmp_path_factory.mktemp("any") / "x.tif"
    compression = data.draw(st.sampled_from([None, "zlib"]))
    tifffile.imwrite(path, values, photometric="rgb", compression=compression, **layout)
    top = data.draw(st.integers(0, height - 1))
    bottom = data.draw(st.integers(top + 1, height))
    assert np.array_equal(TiffRaster(str(path)).read(top, bottom), values[top:bottom])


@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "jpg"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "LA", "CMYK"])
def test_libvips_has_the_pixels_of_pillow(suffix: str, mode: str, tmp_path: Path) -> None:
    pytest.importorskip("pyvips", reason="needs pyvips")
    path = tmp_path / f"x.{suffix}"
    smooth = Image.fromarray(RGB).resize((90, 110))
    try:
        (smooth.convert("L").convert("LA") if mode == "LA" else smooth.convert(mode)).save(path, lossless=True)
    except (OSError, ValueError):
        pytest.skip(f"Pillow writes no {suffix} of mode {mode}")
    difference = bands(VipsRaster(str(path)), 33).astype(int) - read_image(path)
    assert abs(difference).max() <= (2 if suffix == "jpg" else 0)  # another decoder may round otherwise


@pytest.mark.parametrize("orientation", range(1, 9))
def test_libvips_turns_upright(orientation: int, tmp_path: Path) -> None:
    pytest.importorskip("pyvips", reason="needs pyvips")
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(RGB).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(bands(VipsRaster(str(tmp_path / "x.png")), 20), read_image(tmp_path / "x.png"))


def test_libvips_and_sixteen_bits(tmp_path: Path) -> None:
    pytest.importorskip("pyvips", reason="needs pyvips")
    path = tmp_path / "x.png"
    Image.fromarray(GREY16).save(path)
    assert np.array_equal(bands(VipsRaster(str(path)), 20), read_image(path))


def test_the_reader_goes_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiff, png = tmp_path / "x.tif", tmp_path / "x.png"
    tifffile.imwrite(tiff, RGB, photometric="rgb", **TILED)
    Image.fromarray(RGB).save(png)
    assert isinstance(open_raster(RGB), Pixels)
    for path in (tiff, png):
        assert isinstance(open_raster(path), Pixels)
    monkeypatch.setattr(images, "LARGE_PIXELS", 3000)
    assert isinstance(open_raster(str(tiff)), TiffRaster)
    for path in (tiff, png):
        assert np.array_equal(bands(open_raster(path), 31), RGB)
    monkeypatch.setitem(sys.modules, "pyvips", None)
    assert isinstance(open_raster(png), Pixels)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    assert isinstance(open_raster(tiff), Pixels)


@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_beyond_what_pillow_reads_the_packages_are_named(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(RGB).save(path)
    for package in ("tifffile", "pyvips"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(images, "LARGE_PIXELS", 1000)
    with pytest.raises(OSError, match=r"exceeds limit of 2000 pixels.*not installed.*segmenter-fast\[large\]"):
        open_raster(path)


def test_broken_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "LARGE_PIXELS", 3000)
    with pytest.raises(FileNotFoundError, match=r"absent\.tif"):
        open_raster(tmp_path / "absent.tif")
    with pytest.raises(IsADirectoryError):
        open_raster(tmp_path)
    path = tmp_path / "x.tif"
    for compression in (None, "zlib"):
        tifffile.imwrite(path, RGB, photometric="rgb", compression=compression, rowsperstrip=8)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(OSError, match=r"x\.tif cannot be read"):
            bands(open_raster(path), 8)
    path.write_bytes(b"II*\0" + bytes(20))
    with pytest.raises(OSError, match=r"x\.tif cannot be read"):
        open_raster(path)
    pytest.importorskip("pyvips", reason="needs pyvips")
    path = tmp_path / "x.png"
    Image.fromarray(RGB).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=r"x\.png cannot be read"):
        bands(open_raster(path), 8)


def test_samples_without_a_rule_are_not_read_by_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    for values, message in {
        "float": (RGB[..., 0].astype(np.float32), "no rule for samples of 32 bits"),
        "signed": (RGB[..., 0].astype(np.int16), "no rule for samples of 16 bits"),
    }.values():
        tifffile.imwrite(path, values, photometric="minisblack", **TILED)
        with pytest.raises(NotByRowsError, match=message):
            TiffRaster(str(path))


@pytest.mark.parametrize("kind", ["sparse", "behind", "few"])
def test_missing_tiles_are_an_error_at_every_size(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, np.ones((64, 48, 3), np.uint8), photometric="rgb", tile=(32, 32), compression="zlib")
    with tifffile.TiffFile(path, mode="r+") as file:
        tags = file.pages[0].tags
        if kind == "sparse":
            tags["TileOffsets"].overwrite((0,) * 4)
            tags["TileByteCounts"].overwrite((0,) * 4)
        elif kind == "behind":
            tags["TileOffsets"].overwrite((*file.pages[0].dataoffsets[:3], 1 << 30))
        else:  # a claim of many more pixels
            tags["ImageLength"].overwrite(60_000)
            tags["ImageWidth"].overwrite(60_000)
    for limit in (1, 1 << 26):
        monkeypatch.setattr(images, "LARGE_PIXELS", limit)
        for read in (images.open_raster, read_image):
            with pytest.raises(
                OSError, match=r"x\.tif cannot be read: .* tiles or strips are missing or end behind"
            ) as caught:
                read(path)
            assert ("4 were never written (GDAL's SPARSE_OK): gdal_translate" in str(caught.value)) == (
                kind == "sparse"
            )
