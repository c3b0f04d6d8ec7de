"""Bands of images become the channels of a model by one rule, whatever the size and the format of the file."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from segmenter_fast.io import Pixels, images, open_raster
from segmenter_fast.io.channels import RGB, Channels
from segmenter_fast.io.images import normalise, read_image
from segmenter_fast.io.large_images import TiffRaster
from segmenter_fast.visualize import displayed

RANDOM = np.random.default_rng(0)
LAYOUTS = {
    "tiles": {"tile": (16, 32), "compression": "zlib"},
    "strips": {"rowsperstrip": 7, "compression": "zlib", "predictor": True},
    "plain": {},
}
SIZES = pytest.mark.parametrize("large", [False, True], ids=["small", "large"])


def values(bands: int, dtype: str = "uint16", most: int = 60_000) -> np.ndarray:
    return RANDOM.integers(0, most, (37, 53, bands)).astype(dtype)


def write(path: Path, pixels: np.ndarray, planes: bool = False, **options: object) -> Path:
    if pixels.shape[2] > 1:
        options["planarconfig"] = "separate" if planes else "contig"
    tifffile.imwrite(path, pixels.transpose(2, 0, 1) if planes else pixels, **{"photometric": "minisblack", **options})
    return path


def read(path: Path, channels: Channels, large: bool, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """All rows, in parts."""
    monkeypatch.setattr(images, "LARGE_PIXELS", 1 if large else 1 << 26)
    raster = open_raster(path, channels=channels)
    assert isinstance(raster, TiffRaster if large else Pixels)
    parts = [raster.read(top, min(top + 10, raster.height)) for top in range(0, raster.height, 10)]
    whole = np.concatenate(parts)
    assert np.array_equal(whole, read_image(path, channels=channels))
    return whole


@SIZES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_all_bands_of_a_tiff(
    count: int, planes: bool, layout: str, large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = values(count)
    path = write(tmp_path / "x.tif", pixels, planes and count > 1, **LAYOUTS[layout])
    found = read(path, Channels(count), large, monkeypatch)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, pixels / 65535, rtol=1e-6)


@SIZES
@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "float32", "float64"])
def test_named_bands_and_a_scale(
    dtype: str, planes: bool, large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = values(5, dtype, 250)
    path = write(tmp_path / "x.tif", pixels, planes, **LAYOUTS["tiles"], byteorder=">")
    found = read(path, Channels(3, (4, 3, 2), 200), large, monkeypatch)
    np.testing.assert_allclose(found, pixels[..., [3, 2, 1]].astype(np.float64) / 200, rtol=1e-6)
    if dtype == "uint8":
        assert np.array_equal(read(path, Channels(2, (5, 5)), large, monkeypatch), pixels[..., [4, 4]])
    elif dtype != "uint16":
        with pytest.raises(ValueError, match=rf"values of {dtype}, which have no defined range: .* --scale"):
            read(path, Channels(5), large, monkeypatch)


@SIZES
def test_models_of_rgb_refuse_other_bands(large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (2, 4, 8):
        path = write(tmp_path / f"{count}.tif", values(count, "uint8", 250))
        message = rf"the image has {count} bands \(1 to {count}\), and the model takes 3: .* --bands 1,2,"
        with pytest.raises(ValueError, match=message):
            read(path, RGB, large, monkeypatch)
        with pytest.raises(ValueError, match="there is no band 9 for --bands"):
            read(path, Channels(3, (9, 1, 1)), large, monkeypatch)
    three = values(3, "uint8", 250)
    assert np.array_equal(read(write(tmp_path / "3.tif", three), RGB, large, monkeypatch), three)
    grey = write(tmp_path / "1.tif", three[..., :1])
    assert np.array_equal(read(grey, RGB, large, monkeypatch), np.repeat(three[..., :1], 3, 2))
    np.testing.assert_allclose(read(grey, Channels(scale=200), large, monkeypatch)[..., 1], three[..., 0] / 200, 1e-6)
    alpha = write(tmp_path / "a.tif", values(4, "uint8", 250), photometric="rgb", extrasamples=["unassalpha"])
    assert read(alpha, RGB, large, monkeypatch).shape[2] == 3
    assert read(alpha, Channels(4), large, monkeypatch).shape[2] == 4
    with pytest.raises(ValueError, match=r"the image has 4 bands .*, and the model takes 2"):
        read(alpha, Channels(2), large, monkeypatch)


@pytest.mark.parametrize(("mode", "count"), [("L", 1), ("LA", 2), ("RGB", 3), ("RGBA", 4), ("CMYK", 3), ("P", 3)])
def test_bands_of_other_files(mode: str, count: int, tmp_path: Path) -> None:
    image = Image.fromarray(values(4, "uint8", 250), "RGBA").convert(mode)
    image.save(path := tmp_path / ("x.tif" if mode == "CMYK" else "x.png"))
    expected = np.asarray(image.convert("RGB") if mode in ("CMYK", "P") else image).reshape(37, 53, count)
    for source in (path, image):
        last = Channels(1, (count,))
        assert np.array_equal(read_image(source, channels=last), expected[..., -1:])
        assert np.array_equal(read_image(source, channels=Channels(count)), expected)
        half = read_image(source, channels=Channels(count, scale=510))
        np.testing.assert_allclose(half, expected / 510, rtol=1e-6)


def test_sixteen_bits_of_png(tmp_path: Path) -> None:
    grey = values(1)[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_allclose(read_image(tmp_path / "grey.png", channels=Channels(1))[..., 0], grey / 65535, rtol=1e-6)
    np.testing.assert_allclose(
        read_image(tmp_path / "grey.png", channels=Channels(scale=60000))[..., 2], grey / 60000, 1e-6
    )
    pyvips = pytest.importorskip("pyvips", reason="needs pyvips to write colours of 16 bits")
    pyvips.Image.new_from_array(values(3)).copy(interpretation="rgb16").write_to_file(str(tmp_path / "rgb.png"))
    assert read_image(tmp_path / "rgb.png").dtype == np.uint8
    with pytest.raises(OSError, match=r"rgb\.png cannot be read: Pillow makes 8 bits of its 16"):
        read_image(tmp_path / "rgb.png", channels=Channels(scale=4095))


def test_libvips_reads_what_tifffile_cannot_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyvips = pytest.importorskip("pyvips", reason="needs pyvips")
    pixels = values(5)
    image = pyvips.Image.new_from_array(pixels).copy(interpretation="multiband")
    image.write_to_file(str(tmp_path / "x.tif"), compression="lzw", tile=True)
    expected = pixels[..., [4, 0]] / 65535
    np.testing.assert_allclose(read_image(tmp_path / "x.tif", channels=Channels(2, (5, 1))), expected, rtol=1e-6)
    monkeypatch.setattr(images, "LARGE_PIXELS", 1)
    raster = open_raster(tmp_path / "x.tif", channels=Channels(2, (5, 1)))
    np.testing.assert_allclose(raster.read(3, 30), expected[3:30], rtol=1e-6)
    with pytest.raises(ValueError, match="the image has 5 bands"):
        open_raster(tmp_path / "x.tif")


def test_arrays_of_any_numbers() -> None:
    pixels = values(4, "float64", 100) / 100
    np.testing.assert_allclose(read_image(pixels, channels=Channels(2, (4, 1), 1)), pixels[..., [3, 0]], rtol=1e-6)
    np.testing.assert_allclose(read_image(values(1)[..., 0], channels=Channels(scale=65535)).shape, (37, 53, 3))
    for bad, message in (
        (np.where(pixels > 0.5, np.nan, pixels), "NaN or infinite"),
        (pixels[:0], "numbers, got"),
        (pixels > 0, "got .* bool"),
    ):
        with pytest.raises(ValueError, match=message):
            read_image(bad, channels=Channels(4, scale=1))
    with pytest.raises(ValueError, match=r"got \(37, 53, 4\); bands= names three of its bands"):
        read_image(pixels.astype(np.uint8))


@SIZES
@pytest.mark.parametrize("kind", ["grey", "rgb", "bands"])
def test_twelve_bits_in_sixteen_are_warned_of(
    kind: str, large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = {"grey": 1, "rgb": 3, "bands": 4}[kind]
    own = Channels(4) if kind == "bands" else RGB
    path = write(tmp_path / "x.tif", values(count, most=4096), photometric="rgb" if kind == "rgb" else "minisblack")
    with pytest.warns(UserWarning, match="less than an eighth of the range .* --scale 4095"):
        read(path, own, large, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(path, Channels(own.count, scale=4095), large, monkeypatch)
    with pytest.warns(UserWarning, match="an eighth of the range up to the scale, 40000; a smaller --scale"):
        read(path, Channels(own.count, scale=40000), large, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(write(path, values(count, most=65536)), own, large, monkeypatch)
        read(write(path, values(count) * 0), own, large, monkeypatch)  # a blank image
        read(write(path, values(count, "uint8", 20)), own, large, monkeypatch)  # 8 bits have their range


@SIZES
@pytest.mark.parametrize("channels", [Channels(4), Channels(4, (1, 2, 3, 4))])
def test_bands_on_pages_of_their_own_are_told_of(
    channels: Channels, large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tifffile.imwrite(tmp_path / "x.tif", values(4).transpose(2, 0, 1), photometric="minisblack")
    with pytest.raises(ValueError, match=r"1 band[, ].*; bands that are pages of a file are not read"):
        read(tmp_path / "x.tif", channels, large, monkeypatch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bands": (4, 3)}, "--bands must name 3 bands, counted from 1, as the model takes, got 4,3"),
        ({"bands": (0, 1, 2)}, "--bands must name 3 bands"),
        ({"scale": 0.0}, "--scale must be a positive number, got 0"),
        ({"scale": float("nan")}, "--scale must be a positive number"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Channels(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 4])
def test_floats_are_normalised_and_shown_as_they_are(count: int) -> None:
    pixels = (values(count) / 65535).astype(np.float32)
    before = pixels.copy()
    result = normalise(pixels, [0.5] * count, [0.25] * count, torch.device("cpu"))
    np.testing.assert_allclose(result[0].permute(1, 2, 0).numpy(), (pixels - 0.5) / 0.25, rtol=1e-5, atol=1e-6)
    assert np.array_equal(pixels, before)
    shown = displayed(pixels * 2 - 0.5)
    wanted = np.clip((before * 2 - 0.5)[..., [0, 1, 2] if count == 4 else [0, 0, 0]], 0, 1) * 255
    assert shown.dtype == np.uint8
    np.testing.assert_allclose(shown, wanted, atol=0.51)
