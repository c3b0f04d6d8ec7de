"""Every kind of image becomes RGB pixels by a stated rule, or is refused by name."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segmenter_fast.io import walk
from segmenter_fast.io.channels import Channels
from segmenter_fast.io.images import normalise, open_raster, read_image

RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = RGB[..., 0]


def test_a_uint8_array_is_taken_as_it_is() -> None:
    assert np.array_equal(read_image(RGB), RGB)
    assert np.array_equal(read_image(RGB[:, ::-1, ::-1]), RGB[:, ::-1, ::-1])


@pytest.mark.parametrize("array", [GREY, GREY[..., None]])
def test_a_grey_array_becomes_three_equal_channels(array: np.ndarray) -> None:
    assert np.array_equal(read_image(array), np.stack([GREY] * 3, 2))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "RGBX", "LA", "PA", "CMYK", "YCbCr", "HSV"])
def test_pil_modes_convert_as_pillow_does(mode: str) -> None:
    image = Image.fromarray(RGB).convert("L").convert("LA") if mode == "LA" else Image.fromarray(RGB)
    image = image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
    assert image.mode == mode
    assert np.array_equal(read_image(image), np.asarray(image.convert("RGB")))


def test_transparency_is_dropped_and_not_blended() -> None:
    image = Image.fromarray(RGB)
    image.putalpha(0)
    assert np.array_equal(read_image(image), RGB)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bit_grey_is_scaled(mode: str, tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    expected = np.array([[0, 0, 1, 1, 128, 255]], np.uint8)
    data = {"I;16": values.astype("<u2"), "I;16B": values.astype(">u2"), "I": values.astype("<i4")}[mode]
    image = Image.frombytes(mode, (6, 1), data.tobytes())
    assert np.array_equal(read_image(image), np.stack([expected] * 3, 2))
    Image.frombytes("I;16", (6, 1), values.tobytes()).save(tmp_path / "x.png")
    assert np.array_equal(read_image(tmp_path / "x.png")[..., 0], expected)


@pytest.mark.parametrize("value", [-1, 65536])
def test_integers_beyond_sixteen_bits_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match=f"image of integers must lie within 0 to 65535.*{value}"):
        read_image(Image.new("I", (3, 2), value))


@pytest.mark.parametrize("mode", ["F", "La"])
def test_modes_without_a_rule_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"image has mode {mode}"):
        read_image(Image.new(mode, (3, 2)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_files_and_pil_images(orientation: int, tmp_path: Path) -> None:
    upright = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: np.rot90(RGB, -1),
        7: np.rot90(RGB, 2).transpose(1, 0, 2),
        8: np.rot90(RGB, 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "x.png"
    Image.fromarray(RGB).save(path, exif=exif)
    assert np.array_equal(read_image(path), upright)
    assert np.array_equal(read_image(str(path)), upright)
    with Image.open(path) as image:
        assert np.array_equal(read_image(image), upright)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (RGB.astype(np.float32) / 255, TypeError, r"image must be a uint8 array, got float32.*\* 255"),
        (np.full((4, 4, 3), np.nan), TypeError, "image must be a uint8 array, got float64"),
        (RGB.astype(np.uint16), TypeError, "image must be a uint8 array, got uint16.*// 257"),
        (RGB > 5, TypeError, "image must be a uint8 array, got bool"),
        (np.zeros((4, 4, 2), np.uint8), ValueError, r"image must be \(H, W, 3\).*got \(4, 4, 2\)"),
        (np.zeros((4, 4, 4), np.uint8), ValueError, r"image must be \(H, W, 3\).*got \(4, 4, 4\)"),
        (np.zeros((3, 4, 4), np.uint8), ValueError, "move the channels last"),
        (np.zeros((2, 4, 4, 3), np.uint8), ValueError, r"got \(2, 4, 4, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"at least one pixel, got \(0, 4, 3\)"),
        (np.zeros((0,), np.uint8), ValueError, r"image must be \(H, W, 3\).*got \(0,\)"),
        (Image.new("RGB", (0, 4)), ValueError, "at least one pixel, got 0 x 4"),
        (torch.zeros(3, 4, 4), TypeError, "image must be a path, a PIL image or a uint8 array, got Tensor"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_what_is_no_image_is_named(image: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_image(image)  # type: ignore[arg-type]


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.png"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(IsADirectoryError):
        read_image(tmp_path)

    text = tmp_path / "text.jpg"
    text.write_text("no image")
    with pytest.raises(OSError, match=r"image .*text\.jpg cannot be read"):
        read_image(text)

    for suffix in ("jpg", "png", "tif", "webp", "bmp", "gif"):
        whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
        Image.fromarray(np.tile(RGB, (20, 20, 1))).save(whole)
        data = whole.read_bytes()
        cut.write_bytes(data[: len(data) // 2])
        assert read_image(whole).shape == (120, 180, 3)
        with pytest.raises(OSError, match=rf"image .*cut\.{suffix} cannot be read"):
            read_image(cut)


@pytest.mark.parametrize("view", ["plain", "mirrored", "read-only"])
def test_normalise(view: str) -> None:
    pixels = RGB.copy() if view != "mirrored" else RGB[:, ::-1]
    pixels.flags.writeable = view != "read-only"
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    result = normalise(pixels, mean, std, torch.device("cpu"))
    expected = (pixels.astype(np.float64) / 255 - mean) / std
    assert result.dtype == torch.float32
    assert result.is_contiguous()
    np.testing.assert_allclose(result[0].permute(1, 2, 0).double().numpy(), expected, rtol=0, atol=1e-6)
    assert np.array_equal(pixels, RGB[:, ::-1] if view == "mirrored" else RGB)


def test_a_named_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for read in (read_image, open_raster):
        with pytest.raises(OSError, match=r"pipe\.png cannot be read: it is no regular file"):
            read(tmp_path / "pipe.png")
    with pytest.raises(IsADirectoryError):
        read_image(tmp_path)


def test_heic_is_read_where_its_package_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    values = np.repeat(np.arange(64, dtype=np.uint8)[:, None] * 3, 48, 1)
    image = Image.fromarray(np.stack([values] * 3, 2))
    pillow_heif.from_pillow(image).save(tmp_path / "x.HEIC", quality=95)
    assert ".heic" in walk.IMAGE_SUFFIXES
    read = read_image(tmp_path / "x.HEIC")
    assert read.shape == (64, 48, 3)
    assert np.abs(read.astype(int) - np.asarray(image)).max() < 8
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for reader in (read_image, open_raster):
        with pytest.raises(OSError, match=r"x\.HEIC cannot be read: HEIC needs pip install pillow-heif"):
            reader(tmp_path / "x.HEIC")


def test_an_array_with_its_bands_first_is_refused() -> None:
    channels = Channels(4, (1, 2, 3, 4), scale=4095.0)
    with pytest.raises(ValueError, match=r"got \(5, 64, 64\): fewer rows than bands"):
        read_image(np.zeros((5, 64, 64), np.uint16), channels=channels)
